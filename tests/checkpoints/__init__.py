"""Tiny random model folders as many tools write them: what loads, and what is refused by name."""
