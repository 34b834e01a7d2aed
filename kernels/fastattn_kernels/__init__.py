"""Floor 0: Triton kernels and their launchers. Tensors in, tensors out."""

from fastattn_kernels.common.device import interpreting

if interpreting():
    from fastattn_kernels.common.interpreter import repair
else:
    from fastattn_kernels.common.compiler import repair

repair()
