"""Folders and files as today's tools write them, and what is read from each."""
