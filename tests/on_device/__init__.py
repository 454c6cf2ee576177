"""Checks of this project on the GPU of the machine at hand, which CI has not: ``python -m tests.on_device``.

They need mlx, mlx-lm, numpy and what the engine itself imports; neither pytest nor a notebook.
"""
