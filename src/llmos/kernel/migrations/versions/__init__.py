"""The revisions: `kernel_NNNN` and `keys_NNNN` are two independent lines."""
