"""Triton kernels, one module or family of modules an operator; installed as ddim_fast.kernels."""
