"""The English of S10, and the quick experiment: what pretraining is worth."""

import copy
import json
import math

import pytest
import torch

import fastattn
from benchmarks.lecture import language
from benchmarks.lecture.english import PARAGRAPH, SOURCES, UNKNOWN, Vocabulary, documents, paragraphs
from benchmarks.lecture.language import EXPERIMENT, PASSAGE, Corpus, classify, corpus, labelled, passages, pretrain


@pytest.fixture(autouse=True)
def _one_thread_of_compiled_code():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastattn.use_backend("torch"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data():
    return corpus()


@pytest.mark.parametrize("source", SOURCES)
def test_documents_are_many(source):
    texts = documents(source)
    assert len(texts) > 50
    assert sum(map(len, texts)) > 300_000
    assert texts == documents(source)


def test_documents_of_another_source_are_refused():
    with pytest.raises(ValueError, match="source='pandas': expected one of 'python', 'numpy', 'torch'"):
        documents("pandas")


def test_paragraphs_are_sentences_without_code_and_names():
    text = (
        "Return the sum of the elements of a `tensor` over the :attr:`axis` given.\n"
        "It is 0 for an empty one, says numpy.\n\n"
        "too short\n\n"
        ">>> import this and that and all of the other things there are to be had\n\n"
        "a ::= b | c | d ::= [e] {f} ** g // h << i >> j && k || l != m == n\n"
    )
    (paragraph,) = paragraphs(text)
    assert " ".join(paragraph) == (
        f"return the sum of the elements of a {UNKNOWN} over the axis given . "
        f"it is 0 for an empty one , says {UNKNOWN} ."
    )


def test_vocabulary_numbers_the_commonest_words():
    text = [["b", "a", "b", "c"], ["a", "b", UNKNOWN]]
    vocabulary = Vocabulary(text, 4)
    assert vocabulary.words == [UNKNOWN, PARAGRAPH, "b", "a"]
    assert len(vocabulary) == 4
    assert vocabulary.encode(text).tolist() == [2, 3, 2, 0, 1, 3, 2, 0, 1]
    written = Vocabulary([["a", "(", "b", ")", ",", "a", "."]], 10)
    assert written.decode(written.encode([["a", "(", "b", ")", ",", "a", "."]]).tolist()) == "a (b), a."


def test_corpus_holds_documents_out(data):
    """Of each source a fifth or so; and what is asked was not read, although documents quote each other."""
    assert len(data.vocabulary) == language.VOCABULARY
    for source in SOURCES:
        learned, unseen = data.train[source], data.held_out[source]
        assert len(learned) > 20_000
        assert 0.1 < len(unseen) / len(learned) < 0.45
        known = {tuple(window) for window in learned.unfold(0, PASSAGE, 1).tolist()}
        windows = unseen.unfold(0, PASSAGE, PASSAGE).tolist()
        assert sum(tuple(window) in known for window in windows) < 0.01 * len(windows)


def test_passages_come_from_their_text(seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = passages(torch.arange(10), 4, 200, generator)
    assert (drawn == drawn[:, :1] + torch.arange(4)).all()
    assert drawn[:, 0].unique().tolist() == list(range(7))
    tokens, targets = labelled({s: torch.full((60,), i) for i, s in enumerate(SOURCES)}, 5, generator)
    assert tokens.shape == (15, PASSAGE)
    assert torch.equal(tokens[:, 0], targets)


def test_word_frequencies_are_a_cross_entropy():
    """Two words, three to one, in the text; one of each asked: the mean of two logarithms."""
    vocabulary = Vocabulary([["a"] * 5 + ["b"]], 4)
    tokens = torch.tensor([2, 2, 2, 3])
    data = Corpus(vocabulary, dict.fromkeys(SOURCES, tokens), dict.fromkeys(SOURCES, torch.tensor([2, 3])))
    smoothed = 9 + 1, 3 + 1, 12 + 4
    expected = -(math.log(smoothed[0] / smoothed[2]) + math.log(smoothed[1] / smoothed[2])) / 2
    assert language.word_frequencies(data) == pytest.approx(expected)


def test_pretraining_repeats_and_fine_tuning_leaves_the_pretrained_model_alone(data):
    random_state = torch.get_rng_state()
    (model, curve), (_, again) = (pretrain(data, 2, 3, lambda line: None) for _ in range(2))
    assert curve == again
    assert curve[0]["loss"] > curve[-1]["loss"]
    before = copy.deepcopy(model.state_dict())
    row = language.compare(data, model.trunk, 1, 1, 3)
    assert row == language.compare(data, model.trunk, 1, 1, 3)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_classifier_learns_what_it_is_shown(data):
    shown = labelled(data.train, 4, torch.Generator().manual_seed(0))
    assert classify(language.new_model(len(data.vocabulary), 1).trunk, shown, shown, 40, 2) == 1.0


# Each seed takes the half of a minute: they run by ``python -m pytest -m resources tests/benchmarks``
@pytest.mark.resources
@pytest.mark.parametrize("run_seed", range(3))
def test_quick_experiment_holds(run_seed, tmp_path):
    """The language model learned more than word frequencies, and who learned it needs fewer labels."""
    said = []
    result = EXPERIMENT.run(True, run_seed, said.append)
    assert [claim for claim in result["claims"] if not claim["holds"]] == []
    assert json.loads(json.dumps(result)) == result
    assert result["continuation"].startswith("returns the ")
    assert any(result["continuation"] in eval(line.partition(": ")[2]) for line in said if line.startswith("it says"))
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    EXPERIMENT.draw(result).savefig(tmp_path / "language.svg")
