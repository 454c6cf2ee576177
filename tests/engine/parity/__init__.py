"""The engine against mlx-lm on the same weights, token for token."""
