"""The network, one file per block of the paper, calling dsv4_kernels."""
