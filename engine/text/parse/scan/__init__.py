"""Text read piece by piece, and what was found in it."""
