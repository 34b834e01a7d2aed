"""Executes what the compiler makes of a kernel, TTIR or TTGIR, on a CPU: PyPI's ``ttsem``, under the worst of orders.

``launcher`` takes the launches, ``repairs`` mends the version of ttsem that is pinned, ``worst_case`` does to Gluon
kernels what a GPU may do at worst.
"""
