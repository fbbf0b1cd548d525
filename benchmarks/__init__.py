"""Timings of every layer shape and network, stock PyTorch against mbn_kernels: `pytest --benchmark` at the root."""
