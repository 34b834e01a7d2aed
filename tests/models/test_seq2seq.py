"""Sequence to sequence with recurrent networks: the formula, padding, learning, decoding, both backends."""

import itertools

import pytest
import torch
from torch import nn

import fastattn
from fastattn.models import AttentionDecoder, Memory, Seq2Seq
from fastattn.testing import assert_within_budget

SOURCE, VOCABULARY, START, END = 9, 7, 0, 1
ATTENTION = pytest.mark.parametrize("attention_dim", [None, 5], ids=["without", "attention"])


def tokens(*shape, vocabulary=VOCABULARY, seed=0):
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def seq2seq(attention_dim, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    model = Seq2Seq(SOURCE, VOCABULARY, hidden=8, embedding=6, attention_dim=attention_dim).to(dtype)
    with torch.no_grad():  # as a trained one: far from the same word at every step
        for parameter in (model.decoder.head.weight, model.decoder.cell.weight_ih, model.decoder.cell.weight_hh):
            parameter.mul_(4)
    return model


def source_and_padding():
    return tokens(3, 7, vocabulary=SOURCE, seed=5), torch.arange(7) >= torch.tensor([[7], [4], [1]])


# --------------------------------------------------------------------------------------------------- the formula


@ATTENTION
def test_shapes_and_weights(attention_dim):
    model, (source, padding) = seq2seq(attention_dim), source_and_padding()
    logits, weights = model(source, tokens(3, 5), padding, need_weights=True)
    assert logits.shape == (3, 5, VOCABULARY)
    assert model(source, tokens(3, 5), padding)[1] is None
    if attention_dim is None:
        assert weights is None
        return
    assert weights.shape == (3, 5, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5, dtype=torch.float64), rtol=0, atol=1e-13)
    assert not weights[padding[:, None].expand_as(weights)].any()
    assert not torch.isclose(weights[0, 1:], weights[0, :-1]).all(-1).any(), "each step looks elsewhere"


@ATTENTION
def test_model_is_the_lectures(attention_dim):
    """Once more, step by step, in the lecture's symbols."""
    model, source, target = seq2seq(attention_dim), tokens(1, 6, vocabulary=SOURCE), tokens(1, 4)
    decoder, attention = model.decoder, model.decoder.attention
    cell = nn.GRUCell(6, 8).double()
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in model.encoder.state_dict().items()})
    h = [torch.zeros(8, dtype=torch.float64)]
    for x in model.embedding(source[0]):
        h.append(cell(x, h[-1]))
    s, h = torch.tanh(decoder.first_state(h[-1])), torch.stack(h[1:])
    for t in range(4):
        c, a = h[-1], None
        if attention is not None:
            e = torch.tanh(attention.query_projection(s) + attention.key_projection(h)) @ attention.weight
            a = e.softmax(0)
            c = a @ h
        s = decoder.cell(torch.cat((decoder.embedding(target[0, t]), c)), s)
        logits, weights = model(source, target, need_weights=True)
        torch.testing.assert_close(logits[0, t], decoder.head(s), rtol=0, atol=1e-12)
        if a is not None:
            torch.testing.assert_close(weights[0, t], a, rtol=0, atol=1e-12)


@ATTENTION
def test_gradients_reach_every_parameter(attention_dim):
    model, (source, padding) = seq2seq(attention_dim), source_and_padding()
    model.loss(source, tokens(3, 6), padding).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-12, name


@ATTENTION
def test_loss_is_of_every_token_behind_the_first(attention_dim):
    model, source, target = seq2seq(attention_dim), tokens(2, 6, vocabulary=SOURCE), tokens(2, 5)
    logs = model(source, target)[0].log_softmax(-1)
    expected = -torch.stack([logs[n, t, target[n, t + 1]] for n in range(2) for t in range(4)]).mean()
    torch.testing.assert_close(model.loss(source, target), expected)


@ATTENTION
def test_decoder_sees_no_later_token(attention_dim):
    model, source, target = seq2seq(attention_dim), tokens(2, 6, vocabulary=SOURCE), tokens(2, 6)
    changed = target.clone()
    changed[:, 3:] = (changed[:, 3:] + 1) % VOCABULARY
    one, other = model(source, target)[0], model(source, changed)[0]
    assert torch.equal(one[:, :3], other[:, :3])
    assert not torch.isclose(one[:, 3:], other[:, 3:]).all(-1).any()


def test_only_attention_reads_the_vectors():
    """Without it the summary is everything that passes from one network to the other."""
    torch.manual_seed(2)
    vectors, summary = torch.randn(2, 2, 5, 4).double(), torch.randn(2, 4).double()
    for attention_dim in (None, 3):
        decoder = AttentionDecoder(VOCABULARY, 4, hidden=8, embedding=6, attention_dim=attention_dim).double()
        one, other = (decoder(tokens(2, 3), Memory(these, summary))[0] for these in vectors)
        assert torch.equal(one, other) == (attention_dim is None)


# -------------------------------------------------------------------------------------------------------------- padding


@ATTENTION
def test_padding_changes_nothing(attention_dim):
    """Whatever stands in it, and however long it is; in the loss, and in what is said, by a beam too."""
    model, (source, padding), target = seq2seq(attention_dim), source_and_padding(), tokens(3, 5)
    other = torch.where(padding, (source + 2) % SOURCE, source)
    logits = model(source, target, padding)[0]
    assert torch.equal(model(other, target, padding)[0], logits)
    together = model.generate(source, 5, start=START, source_padding=padding, beam=3)
    for row, length in enumerate((7, 4, 1)):
        one = slice(row, row + 1)
        alone = model(source[one, :length], target[one])[0]
        torch.testing.assert_close(logits[one], alone, rtol=0, atol=1e-13)
        assert torch.equal(model.generate(source[one, :length], 5, start=START, beam=3).tokens[0], together.tokens[row])

    hidden = torch.arange(5) >= torch.tensor([[3], [3], [3]])
    lost = model.loss(source, torch.where(hidden, (target + 1) % VOCABULARY, target), padding, hidden)
    torch.testing.assert_close(lost, model.loss(source, target[:, :3], padding), rtol=0, atol=1e-13)


def test_padding_before_a_token_is_refused():
    model, source = seq2seq(5), tokens(2, 4, vocabulary=SOURCE)
    for row, message in (([True, False, False, False], "begins with padding"), ([False, True, False, True], "behind")):
        with pytest.raises(ValueError, match=message):
            model.encode(source, torch.tensor([row, [False] * 4]))


# ------------------------------------------------------------------------------------------------------------- learning


@ATTENTION
def test_model_learns_to_reverse_a_few(attention_dim):
    model, source = seq2seq(attention_dim, dtype=torch.float32), tokens(3, 4, vocabulary=5, seed=8)
    target = torch.cat((torch.full((3, 1), START), source.flip(1) + 2, torch.full((3, 1), END)), dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(80):
        optimizer.zero_grad()
        loss = model.loss(source, target)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    for beam in (1, 3):
        said = model.generate(source, 9, start=START, end=END, beam=beam)
        assert torch.equal(said.tokens, target), "and ends where it should"
        assert said.log_probability.exp().min() > 0.7


# ------------------------------------------------------------------------------------------------------------- decoding


@ATTENTION
def test_greedy_decoding_is_the_likeliest_token_each_time(attention_dim):
    model, (source, padding) = seq2seq(attention_dim), source_and_padding()
    expected = torch.full((3, 1), START)
    for _ in range(6):
        logits, weights = model(source, expected, padding, need_weights=True)
        expected = torch.cat((expected, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
    said = model.generate(source, 6, start=START, source_padding=padding, need_weights=True)
    assert torch.equal(said.tokens, expected)
    assert (expected[:, 2:] != expected[:, 1:-1]).any(), "to say the same each time takes no look at what was said"
    if weights is None:
        assert said.weights is None
    else:
        torch.testing.assert_close(said.weights, weights, rtol=0, atol=1e-13)
    assert model.generate(source, 6, start=START).weights is None


def _log_probability(model, source, said, padding=None):
    logs = model(source, said[:, :-1], padding)[0].log_softmax(-1)
    return logs.gather(2, said[:, 1:, None]).sum((1, 2))


@ATTENTION
@pytest.mark.parametrize("end", [None, END])
def test_wide_beam_finds_the_likeliest_of_all(attention_dim, end):
    """Of all sequences of four tokens, or of those that end sooner, tried one by one."""
    model, source = seq2seq(attention_dim), tokens(1, 5, vocabulary=SOURCE, seed=3)
    every = torch.tensor([[START, *rest] for rest in itertools.product(range(VOCABULARY), repeat=4)])
    logs = model(source.expand(len(every), -1), every[:, :-1])[0].log_softmax(-1).gather(2, every[:, 1:, None])[..., 0]
    if end is not None:  # behind an end nothing is said but the end again, and that costs nothing
        ended = (every[:, 1:] == end).cumsum(1) - (every[:, 1:] == end).long() > 0
        ended_well = ~(ended & (every[:, 1:] != end)).any(1)
        every, logs = every[ended_well], logs.masked_fill(ended, 0.0)[ended_well]
    best = logs.sum(1).argmax()
    said = model.generate(source, 4, start=START, end=end, beam=VOCABULARY**4)
    assert said.tokens[0].tolist() == every[best, : said.tokens.shape[1]].tolist()
    torch.testing.assert_close(said.log_probability[0], logs.sum(1)[best], rtol=0, atol=1e-12)


def test_beam_finds_what_greedy_decoding_misses():
    """And never, here, anything less likely; what it says it is worth is what teacher forcing says."""
    model, source = seq2seq(5), tokens(40, 5, vocabulary=SOURCE, seed=4)
    greedy, beam = (model.generate(source, 5, start=START, beam=k, need_weights=True) for k in (1, 6))
    for said in (greedy, beam):
        torch.testing.assert_close(
            said.log_probability, _log_probability(model, source, said.tokens), rtol=0, atol=1e-12
        )
        forced = model(source, said.tokens[:, :-1], need_weights=True)[1]
        torch.testing.assert_close(said.weights, forced, rtol=0, atol=1e-13)
    better = beam.log_probability - greedy.log_probability
    assert better.min() > -1e-12
    assert better.max() > 0.01


@ATTENTION
@pytest.mark.parametrize("beam", [1, 3])
def test_decoding_repeats_whatever_the_seed(attention_dim, beam):
    model, source = seq2seq(attention_dim), tokens(5, 6, vocabulary=SOURCE)
    torch.manual_seed(1)
    first = model.generate(source, 6, start=START, end=END, beam=beam)
    torch.manual_seed(2)
    again = model.generate(source, 6, start=START, end=END, beam=beam)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.log_probability, again.log_probability)


def test_decoding_ends():
    """Each sequence at its own end, nothing but the end behind it, and no step more than the longest takes."""
    model, source = seq2seq(5), tokens(6, 6, vocabulary=SOURCE)
    free = model.generate(source, 8, start=START).tokens
    end = int(free[0, 3])
    ended = model.generate(source, 8, start=START, end=end).tokens
    for row, whole in zip(ended.tolist(), free.tolist()):
        stop = whole.index(end, 1) + 1 if end in whole[1:] else len(whole)
        assert row == (whole[:stop] + [end] * len(whole))[: len(row)]
    alone = model.generate(source[:1], 8, start=START, end=end).tokens
    assert alone[0].tolist() == free[0, : free[0].tolist().index(end, 1) + 1].tolist()
    assert model.generate(source, 0, start=START).tokens.tolist() == [[START]] * 6


def test_decoding_refuses():
    model, source = seq2seq(5), tokens(2, 4, vocabulary=SOURCE)
    with pytest.raises(ValueError, match="length=-1"):
        model.generate(source, -1, start=START)
    with pytest.raises(ValueError, match="beam=0"):
        model.generate(source, 3, start=START, beam=0)


# -------------------------------------------------------------------------------------------------------------- kernels


def test_training_step_on_kernels_matches_torch():
    """The loss and every gradient; what the kernels may lose is what eager torch loses, twice."""
    pytest.importorskip("triton", reason="triton is not installed")
    source, padding = source_and_padding()

    def step(backend, dtype):
        model = seq2seq(5, torch.float32).to(dtype)
        with fastattn.use_backend(backend):
            loss = model.loss(source, tokens(3, 4), padding)
            loss.backward()
        return loss.detach()[None], torch.cat(
            [torch.as_tensor(parameter.grad).flatten() for parameter in model.parameters()]
        )

    actual, peer, truth = step("triton", torch.float32), step("torch", torch.float32), step("torch", torch.float64)
    for name, ours, theirs, exact in zip(("loss", "gradients"), actual, peer, truth):
        # Sums of some ten terms in another order, through three steps and back
        allowance = 30 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert_within_budget(ours, truth=exact, peer=theirs, name=name, allowance=allowance)


def test_decoding_on_kernels_says_the_same():
    pytest.importorskip("triton", reason="triton is not installed")
    model, (source, padding) = seq2seq(5, torch.float32), source_and_padding()
    arguments = {"start": START, "source_padding": padding, "beam": 2, "need_weights": True}
    expected = model.generate(source, 3, **arguments)
    with fastattn.use_backend("triton"):
        said = model.generate(source, 3, **arguments)
    assert torch.equal(said.tokens, expected.tokens)
    torch.testing.assert_close(said.weights, expected.weights)
