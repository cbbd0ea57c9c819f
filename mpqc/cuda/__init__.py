"""NVIDIA GPUs: kernels as CUDA source and machine code, and libraries that run them."""
