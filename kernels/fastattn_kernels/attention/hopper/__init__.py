"""Attention for Hopper (sm_90) in Gluon: warp-specialised kernels, fed by TMA, computing on wgmma."""
