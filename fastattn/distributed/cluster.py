"""Links between ranks, and what a rank and a node of a cluster can do, with the public figures of two clusters.

Bandwidths are those that large messages reach, and not those of the data sheet. Latencies are those by which NCCL
itself models its rings (``hwLat`` in its ``src/graph/tuning.cc``), for three protocols: Simple, LL128, which keeps 0.92
of the bandwidth, and LL, which keeps half.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """A link, as one rank uses it.

    Args:
        name: as explanations call it.
        bandwidth: bytes a second in one direction.
        latency: seconds that a message takes beside those of its bytes.
        protocols: what a collective may use instead where messages are small, the same on all of its links: for each a
            latency, and the share of the bandwidth that it keeps.

    Raises:
        ValueError: the bandwidth is not a finite number above 0, or the latency not one from 0 on.
    """

    name: str
    bandwidth: float
    latency: float
    protocols: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        check_above_zero("bandwidth", self.bandwidth)
        if not 0 <= self.latency < math.inf:
            raise ValueError(f"latency={self.latency!r}: expected a finite number of seconds, 0 or more")


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal ranks, of which each is one GPU.

    Args:
        name: as explanations call it.
        within: the link of a rank to the others of its node.
        between: one port of a node to the network.
        ranks_per_node: how many ranks a node has.
        ports_per_node: how many ports a node has. Ranks that send at the same time share them evenly, and a rank that
            sends alone has one.
        forward_rate: operations a second of the attention kernel, of which a visible pair of query and key takes
            ``4 * head_dim`` in each head.
        backward_rate: the same of the backward, where it takes ``10 * head_dim``.
        memory: bytes that a call may hold on a rank, its inputs and results included.
        memory_bandwidth: bytes a second of a rank's own memory.
        launch: seconds that computing one part takes beside its operations.

    Raises:
        ValueError: a number is not above 0.
    """

    name: str
    within: Link
    between: Link
    ranks_per_node: int
    ports_per_node: int
    forward_rate: float
    backward_rate: float
    memory: float
    memory_bandwidth: float
    launch: float = 10e-6  # an estimate: the launches of a part's attention and of its merge

    def __post_init__(self) -> None:
        for name in ("ranks_per_node", "ports_per_node"):
            check_count(name, getattr(self, name))
        for name in ("forward_rate", "backward_rate", "memory", "memory_bandwidth", "launch"):
            check_above_zero(name, getattr(self, name))


def check_above_zero(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: expected a number, got {type(value).__name__}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r}: expected a finite number above 0")


def check_count(name: str, value: int) -> None:
    """Raise unless ``value`` is an int above 0."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: expected an int above 0, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}={value!r}: expected an int above 0")


# ------------------------------------------------------------------------------------------------------- public figures

# 18 links of 25 GB/s in each direction, 450 GB/s together (NVIDIA H100 architecture whitepaper). NCCL takes 20.6 GB/s
# for what a link reaches (SM90_NVLINK_BW in its src/graph/topo.h).
NVLINK_4 = Link("NVLink 4", 18 * 20.6e9, 3.4e-6, ((1.9e-6, 0.92), (0.6e-6, 0.5)))
# 12 links of 25 GB/s in each direction (NVIDIA A100 data sheet), of which NCCL takes 20.0 GB/s (SM80_NVLINK_BW).
NVLINK_3 = Link("NVLink 3", 12 * 20.0e9, 3.4e-6, ((1.9e-6, 0.92), (0.6e-6, 0.5)))
# 32 GB/s in each direction. NCCL takes 12 GB/s for a slot of PCIe 3 (PCI_BW), and PCIe 4 is twice as fast.
PCIE_4 = Link("PCIe 4", 2 * 12.0e9, 5.7e-6, ((2.5e-6, 0.92), (1.0e-6, 0.5)))
# A port of ConnectX-7 of 400 Gb/s, which is 50 GB/s (DGX H100 user guide); 48.5 GB/s are reached (CX7_BW in the
# simulator SimAI, github.com/aliyun/SimAI).
INFINIBAND_NDR = Link("InfiniBand NDR", 48.5e9, 14e-6, ((4.0e-6, 0.92), (2.7e-6, 0.5)))
# 12.5 GB/s, of which NCCL takes 12 (NET_BW).
ETHERNET_100 = Link("100 Gb/s Ethernet", 12.0e9, 14e-6, ((4.0e-6, 0.92), (2.7e-6, 0.5)))

# Eight H100 and a network port for each (DGX H100 user guide): 80 GB, 3.35 TB/s (H100 data sheet). The rates are
# FlashAttention-3's for bfloat16, head size 128 and length 16384, forward causal (arXiv:2407.08608, figures 5 and 6).
DGX_H100 = Cluster(
    name="8 x H100 on NVLink 4, 8 ports of InfiniBand NDR",
    within=NVLINK_4,
    between=INFINIBAND_NDR,
    ranks_per_node=8,
    ports_per_node=8,
    forward_rate=616e12,
    backward_rate=561e12,
    memory=80e9,
    memory_bandwidth=3.35e12,
)
# Eight A100 that share 100 Gb/s: Google Cloud's A2 Ultra (cloud.google.com/compute/docs/gpus/gpu-network-bandwidth),
# 80 GB, 2.039 TB/s (A100 data sheet). The rates are the shares of 312 TFLOP/s that FlashAttention-2 reaches: 73 %
# forward, 63 % backward (arXiv:2307.08691).
A2_ULTRA = Cluster(
    name="8 x A100 on NVLink 3, one port of 100 Gb/s Ethernet",
    within=NVLINK_3,
    between=ETHERNET_100,
    ranks_per_node=8,
    ports_per_node=1,
    forward_rate=0.73 * 312e12,
    backward_rate=0.63 * 312e12,
    memory=80e9,
    memory_bandwidth=2.039e12,
)
