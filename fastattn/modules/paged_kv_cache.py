"""A cache in pages, which sequences take as they grow and share where they begin alike (arXiv:2309.06180)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.modules._common import check_number
from fastattn.modules._pages import PageTable
from fastattn.modules.layered_kv_cache import CacheFullError, LayeredKVCache, rotary_words


class PagedKVCache(LayeredKVCache):
    """A cache whose memory is a pool of pages; it is used as :class:`fastattn.KVCache` is.

    A sequence holds the pages that its tokens take, and no memory for tokens to come. :meth:`fork`
    copies nothing: sequences with the same beginning share its pages, which are counted, and the first that writes into
    a partly filled page that others hold gets a copy of it: at most one page a sequence and layer.

    Args:
        layers: of the stack, which share one block table.
        batch: number of sequences.
        kv_heads: number of heads ``Hk`` of keys and values.
        pages: number of pages in the pool, for all sequences together; each is of all layers.
        head_dim: size ``D`` of a key.
        value_dim: size ``Dv`` of a value; None: ``head_dim``.
        page_size: tokens in a page. Larger pages are read faster, since each costs some work of its own; smaller ones
            leave less memory unused, and less to copy behind a fork.
        max_length: how many tokens a sequence may have, which is the width of the block table; None: as many as the
            pool holds.
        dtype: of keys and values; None: torch's default.
        device: where they lie; None: torch's default.
        rotary_cos: as for :class:`fastattn.KVCache`.
        rotary_sin: as there.
        rotary_interleaved: as there.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is not positive, or a table is too short.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        kv_heads: int,
        pages: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        page_size: int = 256,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = False,
    ) -> None:
        check_number("pages", pages)
        check_number("page_size", page_size)
        super().__init__(
            layers,
            batch,
            kv_heads,
            head_dim,
            value_dim,
            pages * page_size if max_length is None else max_length,
            rows=pages,
            slots=page_size,
            dtype=dtype,
            device=device,
            rotary=rotary_words(rotary_cos, rotary_sin, rotary_interleaved),
        )
        self._pages = PageTable(pages, batch, page_size)
        # Entries behind a sequence's last page are of pages that it had once, or 0
        width = self._pages.pages_for(self.max_length)
        self._block_table = torch.zeros(batch, width, dtype=torch.int32, device=self.lengths.device)

    @property
    def block_table(self) -> Tensor:
        """int32 ``[batch, pages of a sequence]``, on the device."""
        return self._block_table

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return self.key_cache.shape[1]

    @property
    def page_size(self) -> int:
        """How many tokens a page holds."""
        return self.key_cache.shape[3]

    @property
    def pages_free(self) -> int:
        """How many pages no sequence holds."""
        return self._pages.free

    @property
    def pages_held(self) -> int:
        """How many pages sequences hold; one that several share counts once."""
        return self.pages - self.pages_free

    def _make_room(self, tokens: int, chosen: range) -> None:
        """Take pages from the pool, and copy those that others hold too and that are about to be written."""
        asked = self._pages.pages_to_take(chosen, self._lengths, tokens)
        if asked > self.pages_free:
            message = (
                f"reserve({tokens}): {asked} pages asked for, {self.pages_held} held and {self.pages_free} free, of "
                f"{self.page_size} tokens each"
            )
            raise CacheFullError(message, asked, self.pages_held, self.pages_free)
        if asked == 0:
            return
        taken = self._pages.grow(chosen, self._lengths, tokens)
        copied = [page for page in taken if page.source != page.page]
        used = max((self._lengths[page.sequence] % self.page_size for page in copied), default=0)
        self._copy_rows([page.source for page in copied], [page.page for page in copied], used)
        sequences, positions, pages = self._to_device([page[:3] for page in taken]).unbind(1)
        self._block_table[sequences, positions] = pages.int()

    def _fork(self, parents: list[int]) -> None:
        """Hand on the pages in use, without copying any."""
        self._pages.fork(parents, self._lengths)
        self._block_table[: len(parents)] = self._block_table[self._to_device(parents)]

    def _release(self, sequence: int, length: int) -> None:
        self._pages.shrink(sequence, length)

    def _room(self) -> str:
        return f"{self.pages_held} of {self.pages} pages of {self.page_size} tokens held"
