"""The caches: what they hold after appends, forks and truncations, pages counted, the errors, and fixed addresses."""

import pickle
import random
from typing import Any, cast

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import fastattn
from fastattn import CacheFullError, KVCache, PagedKVCache
from fastattn.reference import attention, rotate
from fastattn.testing import random_tensor

LAYERS, HEADS, KV_HEADS, SIZE, VALUE_SIZE, PAGE = 2, 4, 2, 8, 6, 4
BOTH = pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])


@pytest.fixture(autouse=True)
def _compiled_code():
    with fastattn.use_backend("torch"):
        yield


def make(paged: bool, batch: int = 3, max_length: int = 16, pages: int = 12, **words: Any) -> Any:
    """A cache in float64, filled with NaN: nothing may be seen that was not written."""
    words["dtype"] = torch.float64
    if paged:
        sizes = LAYERS, batch, KV_HEADS, pages, SIZE, VALUE_SIZE
        cache: Any = PagedKVCache(*sizes, page_size=PAGE, max_length=max_length, **words)
    else:
        cache = KVCache(LAYERS, batch, KV_HEADS, max_length, SIZE, VALUE_SIZE, **words)
    cache.key_cache.fill_(torch.nan)
    cache.value_cache.fill_(torch.nan)
    return cache


class Story:
    """A cache beside what it ought to hold: for each sequence a list of the seeds of its tokens."""

    def __init__(self, cache):
        self.cache = cache
        self.held = [[] for _ in range(cache.batch)]
        self.drawn = 0

    def token(self, seed):
        """Keys ``[layers, Hk, D]`` and values of one token."""
        return (
            random_tensor(LAYERS, KV_HEADS, size, seed=2 * seed + i, dtype=torch.float64)
            for i, size in enumerate((SIZE, VALUE_SIZE))
        )

    def new(self, batch, count):
        """Seeds of tokens that were never written, and their keys ``[layers, B, Hk, L, D]`` and values."""
        seeds = [[self.drawn + count * i + t for t in range(count)] for i in range(batch)]
        self.drawn += batch * count
        stacks = zip(*(zip(*(self.token(seed) for seed in row)) for row in seeds))
        keys, values = (torch.stack([torch.stack(row, dim=2) for row in stack], dim=1) for stack in stacks)
        return seeds, keys, values

    def append(self, count, kept=None, sequences=None):
        """A step of ``count`` tokens, of which each sequence keeps ``kept``; and what it gives is looked at."""
        chosen = range(self.cache.batch)[sequences or slice(None)]
        kept = [count] * len(chosen) if kept is None else kept
        self.cache.reserve(count, sequences)
        seeds, keys, values = self.new(len(chosen), count)
        query = random_tensor(len(chosen), HEADS, count, SIZE, seed=7, dtype=torch.float64)
        for layer in range(LAYERS):
            output = self.cache.attend(layer, query, keys[layer], values[layer], sequences=sequences)
            for i, sequence in enumerate(chosen):
                of_all = self.contents([*self.held[sequence], *seeds[i]], layer)
                expected = attention(query[i : i + 1], *of_all, upper=len(self.held[sequence])).output
                torch.testing.assert_close(output[i : i + 1], expected, rtol=0, atol=1e-13)
        self.cache.advance(kept if len(set(kept)) > 1 else kept[0], sequences)
        for i, sequence in enumerate(chosen):
            self.held[sequence] += seeds[i][: kept[i]]

    def contents(self, seeds, layer):
        """Keys ``[1, Hk, T, D]`` and values of these tokens."""
        return [torch.stack([cache[layer] for cache in one], dim=1)[None] for one in zip(*map(self.token, seeds))]

    def fork(self, parents):
        self.cache.fork(parents)
        self.held = [list(self.held[parent]) for parent in parents]
        self.held += [[] for _ in range(self.cache.batch - len(parents))]

    def truncate(self, lengths):
        self.cache.truncate(lengths)
        self.held = [seeds[:length] for seeds, length in zip(self.held, lengths)]

    def free(self, sequences):
        self.cache.free(sequences)
        for sequence in sequences:
            self.held[sequence] = []

    def check(self):
        """Lengths on both sides, every slot that is in use, and the pages that are held."""
        cache, lengths = self.cache, [len(seeds) for seeds in self.held]
        assert cache.lengths_on_host == cache.lengths.tolist() == lengths
        for sequence, seeds in enumerate(self.held):
            for slot, seed in enumerate(seeds):
                row, place = sequence, slot
                if cache.block_table is not None:
                    row, place = int(cache.block_table[sequence, slot // PAGE]), slot % PAGE
                for caches, expected in zip((cache.key_cache, cache.value_cache), self.token(seed)):
                    assert torch.equal(caches[:, row, :, place], expected)
        if cache.block_table is None:
            return
        used = [row[: -(-length // PAGE)] for row, length in zip(cache.block_table.tolist(), lengths)]
        assert cache.pages_held >= len({page for row in used for page in row})
        assert cache.pages_held + cache.pages_free == cache.pages


# -------------------------------------------------------------------------------------------------------------- stories


@BOTH
def test_cache_holds_what_was_appended(paged):
    story = Story(make(paged))
    for count in (5, 1, 3, 1):
        story.append(count)
        story.check()


@BOTH
def test_prompts_of_unequal_length_are_written_side_by_side(paged):
    """What stands behind a shorter one is written over by its next tokens."""
    story = Story(make(paged))
    story.append(6, kept=[6, 2, 0])
    story.append(1)
    story.check()
    assert story.cache.lengths_on_host == [7, 3, 1]


@BOTH
def test_new_sequence_enters_a_running_batch(paged):
    story = Story(make(paged))
    story.append(3, sequences=slice(0, 2))
    story.append(5, sequences=slice(2, 3))
    story.free([1])
    story.append(6, sequences=slice(1, 2))
    story.append(1)
    story.check()
    assert story.cache.lengths_on_host == [4, 7, 6]


@BOTH
def test_fork_is_of_all_sequences_at_once(paged):
    """They change places, and one is there twice; each goes on by itself."""
    story = Story(make(paged))
    story.append(6, kept=[6, 5, 1])
    story.fork([1, 0, 1])
    story.check()
    story.append(1)
    story.append(3)
    story.check()
    story.fork([2, 1])
    story.check()
    assert story.cache.lengths_on_host == [9, 10, 0]


@BOTH
def test_fork_reads_a_tensor_of_parents(paged):
    story = Story(make(paged))
    story.append(2, kept=[2, 1, 0])
    story.cache.fork(torch.tensor([1, 1, 0]))
    assert story.cache.lengths.tolist() == [1, 1, 2]


@BOTH
def test_truncated_sequences_go_on_from_there(paged):
    story = Story(make(paged))
    story.append(9)
    story.truncate([9, 4, 3])
    story.append(2)
    story.check()
    story.cache.truncate(6)
    assert story.cache.lengths.tolist() == [6, 6, 5]


def test_forked_pages_are_shared_until_written():
    """Two full pages are held once by all; of the third each writer but the last gets a copy."""
    story = Story(make(True))
    story.append(10, sequences=slice(0, 1))
    assert story.cache.pages_held == 3
    story.fork([0, 0, 0])
    assert story.cache.pages_held == 3
    before = story.cache.key_cache.clone()
    story.cache.reserve(1)
    assert story.cache.pages_held == 5
    changed = (story.cache.key_cache != before) & ~(story.cache.key_cache.isnan() & before.isnan())
    assert changed.any((0, 2, 3, 4)).sum() == 2, "no other page was touched"
    assert story.cache.block_table[:, :2].tolist() == [story.cache.block_table[0, :2].tolist()] * 3
    assert len(set(story.cache.block_table[:, 2].tolist())) == 3
    story.append(1)
    story.check()


def test_page_that_only_one_writes_is_copied_once():
    """The other sequence keeps what it had, and so it does where it was cut within a page."""
    story = Story(make(True))
    story.append(6, sequences=slice(0, 1))
    story.fork([0, 0])
    story.append(1, sequences=slice(1, 2))
    story.check()
    assert story.cache.pages_held == 3
    story.fork([0, 0])
    story.truncate([6, 5, 0])
    story.append(1, sequences=slice(1, 2))
    story.check()


def test_fork_at_the_end_of_a_page_copies_nothing():
    story = Story(make(True))
    story.append(8, sequences=slice(0, 1))
    story.fork([0, 0, 0])
    story.cache.reserve(1)
    assert story.cache.pages_held == 2 + 3


def test_pages_are_used_again():
    story = Story(make(True, pages=6))
    for _ in range(4):
        story.append(8)
        story.check()
        assert story.cache.pages_free == 0
        story.free([2, 0])
        assert story.cache.pages_free == 4
        story.free([1])
        assert story.cache.pages_free == 6


@pytest.mark.parametrize("seed", [0, 1, 2])
@BOTH
def test_random_operations_keep_what_they_should(paged, seed):
    """Hundreds of steps beside Python lists; when all is freed, every page is free again."""
    chance = random.Random(seed)
    batch, max_length = 4, 14
    story = Story(make(paged, batch, max_length, pages=11))
    refused = 0
    for _ in range(120):
        match chance.randrange(6):
            case 0 | 1 | 2:
                first = chance.randrange(batch)
                sequences = chance.choice([None, slice(first, chance.randint(first + 1, batch))])
                count = chance.randint(1, 4)
                chosen = range(batch)[sequences or slice(None)]
                try:
                    story.append(count, [chance.randint(0, count) for _ in chosen], sequences)
                except CacheFullError:
                    refused += 1
            case 3:
                story.fork([chance.randrange(batch) for _ in range(chance.randint(1, batch))])
            case 4:
                story.truncate([chance.randint(len(seeds) // 2, len(seeds)) for seeds in story.held])
            case 5:
                story.free(chance.sample(range(batch), chance.randint(0, 2)))
        story.check()
    assert refused > 0
    story.cache.reset()
    if paged:
        assert story.cache.pages_free == 11
        assert story.cache.pages_held == 0


# -------------------------------------------------------------------------------------------------------------- errors


def test_full_pool_says_what_it_has_and_changes_nothing():
    story = Story(make(True, pages=5))
    story.append(4)
    with pytest.raises(CacheFullError, match=r"reserve\(1\): 3 pages asked for, 3 held and 2 free") as caught:
        story.cache.reserve(1)
    assert (caught.value.asked, caught.value.held, caught.value.free) == (3, 3, 2)
    assert story.cache.pages_free == 2
    story.check()
    story.append(1, sequences=slice(0, 2))
    story.check()


def test_error_of_a_full_cache_survives_pickling():
    """A worker process hands its exceptions on by pickle."""
    error = pickle.loads(pickle.dumps(CacheFullError("full", 3, 2, 1)))
    assert (str(error), error.asked, error.held, error.free) == ("full", 3, 2, 1)


@BOTH
def test_free_reads_its_sequences_once(paged):
    story = Story(make(paged))
    story.append(2)
    story.cache.free(sequence for sequence in (0, 2))
    assert story.cache.lengths_on_host == [0, 2, 0]


def test_room_for_copies_is_asked_for_too():
    """Two of the three that share a page may write into it only with a copy each, unless the third is gone."""
    story = Story(make(True, pages=2))
    story.append(3, sequences=slice(0, 1))
    story.fork([0, 0, 0])
    for sequences in (None, slice(0, 2)):
        with pytest.raises(CacheFullError, match="2 pages asked for, 1 held and 1 free"):
            story.cache.reserve(1, sequences)
    story.check()
    story.free([2])
    story.append(1, sequences=slice(0, 2))
    story.check()


@BOTH
def test_what_was_reserved_before_a_fork_is_not_written(paged):
    """The page may be another's by then."""
    story = Story(make(paged))
    story.append(2)
    x = torch.zeros(3, KV_HEADS, 1, SIZE, dtype=torch.float64)
    for change in (lambda: story.fork([1, 1, 2]), lambda: story.truncate([1, 1, 1]), lambda: story.free([0])):
        story.cache.reserve(1)
        change()
        with pytest.raises(ValueError, match="room is reserved for 0"):
            story.cache.attend(0, x, x, x[..., :VALUE_SIZE])
    story.check()


@BOTH
def test_sequence_has_no_more_than_max_length(paged):
    cache = make(paged, max_length=6)
    cache.reserve(6)
    cache.advance([6, 1, 0])
    message = r"reserve\(1\): 1 slots asked for, 6 held and 0 free of the 6 that a sequence may have"
    with pytest.raises(CacheFullError, match=message):
        cache.reserve(1)
    cache.reserve(5, slice(1, 3))


@BOTH
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda cache, x: cache.attend(2, x), ValueError, "layer=2: expected a layer from 0 to 1"),
        (lambda cache, x: cache.attend(0.0, x), TypeError, "layer=0.0: expected an int, got float"),
        (lambda cache, x: cache.attend(0, x[:2]), ValueError, r"query has shape \(2, 4, 1, 8\): expected \[3, heads"),
        (lambda cache, x: cache.attend(0, x.tolist()), TypeError, "query: expected a torch.Tensor, got list"),
        (lambda cache, x: cache.attend(0, x, x, x), ValueError, r"room is reserved for 0: call reserve\(1\) first"),
        (lambda cache, x: cache.attend(0, x, sequences=slice(0, 4)), ValueError, "neighbours among the 3 sequences"),
        (lambda cache, x: cache.attend(0, x, sequences=[0]), TypeError, "expected a slice or None, got list"),
        (lambda cache, x: cache.reserve(-1), ValueError, "tokens=-1: expected a number of at least 0"),
        (lambda cache, x: cache.reserve(1.5), TypeError, "tokens=1.5: expected an int"),
        (lambda cache, x: cache.reserve(1, slice(0, 3, 2)), ValueError, "expected neighbours"),
        (lambda cache, x: cache.reserve(1, slice(5, None)), ValueError, "expected neighbours"),
        (
            lambda cache, x: cache.advance(1),
            ValueError,
            r"tokens\[0\]=1: expected what room is reserved for",
        ),
        (lambda cache, x: cache.advance(0.5), TypeError, r"tokens\[0\]=0.5: expected an int, got float"),
        (lambda cache, x: cache.truncate([0.5, 0, 0]), TypeError, r"lengths\[0\]=0.5: expected an int"),
        (lambda cache, x: cache.advance([0, 0]), ValueError, "tokens: 2 numbers, expected 3, one for each sequence"),
        (lambda cache, x: cache.fork([0, 0, 0, 0]), ValueError, "parents: 4 of them, expected at most 3"),
        (lambda cache, x: cache.fork([0, 3]), ValueError, "parents=3: expected sequences from 0 to 2"),
        (lambda cache, x: cache.truncate([3, 0, 0]), ValueError, r"lengths\[0\]=3: expected a length from 0 to 2"),
        (lambda cache, x: cache.truncate(-1), ValueError, "lengths=-1: expected a number of at least 0"),
        (lambda cache, x: cache.free([-1]), ValueError, "sequences=-1: expected sequences from 0 to 2"),
    ],
)
def test_cache_refuses_and_changes_nothing(paged, call, error, message):
    story = Story(make(paged))
    story.append(2)
    with pytest.raises(error, match=message):
        call(story.cache, torch.zeros(3, HEADS, 1, SIZE, dtype=torch.float64))
    story.check()


@pytest.mark.parametrize(
    ("construct", "error", "message"),
    [
        (lambda: KVCache(0, 1, 1, 4, 8), ValueError, "layers=0"),
        (lambda: KVCache(1, 1, 1, 4, cast(int, 8.0)), TypeError, "head_dim=8.0"),
        (lambda: KVCache(1, 1, 1, 4, 8, rotary_cos=torch.zeros(4, 2)), ValueError, "expected both or neither"),
        (
            lambda: KVCache(1, 1, 1, 4, 8, rotary_cos=torch.zeros(3, 2), rotary_sin=torch.zeros(3, 2)),
            ValueError,
            r"rotary_cos has shape \(3, 2\): expected \[at least 4, at most 4\]",
        ),
        (
            lambda: KVCache(1, 1, 1, 4, 8, rotary_cos=torch.zeros(4, 5), rotary_sin=torch.zeros(4, 5)),
            ValueError,
            r"rotary_cos has shape \(4, 5\): expected \[at least 4, at most 4\]",
        ),
        (
            lambda: KVCache(1, 1, 1, 4, 8, rotary_cos=cast(Any, [1.0]), rotary_sin=cast(Any, [0.0])),
            TypeError,
            "rotary_cos: expected a torch.Tensor or None, got list",
        ),
        (lambda: PagedKVCache(1, 1, 1, 0, 8), ValueError, "pages=0"),
        (lambda: PagedKVCache(1, 1, 1, 4, 8, page_size=0), ValueError, "page_size=0"),
    ],
)
def test_cache_of_impossible_size_is_refused(construct, error, message):
    with pytest.raises(error, match=message):
        construct()


# ------------------------------------------------------------------------------------------------ what a graph captures


@BOTH
def test_what_a_kernel_reads_never_moves(paged):
    """A CUDA graph holds addresses: everything is changed in place, and the table has its width from the start."""
    story = Story(make(paged))

    def addresses():
        tensors = (story.cache.key_cache, story.cache.value_cache, story.cache.lengths, story.cache.block_table)
        return [tensor.data_ptr() for tensor in tensors if tensor is not None]

    before = addresses()
    story.append(5)
    story.fork([1, 1, 0])
    story.append(1)
    story.truncate([4, 3, 2])
    story.free([0])
    story.cache.reset()
    assert addresses() == before


@BOTH
def test_cache_turns_keys_by_its_tables(paged):
    """Where they stand; a query by where it stands; and other words reach the call."""
    angles = random_tensor(16, 3, seed=3, dtype=torch.float64)
    cache = make(paged, rotary_cos=angles.cos(), rotary_sin=angles.sin(), rotary_interleaved=True)
    x = {size: random_tensor(3, KV_HEADS, 5, size, seed=size, dtype=torch.float64) for size in (SIZE, VALUE_SIZE)}
    for part in (slice(0, 3), slice(3, 5)):
        keys, values = x[SIZE][:, :, part], x[VALUE_SIZE][:, :, part]
        cache.reserve(keys.shape[2])
        last = cache.attend(1, keys, keys, values, window=(1, 0), scale=0.3)
        cache.advance(keys.shape[2])
    turned = rotate(x[SIZE], angles[:5].cos(), angles[:5].sin(), interleaved=True)
    whole = attention(turned, turned, x[VALUE_SIZE], lower=-1, upper=0, scale=0.3).output
    torch.testing.assert_close(last, whole[:, :, 3:], rtol=0, atol=1e-13)


@BOTH
@pytest.mark.parametrize("sequences", [None, slice(1, 3)])
def test_cache_is_attended_to_in_a_compiled_graph(paged, sequences):
    """Without a break, and steps are not compiled one by one: lengths are no part of the graph."""
    cache, counter = make(paged), CompileCounter()
    attend = torch.compile(
        lambda x: cache.attend(0, x, x, x[..., :VALUE_SIZE], sequences=sequences), backend=counter, fullgraph=True
    )
    batch = len(range(3)[sequences or slice(None)])
    x = random_tensor(batch, KV_HEADS, 5, SIZE, seed=3, dtype=torch.float64)
    found = []
    for token in x.split(1, dim=2):
        cache.reserve(1, sequences)
        found.append(attend(token))
        cache.advance(1, sequences)
    expected = attention(x, x, x[..., :VALUE_SIZE], upper=0).output
    torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=0, atol=1e-13)
    assert counter.frame_count == 1


def test_cache_says_how_full_it_is():
    contiguous, paged = (Story(make(kind)) for kind in (False, True))
    for story in (contiguous, paged):
        story.append(5)
    assert repr(contiguous.cache) == "KVCache(layers=2, batch=3, kv_heads=2, head_dim=8, 15 of 48 slots held)"
    assert repr(paged.cache).endswith("head_dim=8, 6 of 12 pages of 4 tokens held)")


@pytest.mark.parametrize("cache", [KVCache, PagedKVCache])
def test_cache_of_a_dtype_that_attention_does_not_take_is_refused(cache):
    with pytest.raises(TypeError, match=r"dtype=torch.int32: expected float16, bfloat16, float32 or float64"):
        cache(1, 1, 1, 4, 8, dtype=torch.int32)
