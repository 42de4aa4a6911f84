"""Triton kernels, one file an operator. Importable as ddim_fast.kernels once the package is installed."""
