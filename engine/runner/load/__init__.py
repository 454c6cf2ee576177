"""From files to an MLX model."""
