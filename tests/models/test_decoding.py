"""Decoding by a cache: steps, and greedy, sampled and beam generation, beside the whole sequence each time."""

import itertools
from typing import Any

import pytest
import torch

import fastattn
from fastattn import CacheFullError, KVCache
from fastattn.models._beam import Beams
from fastattn.models.transformer import TransformerTrunk
from fastattn.testing import assert_within_budget
from tests.models.transformer_cases import (
    LENGTH,
    VOCABULARY,
    encoder_decoder,
    language_model,
    source_and_padding,
    tokens,
)

NORMS = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
PAGE_SIZES = pytest.mark.parametrize("page_size", [None, 2, 4], ids=["contiguous", "pages-of-2", "pages-of-4"])
KINDS = pytest.mark.parametrize("kind", ["language_model", "encoder_decoder"])


# --------------------------------------------------------------------------------------------------------------- steps


@NORMS
@pytest.mark.parametrize("parts", [[1] * LENGTH, [5, 1, 1, 5], [LENGTH]], ids=str)
def test_steps_of_a_language_model_are_the_whole_sequence(norm_first, parts):
    model, x = language_model(norm_first), tokens(3, LENGTH)
    cache = model.trunk.new_cache(len(x))
    stepwise = torch.cat([model.head(model.trunk.step(part, cache)) for part in x.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(stepwise, model(x), rtol=0, atol=1e-13)


@NORMS
@pytest.mark.parametrize("parts", [[1] * LENGTH, [5, 1, 1, 5]], ids=str)
def test_steps_of_a_decoder_are_the_whole_sequence(norm_first, parts):
    model, x, (source, padding) = encoder_decoder(norm_first), tokens(3, LENGTH), source_and_padding()
    cache = model.decoder.new_cache(len(x), model.encoder(source, padding), padding)
    stepwise = torch.cat([model.head(model.decoder.step(part, cache)) for part in x.split(parts, dim=1)], dim=1)
    torch.testing.assert_close(stepwise, model(source, x, padding), rtol=0, atol=1e-13)


@NORMS
def test_steps_lose_no_more_than_the_whole_sequence(norm_first):
    """In float32, against float64."""
    x, one, two = tokens(3, LENGTH), language_model(norm_first), language_model(norm_first, dtype=torch.float32)
    cache = two.trunk.new_cache(len(x))
    with torch.no_grad():
        stepwise = torch.cat([two.head(two.trunk.step(part, cache)) for part in x.split(1, dim=1)], dim=1)
        assert_within_budget(stepwise, truth=one(x), peer=two(x), name="logits")


def test_steps_take_every_parameter_from_the_layers():
    """No copies: what is changed between two steps is what the next one computes with."""
    model, x = language_model(), tokens(2, 4)
    cache = model.trunk.new_cache(len(x))
    model.trunk.step(x[:, :3], cache)
    with torch.no_grad():
        for parameter in model.trunk.layers.parameters():
            parameter.zero_()
    last = model.trunk.step(x[:, 3:], cache)
    assert not last.any(), "a post-norm block whose last norm has no weight and no bias gives zero"


def test_steps_look_at_the_new_tokens_alone(monkeypatch):
    """The point of the cache: each step embeds, projects and feeds forward one token, not all so far."""
    model, seen = language_model(), []
    model.trunk.layers[0].linear1.register_forward_hook(lambda module, arguments, output: seen.append(output.shape[1]))
    model.generate(tokens(2, 3), 4)
    assert seen == [3, 1, 1, 1]


def test_step_beyond_the_cache_changes_nothing():
    model, x = language_model(), tokens(1, 4)
    cache = model.trunk.new_cache(1, max_length=3)
    with pytest.raises(CacheFullError, match="4 slots asked for, 0 held and 3 free"):
        model.trunk.step(x, cache)
    assert cache.length == 0
    torch.testing.assert_close(model.trunk.step(x[:, :3], cache), model.trunk(x[:, :3]), rtol=0, atol=1e-13)


def test_step_of_sequences_that_have_no_memory_is_refused():
    model, (source, padding) = encoder_decoder(), source_and_padding()
    cache = model.decoder.new_cache(6, model.encoder(source, padding), padding)
    with pytest.raises(ValueError, match=r"tokens has shape \(4, 1\): expected a multiple of the memory's 3"):
        model.decoder.step(tokens(4, 1), cache)


def test_steps_take_the_backend_of_their_layer(monkeypatch):
    model, asked = language_model(), []
    attend = KVCache.attend

    def record(self, *arguments, **words):
        asked.append(words["backend"])
        return attend(self, *arguments, **words)

    monkeypatch.setattr(KVCache, "attend", record)
    model.trunk.layers[1].self_attn.backend = "torch"
    model.generate(tokens(2, 3), 1)
    assert asked == [None, "torch"]


# ----------------------------------------------------------------------------------------------------------- generation


class Speaker:
    """A model, what it goes on from, and how it is asked; beside it the logits without a cache."""

    def __init__(self, kind: str):
        self.is_language_model = kind == "language_model"
        # Drawn so that each sequence says many tokens, and that a beam finds what greedy decoding misses
        self.model: Any = language_model() if self.is_language_model else encoder_decoder(seed=19)
        with torch.no_grad():
            self.model.head.weight.mul_(2)
        self.source, self.padding = source_and_padding()
        self.prompt = tokens(3, 3) if self.is_language_model else torch.full((3, 1), 2)
        self.length = 7

    def logits(self, said: torch.Tensor, sequence: int | None = None) -> torch.Tensor:
        """Of what comes behind each token, whole sequences at once; of all sequences, or of several of one."""
        if self.is_language_model:
            return self.model(said)
        source, padding = self.source, self.padding
        if sequence is not None:
            rows = torch.full((len(said),), sequence)
            source, padding = source[rows], padding[rows]
        return self.model(source, said, padding)

    def generate(self, length: int | None = None, **options: Any) -> torch.Tensor:
        length = self.length if length is None else length
        if self.is_language_model:
            return self.model.generate(self.prompt, length, **options)
        return self.model.generate(self.source, length, start=2, source_padding=self.padding, **options)


def uncached(speaker: Speaker, temperature: float, seed: int, end: int | None) -> torch.Tensor:
    """What is said one token after the other, each computed from the whole sequence."""
    generator, said = torch.Generator().manual_seed(seed), speaker.prompt
    for _ in range(speaker.length):
        logits = speaker.logits(said)[:, -1]
        if temperature:
            new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        else:
            new = logits.argmax(-1, keepdim=True)
        if end is not None:
            over = (said[:, speaker.prompt.shape[1] :] == end).any(1, keepdim=True)
            if over.all():
                break
            new = torch.where(over, end, new)
        said = torch.cat((said, new), dim=1)
    return said


def uncached_beam(speaker: Speaker, beam: int, end: int | None) -> list[list[int]]:
    """A beam search over lists, one sequence after the other, to the full length."""
    found, given = [], speaker.prompt.shape[1]
    for sequence, prompt in enumerate(speaker.prompt.tolist()):
        kept = [(0.0, prompt)]
        for _ in range(speaker.length):
            logs = speaker.logits(torch.tensor([said for _, said in kept]), sequence)[:, -1].log_softmax(-1).tolist()
            tried = []
            for (score, said), row in zip(kept, logs):
                if end is not None and end in said[given:]:
                    tried.append((score, [*said, end]))
                else:
                    tried += [(score + log, [*said, token]) for token, log in enumerate(row)]
            kept = sorted(tried, reverse=True)[:beam]
        found.append(kept[0][1])
    return found


def common_token(said: torch.Tensor, given: int) -> int:
    """A token that one sequence said in the middle, so that it may be another's end."""
    return int(said[0, given + 2])


@KINDS
@PAGE_SIZES
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_generation_is_that_of_the_whole_sequence(kind, page_size, temperature):
    """Token by token, of unequal sequences that cross pages; and where they end."""
    speaker = Speaker(kind)
    free = uncached(speaker, temperature, 3, None)
    options: dict[str, Any] = {"temperature": temperature, "seed": 3, "page_size": page_size}
    assert torch.equal(speaker.generate(**options), free)
    assert (free[:, 4:] != free[:, 3:-1]).any(), "to say the same each time takes no look at what was said"
    end = common_token(free, speaker.prompt.shape[1])
    assert torch.equal(speaker.generate(**options, end=end), uncached(speaker, temperature, 3, end))


@KINDS
@PAGE_SIZES
@pytest.mark.parametrize("beam", [2, 5])
def test_beam_search_is_that_of_the_whole_sequence(kind, page_size, beam):
    """And finds something else than greedy decoding. Where all end sooner nothing is said any more."""
    speaker = Speaker(kind)
    free = speaker.generate(beam=beam, page_size=page_size)
    assert free.tolist() == uncached_beam(speaker, beam, None)
    assert not torch.equal(free, speaker.generate())
    end = common_token(free, speaker.prompt.shape[1])
    said, expected = speaker.generate(beam=beam, page_size=page_size, end=end), uncached_beam(speaker, beam, end)
    assert said.tolist() == [row[: said.shape[1]] for row in expected]
    assert all(set(row[said.shape[1] :]) <= {end} for row in expected)


@KINDS
@pytest.mark.parametrize("page_size", [None, 2])
@pytest.mark.parametrize("end", [None, 1])
def test_wide_beam_finds_the_likeliest_of_all(kind, page_size, end):
    """Of all continuations by three tokens, or of those that end sooner, tried one by one."""
    speaker, length = Speaker(kind), 3
    said = speaker.generate(length, beam=VOCABULARY ** (length - 1), end=end, page_size=page_size)
    every = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=length)))
    for sequence, prompt in enumerate(speaker.prompt):
        whole = torch.cat((prompt.expand(len(every), -1), every), dim=1)
        with torch.no_grad():
            logs = speaker.logits(whole[:, :-1], sequence)[:, -length:].log_softmax(-1)
        logs = logs.gather(2, every[..., None])[..., 0]
        allowed = torch.ones(len(every), dtype=torch.bool)
        if end is not None:  # behind an end nothing is said but the end again, and that costs nothing
            ended = (every == end).cumsum(1) - (every == end).long() > 0
            allowed, logs = ~(ended & (every != end)).any(1), logs.masked_fill(ended, 0.0)
        best = whole[logs.sum(1).masked_fill(~allowed, -torch.inf).argmax()]
        assert said[sequence].tolist() == best[: said.shape[1]].tolist()


def caches_of(monkeypatch) -> list[Any]:
    """The caches that models make from here on."""
    made, new_cache = [], TransformerTrunk.new_cache

    def record(*arguments, **words):
        made.append(new_cache(*arguments, **words))
        return made[-1]

    monkeypatch.setattr(TransformerTrunk, "new_cache", record)
    return made


def test_beams_share_the_pages_of_their_prompt(monkeypatch):
    """Of 3 sequences with 4 beginnings each: at first the 4 full pages of a prompt of 8 and one page for each
    beginning; where nothing is shared it would be five for each."""
    made, held = caches_of(monkeypatch), []
    model = language_model()
    hook = model.trunk.layers[1].linear1.register_forward_hook(lambda *_: held.append(made[-1].kv.pages_held))
    said = model.generate(tokens(3, 8), 3, beam=4, page_size=2)
    hook.remove()
    assert held == [3 * 4, 3 * (4 + 4), 3 * (4 + 4)]
    assert made[-1].kv.pages == 3 * (4 + 4)
    assert torch.equal(said, model.generate(tokens(3, 8), 3, beam=4))


def test_beams_read_one_memory(monkeypatch):
    """Keys and values of what the encoder found are there once, however many beginnings read them."""
    made, (source, padding) = caches_of(monkeypatch), source_and_padding()
    encoder_decoder().generate(source, 3, start=0, source_padding=padding, beam=4)
    assert made[-1].kv.batch == 12
    assert [part.shape for part in made[-1].memory[0]] == [(3, 4, 7, 4)] * 2


@PAGE_SIZES
@pytest.mark.parametrize("beam", [1, 3])
def test_empty_batch_says_nothing(page_size, beam):
    options = {"beam": beam, "page_size": page_size}
    assert language_model().generate(tokens(0, 3), 2, **options).shape[0] == 0
    assert encoder_decoder().generate(tokens(0, 3), 2, start=0, **options).shape[0] == 0


@NORMS
def test_greedy_generation_is_the_likeliest_token_each_time(norm_first):
    model, x = language_model(norm_first), tokens(3, 2)
    expected = x
    for _ in range(6):
        expected = torch.cat((expected, model(expected)[:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(model.generate(x, 6), expected)
    assert model.generate(x, 0) is x


def test_sampled_generation_depends_on_its_seed_alone():
    model, x = language_model(), tokens(4, 2)
    torch.manual_seed(1)
    first = model.generate(x, 8, temperature=1.0, seed=3)
    torch.manual_seed(2)
    assert torch.equal(model.generate(x, 8, temperature=1.0, seed=3), first)
    assert not torch.equal(model.generate(x, 8, temperature=1.0, seed=4), first)
    assert torch.equal(model.generate(x, 8, temperature=1e-6, seed=4), model.generate(x, 8))


def test_sampled_generation_draws_from_the_softmax():
    """Of four thousand first tokens as many as the logits say, at a temperature that sharpens them."""
    model, x = language_model(), tokens(1, 3).expand(4000, 3)
    drawn = model.generate(x, 1, temperature=0.5, seed=0)[:, -1]
    expected = (model(x[:1])[0, -1] / 0.5).softmax(-1)
    found = torch.bincount(drawn, minlength=VOCABULARY) / 4000
    assert (found - expected).abs().max() < 5 * (0.25 / 4000) ** 0.5  # five deviations of the widest


@pytest.mark.parametrize("choice", [{}, {"temperature": 1.0, "seed": 0}, {"beam": 2}, {"end": 0}], ids=str)
def test_generation_is_of_the_prompts_integers(choice):
    model, x = language_model(), tokens(2, 3)
    said = model.generate(x.int(), 4, **choice)
    assert said.dtype == torch.int32 and torch.equal(said, model.generate(x, 4, **choice).int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_beam_search_adds_up_what_its_logits_say(dtype):
    """Of logits with 16 bits no probability is rounded to 16 bits."""
    beams, logits = Beams(tokens(1, 1), 3), (3 * torch.randn(4, 1, VOCABULARY)).to(dtype)
    expected = torch.zeros(1, dtype=torch.float64)
    for one in logits:
        origin = beams.extend(one.expand(1, beams.last.shape[1], VOCABULARY))
        said = beams.tokens[0, :, -1]
        expected = expected[origin[0]] + one[0].double().log_softmax(-1)[said]
    torch.testing.assert_close(beams.log_probability[0].double(), expected, rtol=0, atol=1e-5)


def test_generation_ends():
    """Each sequence at its own end; nothing but the end behind it; and no step more than the longest takes."""
    model, x = language_model(), tokens(5, 2)
    free = model.generate(x, 8, temperature=1.0, seed=0)
    end = int(free[0, 4])
    ended = model.generate(x, 8, temperature=1.0, seed=0, end=end)
    for row, whole in zip(ended.tolist(), free.tolist()):
        stop = whole.index(end, 2) + 1 if end in whole[2:] else len(whole)
        assert row == (whole[:stop] + [end] * len(whole))[: len(row)]
    alone = model.generate(x[:1], 8, temperature=0.0, end=int(model.generate(x[:1], 1)[0, -1]))
    assert alone.shape == (1, 3)


def test_encoder_decoder_generates_with_padding_as_without():
    model, (source, padding) = encoder_decoder(), source_and_padding()
    together = model.generate(source, 6, start=0, source_padding=padding)
    assert together.shape == (3, 7)
    for row, length in enumerate((7, 4, 1)):
        assert torch.equal(model.generate(source[row : row + 1, :length], 6, start=0)[0], together[row])
    drawn = [model.generate(source, 6, start=0, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# -------------------------------------------------------------------------------------------------------------- kernels


def test_decoding_on_kernels_says_the_same():
    pytest.importorskip("triton", reason="triton is not installed")
    model, x = language_model(dtype=torch.float32), tokens(2, 3)
    expected = model.generate(x, 2)
    with fastattn.use_backend("triton"):
        assert torch.equal(model.generate(x, 2), expected)


def test_encoder_decoder_on_kernels_says_the_same():
    """By the cache: of the tokens said, and of the memory's keys and values under its padding."""
    pytest.importorskip("triton", reason="triton is not installed")
    model, (source, padding) = encoder_decoder(dtype=torch.float32, layers=1), source_and_padding()
    x, expected = tokens(3, 3), model.generate(source, 2, start=0, source_padding=padding)

    def steps():
        cache = model.decoder.new_cache(len(x), model.encoder(source, padding), padding)
        return torch.cat([model.head(model.decoder.step(part, cache)) for part in x.split([2, 1], dim=1)], dim=1)

    of_torch = steps()
    with fastattn.use_backend("triton"), torch.no_grad():
        assert torch.equal(model.generate(source, 2, start=0, source_padding=padding), expected)
        # Sums of some 50 terms in another order, through two blocks and a head
        allowance = 100 * torch.finfo(torch.float32).eps * of_torch.abs().max().item()
        torch.testing.assert_close(steps(), of_torch, rtol=0, atol=allowance)
