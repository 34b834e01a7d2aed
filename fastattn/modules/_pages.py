"""Which pages of a pool hold which sequences: references counted on the host, without a tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class TakenPage(NamedTuple):
    """A page that a sequence took from the pool."""

    sequence: int
    position: int  # among the sequence's pages
    page: int
    source: int  # what it is to be a copy of; the page itself where it may hold anything


class PageTable:
    """The pages of each sequence, in the order of its tokens. Sequences that were forked hold some in common.

    Args:
        pages: number of pages in the pool.
        batch: number of sequences.
        page_size: tokens in a page.

    Attributes:
        of: for each sequence the numbers of its pages.
    """

    def __init__(self, pages: int, batch: int, page_size: int) -> None:
        self.page_size = page_size
        self.of: list[list[int]] = [[] for _ in range(batch)]
        self._references = [0] * pages  # how many sequences hold each page
        self._free = list(range(pages))[::-1]  # a stack

    @property
    def free(self) -> int:
        """How many pages no sequence holds."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """How many pages so many tokens take."""
        return -(-tokens // self.page_size)

    def pages_to_take(self, sequences: Iterable[int], lengths: Sequence[int], tokens: int) -> int:
        """How many free pages :meth:`grow` takes for these arguments."""
        taken, sharing = 0, Counter[int]()
        for sequence in sequences:
            taken += max(0, self.pages_for(lengths[sequence] + tokens) - len(self.of[sequence]))
            if (shared := self._shared_page(sequence, lengths[sequence], tokens)) is not None:
                sharing[self.of[sequence][shared]] += 1
        # Where nobody else holds a page, one of those who are to write into it need not copy it.
        return taken + sum(min(count, self._references[page] - 1) for page, count in sharing.items())

    def grow(self, sequences: Iterable[int], lengths: Sequence[int], tokens: int) -> list[TakenPage]:
        """Give each of these sequences pages of its own for so many tokens behind its length.

        The pool must have :meth:`pages_to_take` free pages.
        """
        taken = []
        for sequence in sequences:
            pages = self.of[sequence]
            if (shared := self._shared_page(sequence, lengths[sequence], tokens)) is not None:
                source = pages[shared]
                self._give_back(source)
                pages[shared] = self._take()
                taken.append(TakenPage(sequence, shared, pages[shared], source))
            while len(pages) < self.pages_for(lengths[sequence] + tokens):
                pages.append(self._take())
                taken.append(TakenPage(sequence, len(pages) - 1, pages[-1], pages[-1]))
        return taken

    def shrink(self, sequence: int, length: int) -> None:
        """Give back what a sequence does not need for so many tokens."""
        pages = self.of[sequence]
        while len(pages) > self.pages_for(length):
            self._give_back(pages.pop())

    def fork(self, parents: Sequence[int], lengths: Sequence[int]) -> None:
        """Sequence ``i`` gets the pages in use of sequence ``parents[i]``, and those behind the last parent none.

        Args:
            parents: one for each of the first sequences.
            lengths: of all sequences, before the fork.
        """
        before = self.of
        self.of = [before[parent][: self.pages_for(lengths[parent])] for parent in parents]
        self.of += [[] for _ in range(len(before) - len(parents))]
        for pages in self.of:
            for page in pages:
                self._references[page] += 1
        for pages in before:
            for page in pages:
                self._give_back(page)

    def _shared_page(self, sequence: int, length: int, tokens: int) -> int | None:
        """Which of a sequence's pages its next tokens would be written into although others hold it, or None.

        Only the last page in use can be: what a fork shares ends with it.
        """
        if tokens == 0 or length % self.page_size == 0:
            return None
        last = length // self.page_size
        return last if self._references[self.of[sequence][last]] > 1 else None

    def _take(self) -> int:
        page = self._free.pop()
        self._references[page] = 1
        return page

    def _give_back(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page] == 0:
            self._free.append(page)
