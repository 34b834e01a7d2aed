"""Floor 4: sequences, heads and batches that are shared out among processes, on torch.distributed."""

from fastattn.distributed.agreement import RanksDisagreeError
from fastattn.distributed.api import context_parallel_attention
from fastattn.distributed.exchange import RankLostError, Traffic, record_traffic
from fastattn.distributed.explanation import MethodExplanation, explain
from fastattn.distributed.parallel_model import parallelize
from fastattn.distributed.parallel_optimizer import keep_torch_shapes
from fastattn.distributed.sharing import position_ids, shard, unshard

__all__ = [
    "MethodExplanation",
    "RankLostError",
    "RanksDisagreeError",
    "Traffic",
    "context_parallel_attention",
    "explain",
    "keep_torch_shapes",
    "parallelize",
    "position_ids",
    "record_traffic",
    "shard",
    "unshard",
]
