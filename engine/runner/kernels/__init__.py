"""Kernels of our own for GPUs, one text for CUDA and Metal, with their check and their timings."""
