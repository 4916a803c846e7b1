from collections import UserDict, namedtuple

import pytest
import torch
from torch import nn

from asga._batches import all_finite, call, first_sample, inputs_of, split, to_device

X, Y = torch.arange(6.0).reshape(3, 2), torch.arange(3)
NAN = float("nan")

FORMS = pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        ((X, Y), X),
        ([X, Y], X),
        (((X, 3), Y), (X, 3)),
        ([[X, X], Y], [X, X]),
        (({"x": X, "mask": None}, Y), {"x": X, "mask": None}),
        ({"x": X, "labels": Y, "mask": None}, {"x": X, "mask": None}),
        (UserDict(x=X, labels=Y), {"x": X}),
    ],
    ids=["tensor", "list", "tuple", "lists", "keywords", "with labels", "like a dict"],
)


class TestSplit:
    @FORMS
    def test_forms(self, batch, inputs):
        found, labels = split(batch)
        assert labels is Y
        assert found is inputs or found == inputs

    @pytest.mark.parametrize(
        ("batch", "message"),
        [
            (X, "a batch is a Tensor; a pair"),
            (3, "a batch is a int; a pair"),
            ((X, Y, Y), r"a tuple of Tensor, Tensor, Tensor; .* several inputs go into a tuple: \(\(a, b\), labels\)"),
            ([X, 3], "a batch is a list of Tensor, int; a pair"),
            (("x", Y), "a batch is a tuple of str, Tensor; a pair"),
            ((), "a batch is a tuple of nothing"),
            ({"x": X, "label": Y}, "a batch is a dict of 'x': Tensor, 'label': Tensor; .* the entry \"labels\""),
            ({"x": X, "labels": [1, 2]}, "'labels': list; .* where labels is a tensor"),
            ({"labels": Y}, "a batch is a dict without inputs"),
            ({}, "a batch is a dict of nothing"),
        ],
        ids=["tensor", "number", "three", "labels", "text", "empty", "label", "list", "labels alone", "empty dict"],
    )
    def test_others_are_refused(self, batch, message):
        with pytest.raises(TypeError, match=message):
            split(batch)


class TestInputsOf:
    @FORMS
    def test_of_batches_with_labels(self, batch, inputs):
        found = inputs_of(batch)
        assert found is inputs or found == inputs

    def test_without_labels(self):
        assert inputs_of(X) is X
        assert inputs_of([X]) is X
        assert inputs_of({"x": X}) == {"x": X}

    @pytest.mark.parametrize("batch", ["image", (), 3, {}, {"labels": Y}, ((), Y)], ids=str)
    def test_none(self, batch):
        with pytest.raises(TypeError, match="without inputs"):
            inputs_of(batch)


def test_call():
    class Both(nn.Module):
        def forward(self, a, b=1):
            return a, b

    assert call(Both(), X) == (X, 1)
    assert call(Both(), (1, 2)) == call(Both(), [1, 2]) == call(Both(), {"b": 2, "a": 1}) == (1, 2)


def test_to_device_at_any_depth():
    pair = namedtuple("Pair", "left right")
    value = {"a": [X, (X, 1)], "b": pair(X, None), "c": "text"}
    found = to_device(value, torch.device("meta"))
    assert found["a"][0].is_meta
    assert found["a"][1][0].is_meta
    assert found["a"][1][1] == 1
    assert found["b"].left.is_meta
    assert (type(found["b"]), found["b"].right, found["c"]) == (pair, None, "text")


def test_first_sample_leaves_what_is_not_of_the_batch():
    inputs = {"x": X, "ids": torch.arange(3), "positions": torch.arange(5)[None], "scale": torch.ones(()), "flag": True}
    shapes = {name: getattr(value, "shape", value) for name, value in first_sample(inputs).items()}
    assert shapes == {"x": (1, 2), "ids": (1,), "positions": (1, 5), "scale": (), "flag": True}
    assert first_sample(X).tolist() == [[0, 1]]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (X, [x]), lambda x: {"ids": Y, "x": x}])
def test_all_finite(wrap):
    assert all_finite(wrap(X))
    assert not all_finite(wrap(torch.tensor([0.0, NAN])))
    assert not all_finite(wrap(torch.tensor([-float("inf")])))
