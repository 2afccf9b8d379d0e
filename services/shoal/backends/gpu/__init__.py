"""Experimental: Triton kernels and CUDA graphs. None of it has run on a GPU yet; tests use Triton's interpreter."""
