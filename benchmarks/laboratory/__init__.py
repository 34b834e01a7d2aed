"""The laboratory: what kernels take and how fast their loops can be, read from binaries, without a GPU."""
