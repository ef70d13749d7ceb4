"""Source of kernels and host programs from fused programs."""
