"""Triton kernels for NVIDIA and AMD GPUs, one family per file; imported only where a GPU (or the interpreter) uses them."""
