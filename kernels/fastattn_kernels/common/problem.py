"""What every attention kernel is told: the tensors and numbers of one call."""

import dataclasses

import triton
from torch import Tensor

from fastattn_kernels.common.arguments import Dropout, Pairs, PerBatch, PerHead, PerKey, Rules, documents, strided
from fastattn_kernels.common.config import Load
from fastattn_kernels.common.functions import Modifier
from fastattn_kernels.common.gradients import WeightsGradient
from fastattn_kernels.common.packed import Offsets, Packed


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call's inputs, already validated.

    Attributes:
        query: ``[B, H, L, D]``, float16, bfloat16 or float32, any strides; so are the next two.
        key: ``[B, Hk, S, D]``.
        value: ``[B, Hk, S, Dv]``.
        scale: multiplies the products of queries and keys.
        bias: ``[B | 1, H | 1, L | 1, S | 1]``, floating, added to the scores.
        alibi_slopes: ``[B | 1, H]``, floating: ``-slope * |i + shift - j|`` is added to the scores (ALiBi).
        sinks: ``[B | 1, H]``, floating: the logit of a key without a value that every row sees.
        mask: ``[B | 1, H | 1, L | 1, S | 1]``, boolean, True = may see.
        key_padding_mask: ``[B | 1, S]``, boolean, True = padding.
        query_documents: ``[B | 1, L]``, integer; a query sees only keys of its own document.
        key_documents: ``[B | 1, S]``.
        prefix: ``[B | 1]``, integer: so many first keys are seen whatever ``lower`` and ``upper`` say.
        lower: query ``i`` sees keys ``j >= i + lower``; None: no such bound.
        upper: query ``i`` sees keys ``j <= i + upper``; None: no such bound.
        shift: query ``i`` stands at key position ``i + shift``.
        softcap: scores become ``softcap * tanh(score / softcap)`` before anything is added; None: they stay.
        score_mod: a function that changes the scores behind the softcap, before anything is added; -inf hides a pair.
        mask_mod: a function that says which keys a query sees, of those that all else leaves visible.
        seed: int64 ``[2]`` on the device, seed and offset of the dropout; None: no dropout.
        dropout_p: the probability of dropping a weight.
        packed: where packed sequences lie; None: nothing is packed. With it ``B`` of query, key and value is 1, and of
            all others, to which the sequence stands in the place of the batch entry, it is N; ``L`` and ``S`` of the
            bias are those of the longest sequences, and there are no masks, padding or documents.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None
    mask: Tensor | None = None
    key_padding_mask: Tensor | None = None
    query_documents: Tensor | None = None
    key_documents: Tensor | None = None
    prefix: Tensor | None = None
    lower: int | None = None
    upper: int | None = None
    shift: int = 0
    softcap: float | None = None
    score_mod: Modifier | None = None
    mask_mod: Modifier | None = None
    seed: Tensor | None = None
    dropout_p: float = 0.0
    packed: Packed | None = None

    @property
    def masks(self) -> list[Tensor]:
        """The tensors that hide keys. Which tiles they leave visible is known only by reading them."""
        candidates = (self.mask, self.key_padding_mask, self.query_documents, self.key_documents)
        return [tensor for tensor in candidates if tensor is not None]

    @property
    def hides_at_will(self) -> bool:
        """Whether something hides keys that arithmetic knows nothing of: one of the masks, or a function."""
        return bool(self.masks) or self.mask_mod is not None

    def masks_pairs(self) -> bool:
        """Whether some query may see a key that another one, or nobody, may not.

        Then NaN or inf in what is masked out could leak as 0 * NaN, so tiles that are not finite are computed again
        with 0 * NaN = 0. The plain forward does so within its own launch. Other kernels are followed by a careful
        launch, which exits at once where all is finite and costs a few microseconds: a second loop inside them would
        spill registers.
        """
        if self.bias is not None or self.score_mod is not None or self.hides_at_will:
            return True
        if self.packed is not None:  # only the device knows the lengths
            return self.lower is not None or self.upper is not None
        rows, last_key = self.query.shape[2], self.key.shape[2] - 1
        # a single row that sees every key, as in decoding, hides none
        below = self.lower is not None and (rows > 1 or self.lower > 0)
        above = self.upper is not None and (rows > 1 or self.upper < last_key)
        return below or above

    def load(self, d_weights: WeightsGradient | None = None) -> Load:
        """What a tile of scores carries beside itself."""
        if self.score_mod is not None:
            return "modified"
        if self.seed is not None or d_weights is not None or self.softcap is not None:
            return "heavy"
        if self.mask_mod is not None and self.mask_mod.is_heavy:
            return "heavy"
        # a function that hides keys takes registers: on sm_90 dK and dV would spill (8 bytes at head size 64)
        if self.bias is not None or self.alibi_slopes is not None or self.mask_mod is not None:
            # where a sequence begins takes registers, too: dQ would spill (72 bytes on sm_90 at head size 128)
            return "biased" if self.packed is None else "heavy"
        hides = self.hides_at_will or self.prefix is not None or self.lower is not None
        return "masked" if hides else "plain"

    def rules(self) -> Rules:
        """The kernel argument ``rules``."""
        return Rules(
            mask=strided(Pairs, self.mask),
            bias=strided(Pairs, self.bias),
            padding=strided(PerKey, self.key_padding_mask),
            documents=documents(self.query_documents, self.key_documents),
            prefix=strided(PerBatch, self.prefix),
            alibi_slopes=strided(PerHead, self.alibi_slopes),
            softcap=self.softcap,
            score_mod=self.score_mod and self.score_mod.score_mod(),
            mask_mod=self.mask_mod and self.mask_mod.mask_mod(),
        )

    def sizes(self) -> tuple[int | None, ...]:
        """The kernel arguments ``heads, group, seqlen_q, seqlen_k, lower, upper, shift``."""
        heads, kv_heads = self.query.shape[1], self.key.shape[1]
        lengths = self.query.shape[2], self.key.shape[2]
        return heads, heads // max(kv_heads, 1), *lengths, self.lower, self.upper, self.shift

    @property
    def entries(self) -> int:
        """How many batch entries there are, or packed sequences."""
        return self.query.shape[0] if self.packed is None else self.packed.sequences

    @property
    def longest(self) -> tuple[int, int]:
        """Rows and keys of a batch entry, or how many a packed sequence can have: no more than the bias, past whose end
        a longer one would read."""
        rows, keys = self.query.shape[2], self.key.shape[2]
        if self.packed is not None and self.packed.longest is not None:
            rows, keys = self.packed.longest
        if self.packed is None or self.bias is None:
            return rows, keys
        of_bias = self.bias.shape[2:]
        return rows if of_bias[0] == 1 else of_bias[0], keys if of_bias[1] == 1 else of_bias[1]

    def packing(self) -> tuple[Offsets | int | None, ...]:
        """The kernel arguments ``offsets, sequences, longest_q, longest_k, bottom_right``."""
        packed = self.packed
        if packed is None:
            return None, None, None, None, None
        offsets = Offsets(packed.cu_seqlens_q, packed.cu_seqlens_k, packed.seqused_k)
        return offsets, packed.sequences, *self.longest, int(packed.bottom_right)

    def tiles_of_rows(self, block_m: int) -> int:
        """How many tiles of ``block_m`` rows there are, or numbers of tiles where sequences are packed (``packed``)."""
        return self._tiles(self.query, block_m)

    def tiles_of_keys(self, block_n: int) -> int:
        """The same of keys."""
        return self._tiles(self.key, block_n)

    def _tiles(self, tensor: Tensor, block: int) -> int:
        batch, heads, length, _ = tensor.shape
        if self.packed is None:
            return int(triton.cdiv(length, block)) * batch * heads
        return (length // block + self.packed.sequences) * heads if self.packed.sequences else 0

    def dropout(self) -> Dropout | None:
        """The kernel argument ``dropout``."""
        return None if self.seed is None else Dropout(self.seed, self.dropout_p)
