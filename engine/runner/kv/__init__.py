"""KV pages in device memory, and the caches through which mlx-lm reads and writes them."""
