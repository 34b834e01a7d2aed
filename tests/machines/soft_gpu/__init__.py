"""The machine ``ptx``: what triton compiles for sm_90, executed on a CPU behind triton's own launcher.

- ``driver.c``: a libcuda without a GPU, which hands launches over; ``launcher``: compiles up to PTX, runs the blocks
- ``program``: PTX as statements; ``operands``, ``instructions``: statements as steps of a warp
- ``machine``: blocks and warps, in random turns
- ``arithmetic``, ``memory``, ``shared``, ``barriers``, ``tma``, ``products``: what the instructions do
- ``races``: vector clocks over shared memory, and the fences between proxies

A launch fails with a :class:`tests.machines.findings.Finding` that names the kind of fault, the line of the PTX and the
lines of Python. docs/proof.md says what is not modelled.
"""
