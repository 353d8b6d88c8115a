"""Kernels in Triton, each beside the plain PyTorch that it must agree with."""
