"""The device: its limits, its free memory, its BLAS."""
