"""Checkpoints as other tools write them: tiny, random and made on the spot."""
