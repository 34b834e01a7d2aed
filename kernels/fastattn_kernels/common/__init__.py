"""What the families of kernels share; it imports none of them."""
