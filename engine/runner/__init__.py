"""All MLX lives here: devices, loading, cache views, sampling, the model runner."""
