"""Bookkeeping of KV memory and requests: pure Python, no MLX."""
