"""Floor 0: Triton kernels and their launchers. Tensors in, tensors out."""

from fastattn_kernels._device import interpreting

if interpreting():
    from fastattn_kernels._interpreter import repair

    repair()
