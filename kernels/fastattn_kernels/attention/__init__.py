"""Scaled dot-product attention in plain Triton; in ``hopper``, in Gluon."""
