"""Functions that cannot be made programs, and arguments that are none: refused in words that name the expression."""

import math
import re
from typing import Any

import pytest
import torch

from fastattn.testing import random_tensor
from tests.ops.attention_cases import attend

TABLE = random_tensor(3, 4, seed=1)
INTEGERS = torch.arange(5)
QUERY = random_tensor(1, 2, 4, 16, seed=2)
NONE: list[int] = []


def writes_to_what_it_captures(s, b, h, q, k):
    TABLE[0, 0] = 1.0
    return s


def writes_in_place(s, b, h, q, k):
    TABLE.add_(1.0)
    return s


def adds_lgamma(score, batch, head, query_index, key_index):
    return score + torch.lgamma(score)


USES_NUMBERS = "use torch.where, &, | and ~"
EVERY_AXIS = "every axis of it is indexed"
REFUSED: dict[str, tuple[Any, ...]] = {
    "an if": (NotImplementedError, f"by a Python `if`.*{USES_NUMBERS}", lambda s, b, h, q, k: s if q > k else -s),
    "an and": (NotImplementedError, f"`and`.*{USES_NUMBERS}", lambda s, b, h, q, k: s * (q > k and k > 1)),
    "a not": (NotImplementedError, f"`not`.*{USES_NUMBERS}", lambda s, b, h, q, k: s * (not q)),
    "a chain": (NotImplementedError, "comparison chain", lambda s, b, h, q, k: s * (0 < q < k)),
    "an in": (NotImplementedError, "`in`", lambda s, b, h, q, k: s * (q in (1, 2))),
    "item": (NotImplementedError, r"by \.item\(\)", lambda s, b, h, q, k: s + TABLE.sum().item()),
    "tolist": (NotImplementedError, r"by \.tolist\(\)", lambda s, b, h, q, k: s + q.tolist()),
    "int": (NotImplementedError, r"by int\(\)", lambda s, b, h, q, k: s + int(q)),
    "math": (NotImplementedError, r"by float\(\)", lambda s, b, h, q, k: math.exp(s)),
    "a list by a number": (NotImplementedError, "an index of a list", lambda s, b, h, q, k: s * [1, 2, 3, 4][q]),
    "a range": (NotImplementedError, r"range\(\)", lambda s, b, h, q, k: sum(s for _ in range(q))),
    "an axis without index": (ValueError, rf"shape \[4\]: .*{EVERY_AXIS}", lambda s, b, h, q, k: s + TABLE[h]),
    "a whole tensor": (ValueError, rf"shape \[3, 4\]: .*{EVERY_AXIS}", lambda s, b, h, q, k: TABLE),
    "an axis inside": (
        NotImplementedError, "captured_0, of which 1 axes have no index", lambda s, b, h, q, k: s + TABLE[h].exp()[q]
    ),
    "a string": (TypeError, "returns str: expected a number", lambda s, b, h, q, k: "s"),
    "nothing": (TypeError, "returns NoneType: expected a number", lambda s, b, h, q, k: None),
    "a pair": (TypeError, "returns tuple: expected a number", lambda s, b, h, q, k: (s, s)),
    "writing": (NotImplementedError, r"it writes to a tensor.*TABLE\[0, 0\] = 1\.0", writes_to_what_it_captures),
    "writing in place": (NotImplementedError, r"writes to a tensor \(add_\).*TABLE\.add_\(1\.0\)", writes_in_place),
    "an operator": (NotImplementedError, r"`return score \+ torch\.lgamma\(score\)` uses aten\.lgamma", adds_lgamma),
    "a random number": (NotImplementedError, "uses aten.rand", lambda s, b, h, q, k: s + torch.rand(())),
    "a floating index": (NotImplementedError, "by a number that is torch.float32", lambda s, b, h, q, k: TABLE[q / 2]),
    "a boolean index": (NotImplementedError, "by a number that is torch.bool", lambda s, b, h, q, k: TABLE[q > 1]),
    "a list as index": (NotImplementedError, r"indexes a tensor by \[0, 1\]", lambda s, b, h, q, k: TABLE[[0, 1], k]),
    "a new axis": (NotImplementedError, "indexes a tensor by None", lambda s, b, h, q, k: TABLE[None, q]),
    "many indices": (NotImplementedError, "a tensor of 2 axes by 3 numbers", lambda s, b, h, q, k: TABLE[q, k, h]),
    "few arguments": (TypeError, "cannot be traced: .* 1 positional argument but 5", lambda s: s),
    "its own error": (NotImplementedError, "list index out of range", lambda s, b, h, q, k: s + NONE[0]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_score_mod_is_refused_in_words(name):
    error, message, function = REFUSED[name]
    with pytest.raises(error, match=message) as caught:
        attend(QUERY, QUERY, QUERY, score_mod=function, backend="torch")
    assert f"score_mod {function.__name__}" in str(caught.value)


@pytest.mark.parametrize("name", ["an if", "writing", "its own error"])
def test_refusal_names_the_line(name):
    with pytest.raises(NotImplementedError, match=rf"\(line \d+ of {re.escape(__file__)}: "):
        attend(QUERY, QUERY, QUERY, score_mod=REFUSED[name][2], backend="torch")


REFUSED_MASKS: dict[str, tuple[Any, ...]] = {
    "an integer": (TypeError, "returns torch.int32: expected a boolean, True where", lambda b, h, q, k: q),
    "a floating number": (TypeError, "returns torch.float32: expected a boolean", lambda b, h, q, k: q * 0.5),
    "a number": (TypeError, "returns torch.int64: expected a boolean", lambda b, h, q, k: 1),
    "an axis": (ValueError, "expected one number for one pair", lambda b, h, q, k: q < INTEGERS),
    "an and": (NotImplementedError, "`and`", lambda b, h, q, k: q >= k and k > 1),
}


@pytest.mark.parametrize("name", REFUSED_MASKS)
def test_mask_mod_is_refused_in_words(name):
    error, message, function = REFUSED_MASKS[name]
    with pytest.raises(error, match=f"mask_mod .*{message}"):
        attend(QUERY, QUERY, QUERY, mask_mod=function, backend="torch")


def plain(s, b, h, q, k, *more):
    return s


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "a number": (TypeError, "score_mod=3: expected a function, a tuple of one", 3),
    "an empty tuple": (TypeError, r"score_mod=\(\): expected a function", ()),
    "a tuple of numbers": (TypeError, "behind the function stand tensors, but item 2 is 3", (plain, TABLE, 3)),
    "a sparse tensor": (NotImplementedError, "captures a tensor that is torch.sparse_coo", (plain, TABLE.to_sparse())),
    "a complex tensor": (NotImplementedError, "a tensor that is torch.complex64", (plain, TABLE.to(torch.complex64))),
    "another device": (
        ValueError, r"score_mod captures a tensor of shape \[3, 4\] on meta but query is on cpu",
        (lambda *a: a[5][a[2], 0], TABLE.to("meta")),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
def test_wrong_arguments_are_named(name):
    error, message, argument = ARGUMENTS[name]
    with pytest.raises(error, match=message):
        attend(QUERY, QUERY, QUERY, score_mod=argument, backend="torch")


@pytest.mark.parametrize("count", [8, 9])
def test_more_tensors_than_slots_are_refused(count, backend):
    many = [random_tensor(2, seed=i) for i in range(count)]

    def score_mod(score, batch, head, query_index, key_index):
        return score * sum(tensor[head] for tensor in many)

    if count == 8:
        assert attend(QUERY, QUERY, QUERY, score_mod=score_mod, backend=backend).isfinite().all()
        return
    with pytest.raises(
        NotImplementedError, match=r"read more than 8 tensors of floating numbers .*put several into one"
    ):
        attend(QUERY, QUERY, QUERY, score_mod=score_mod, backend=backend)


def test_place_by_the_score_has_no_gradient(backend):
    table = TABLE.clone().requires_grad_()
    words: Any = {"score_mod": lambda s, b, h, q, k: s * table[0, (s > 0).int()], "backend": backend}
    with pytest.raises(NotImplementedError, match="at a place that depends on the score"):
        attend(QUERY, QUERY, QUERY, **words).sum().backward()
