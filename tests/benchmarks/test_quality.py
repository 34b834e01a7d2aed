"""The quality benchmark: its tasks ask what they say, its models are what they claim, training repeats."""

import dataclasses
import json

import pytest
import torch

import fastattn
from benchmarks.quality import tasks
from benchmarks.quality.models import WIDTH, deviations, models
from benchmarks.quality.tasks import IGNORED
from benchmarks.quality.training import SOLVED, Sample, train

TASKS = {task.name.split()[0]: task for task in tasks.tasks()}
MODELS = {model.name: model for model in models()}
# How many positions back a mixer can see: all 47 of the longest below, or what two kernels of three span
REACH = {"attention": 47, "tcn": 47, "conv x2": 4, "gru": 47, "lstm": 47}

every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


@pytest.fixture(scope="module", autouse=True)
def _compiled_code():
    """What is tested is the suite: Triton's interpreter would take minutes over it."""
    with fastattn.use_backend("torch"):
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums over more threads need not repeat bitwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _draw(task, seed, size=40):
    tokens, targets = task.draw(torch.Generator().manual_seed(seed), size)
    return tokens.tolist(), targets.tolist()


def _right_recall(tokens):
    value_of = dict(zip(tokens[:16:2], tokens[1:16:2]))
    assert len(value_of) == 8, "a key was shown twice"
    assert sorted(tokens[16:]) == sorted(value_of), "every key is asked for once"
    assert max(value_of) < 32 <= min(value_of.values())
    return [IGNORED] * 16 + [value_of[key] - 32 for key in tokens[16:]]


def _right_copy(tokens):
    assert max(tokens[:40]) < 8
    assert tokens[40:] == [8] + [9] * 39
    return [IGNORED] * 40 + tokens[:40]


def _right_parity(tokens):
    return [sum(tokens[: i + 1]) % 2 for i in range(32)]


@pytest.mark.parametrize("name", TASKS)
def test_task_targets_are_right(name, seed):
    """The answers once more, in plain Python, from the tokens alone."""
    answer = {"recall": _right_recall, "copy": _right_copy, "parity": _right_parity}[name]
    for tokens, targets in zip(*_draw(TASKS[name], seed)):
        assert targets == answer(tokens)


@every_task
def test_task_fills_its_ranges(task, seed):
    """A class that never comes, or a token without an embedding, would make ``chance`` or the model wrong."""
    tokens, targets = task.draw(torch.Generator().manual_seed(seed), 300)
    assert tokens.shape == targets.shape == (300, task.seqlen)
    assert tokens.unique().tolist() == list(range(task.vocabulary))
    assert targets[targets != IGNORED].unique().tolist() == list(range(task.classes))


@every_task
def test_task_depends_on_the_seed_alone(task):
    assert _draw(task, 5) == _draw(task, 5)
    assert _draw(task, 5) != _draw(task, 6)


@pytest.mark.parametrize("make", [tasks.recall, tasks.copy, tasks.parity], ids=lambda make: make.__name__)
def test_task_of_another_size(make, seed):
    task = make(5)
    tokens, targets = task.draw(torch.Generator().manual_seed(seed), 3)
    assert tokens.shape == targets.shape == (3, task.seqlen)
    assert "5" in task.name


@every_task
def test_models_have_the_same_parameters(task):
    """Otherwise the larger one's win would say nothing: within 10 % of each other, about 100 thousand each."""
    counts = {m.name: sum(p.numel() for p in m.build(task).parameters()) for m in MODELS.values()}
    assert max(counts.values()) < 1.1 * min(counts.values()), counts
    assert min(counts.values()) > 95_000, counts


@every_model
def test_mixer_sees_the_past_as_far_as_it_says(model):
    """Causal, all of them; and of full reach, but for the two convolutions: the gradient says who was looked at."""
    torch.manual_seed(1)
    mixer = model.mixer(48).double()
    x = torch.randn(1, 48, WIDTH, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(mixer(x)[0, -1].square().sum(), x)
    assert dx[0].any(dim=1).tolist() == [position >= 47 - REACH[model.name] for position in range(48)]
    (dx,) = torch.autograd.grad(mixer(x)[0, 20].square().sum(), x)
    assert not dx[0, 21:].any()
    assert dx[0, 20].any()


@every_task
def test_tcn_reaches_the_first_token(task):
    """Its failures are not to come from a reach that is too short: it grows with the layers, not with the task."""
    torch.manual_seed(2)
    mixer = MODELS["tcn"].mixer(task.seqlen).double()
    x = torch.randn(1, task.seqlen, WIDTH, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(mixer(x)[0, -1].square().sum(), x)
    assert dx[0, 0].any()


def test_only_attention_without_positions_and_mask_is_equivariant(seed):
    """f(s(x)) = s(f(x)), the property that positions are added for; rounding is all that may be left of it."""
    found = {row["model"]: row["deviation"] for row in deviations(seed)}
    assert found.pop("attention, no positions, no mask") < 1e-12
    assert found.keys() == MODELS.keys()
    assert min(found.values()) > 0.05, found


@every_model
def test_training_lowers_the_loss_and_repeats_bitwise(model):
    """A figure nobody can repeat is none: all but the wall time of two runs is equal, and the caller's seed is kept."""
    task = dataclasses.replace(tasks.parity(6), batch=16)
    random_state = torch.get_rng_state()
    first, second = (train(task, model, seed=3, steps=30, every=15) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert first.samples[-1].loss < first.samples[0].loss
    assert [s.step for s in first.samples[:2]] == [0, 15]
    for one, other in zip(first.samples, second.samples, strict=True):
        assert dataclasses.replace(one, seconds=0.0) == dataclasses.replace(other, seconds=0.0)
    assert first.parameters == sum(p.numel() for p in model.build(task).parameters())
    other = train(task, model, seed=4, steps=1)
    assert other.samples[0].loss != first.samples[0].loss


def test_training_stops_when_solved():
    """A step budget is the most that is spent. Two bits are soon learned."""
    seen: list[Sample] = []
    curve = train(tasks.parity(2), MODELS["conv x2"], seed=0, steps=400, every=10, show=seen.append)
    assert tuple(seen) == curve.samples
    assert curve.accuracy == 1.0
    assert curve.samples[-1].step < 400
    assert all(sample.accuracy < SOLVED for sample in curve.samples[:-1])


def test_curve_as_plain_values():
    task = tasks.recall(2)
    row = train(dataclasses.replace(task, batch=4), MODELS["gru"], seed=0, steps=2).as_json()
    assert json.loads(json.dumps(row)) == row
    assert row.keys() == {"task", "chance", "model", "parameters", "steps", "seconds", "accuracy", "curve"}
    assert (row["task"], row["chance"]) == ("recall 2 pairs", task.chance)
    assert row["curve"].keys() == {"step", "seconds", "loss", "accuracy"}
    assert row["curve"]["step"] == [0, 2]
    assert row["curve"]["accuracy"][-1] == row["accuracy"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@every_model
def test_training_on_a_gpu_begins_where_the_cpu_does(model):
    """Weights and sequences of a seed do not depend on the device."""
    here, there = (train(tasks.parity(6), model, seed=3, steps=5, device=device) for device in ("cpu", "cuda"))
    assert there.samples[0].loss == pytest.approx(here.samples[0].loss, rel=1e-4)
    assert there.samples[-1].loss < there.samples[0].loss
