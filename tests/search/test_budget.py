import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from asga.search.budget import Budget
from asga.search.costs import policy_costs
from asga.search.profiles import LayerProfile
from asga.search.space import LayerChoices, SpaceChoices

PROFILES = {
    "first": LayerProfile("first", "Conv2d", macs=500, weight_numel=27, out_channels=3),
    "body": LayerProfile("body", "Conv2d", macs=1001, weight_numel=90, out_channels=5),
    "odd": LayerProfile("odd", "Linear", macs=20, weight_numel=20, out_channels=2),
}
CHOICES = SpaceChoices(
    {"first": LayerChoices((8,), (8,), pinned=True), "body": LayerChoices((2, 8), (2, 8))},
    {"odd": "excluded by the search space"},
    ("first", "body", "odd"),
)


MEASURED = {
    "first": replace(PROFILES["first"], in_numel=700, latency_ns=((8, 8, 40),)),
    "body": replace(PROFILES["body"], in_numel=300, latency_ns=((2, 8, 30), (8, 8, 50))),
    "odd": replace(PROFILES["odd"], in_numel=20, latency_ns=((None, None, 1),)),
}


def limits(**budget: object) -> dict[str, int]:
    return Budget(**budget).limits(PROFILES, CHOICES)


@pytest.mark.parametrize(
    ("bitops", "expected"),
    [
        (1000, 1000),
        (1000.9, 1000),
        (10**18 + 1, 10**18 + 1),
        ("1000", 1000),
        ("350M", 350_000_000),
        ("1.2G", 1_200_000_000),
        (" .5 k ", 500),
        ("1.5e3", 1500),
        ("1e-3G", 1_000_000),
        ("2T", 2 * 10**12),
    ],
)
def test_bitops_in_numbers(bitops, expected):
    assert limits(bitops=bitops) == {"bitops": expected}


@pytest.mark.parametrize(
    ("size", "expected_bytes"),
    [
        (1000, 1000),
        ("1000B", 1000),
        ("800kB", 800_000),
        ("800KB", 800_000),
        ("1.5MB", 1_500_000),
        ("2MiB", 2 * 2**20),
        ("1 GiB", 2**30),
    ],
)
def test_size_in_numbers_is_bytes(size, expected_bytes):
    assert limits(size=size) == {"size_bits": 8 * expected_bytes}


def test_word_is_the_cost_of_the_uniform_policy():
    # first: pinned to 8/8, body: 4/3, odd: excluded, so float.
    assert limits(bitops="w4a3") == {"bitops": 500 * 64 + 1001 * 12 + 20 * 1024}
    assert limits(size="w4a3") == {"size_bits": (27 * 8 + 32 * 4) + (90 * 4 + 32 * 6) + 20 * 32}
    assert limits(size="w4") == limits(size="w4a3") == limits(size="w4a8")


def test_words_need_not_be_candidates():
    costs = policy_costs(PROFILES, CHOICES.uniform(5, 7))
    assert limits(bitops="w5a7", size="w5") == {"bitops": costs.bitops, "size_bits": costs.size_bits}


def test_scaled_words_are_exact_and_rounded_down():
    full = limits(bitops="w4a4")["bitops"]
    assert limits(bitops="1.0*w4a4")["bitops"] == full
    assert limits(bitops="0.9 * w4a4")["bitops"] == full * 9 // 10
    assert limits(size="1.25*w2")["size_bits"] == limits(size="w2")["size_bits"] * 5 // 4


@pytest.mark.parametrize(
    ("latency", "expected_ns"),
    [
        (0.005, 5_000_000),
        (0.009, 9_000_000),  # the nearest binary number is less
        (1, 10**9),
        ("5ms", 5_000_000),
        ("1.5 us", 1500),
        ("1.5µs", 1500),
        ("12ns", 12),
        ("0.25s", 250_000_000),
        ("0.001", 1_000_000),
        ("1.9ns", 1),
    ],
)
def test_latency_in_numbers_is_seconds(latency, expected_ns):
    assert Budget(latency=latency).limits(MEASURED, CHOICES) == {"latency_ns": expected_ns}


def test_words_for_activation_memory_and_latency():
    # Inputs of 700, 300 and 20 values: first pinned to 8 bits, body a, odd float.
    for word in ("a4", "w2a4"):
        assert Budget(act_memory=word).limits(MEASURED, CHOICES) == {"act_memory_bits": 700 * 8}
    assert Budget(act_memory="0.5*a4").limits(MEASURED, CHOICES) == {"act_memory_bits": 2800}
    assert Budget(latency="w2a8").limits(MEASURED, CHOICES) == {"latency_ns": 40 + 30 + 1}
    with pytest.raises(ValueError, match="no time for layer 'body' with 4 weight bits and 4 activation bits"):
        Budget(latency="w4a4").limits(MEASURED, CHOICES)


def test_all_limits_bind():
    budget = Budget(bitops="1k", size=3, act_memory="2B", latency="3ns")
    assert budget.limits(MEASURED, CHOICES) == {
        "bitops": 1000,
        "size_bits": 24,
        "act_memory_bits": 16,
        "latency_ns": 3,
    }


@pytest.mark.parametrize(
    ("limit", "needs"), [({"latency": "w8a8"}, "latency needs a latency table"), ({"act_memory": 1}, "sizes of inputs")]
)
def test_limits_on_what_is_not_known(limit, needs):
    with pytest.raises(ValueError, match=f"{needs}.*'first'"):
        limits(**limit)


@pytest.mark.parametrize(
    ("budget", "text"),
    [
        (Budget(bitops="w4a4"), "bitops <= w4a4"),
        (Budget(bitops=10**6, size="1.5MB"), "bitops <= 1000000 BitOps, size <= 1.5MB"),
        (Budget(size=1000), "size <= 1000 bytes"),
        (Budget(act_memory="64kB", latency=0.005), "act_memory <= 64kB, latency <= 0.005 s"),
    ],
)
def test_text_and_json(budget, text):
    assert str(budget) == text
    assert Budget(**json.loads(json.dumps(budget.to_dict()))) == budget


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "at least one limit"),
        ({"bitops": "w4"}, "bitops is 'w4'; a number is needed, or text such as .*'w4a4'"),
        ({"bitops": "w9a4"}, "bitops is 'w9a4'; bits from 2 to 8 are supported"),
        ({"size": "w1"}, "size is 'w1'; bits from 2 to 8 are supported"),
        ({"bitops": "1.5MB"}, "bitops is '1.5MB'; a number is needed"),
        ({"bitops": "350m"}, "bitops is '350m'; a number is needed"),
        ({"size": "1.5M"}, "size is '1.5M'; a number is needed, or text such as '1.5MB'"),
        ({"act_memory": "w4"}, "act_memory is 'w4'; a number is needed, or text such as '64kB'"),
        ({"latency": "w4"}, "latency is 'w4'; a number is needed, or text such as '5ms'"),
        ({"latency": "5Ms"}, "latency is '5Ms'; a number is needed"),
        ({"latency": "0ms"}, "latency is '0ms'; a limit above zero"),
        ({"bitops": "0.9*"}, "bitops is '0.9[*]'; a number is needed"),
        ({"bitops": "a lot"}, "bitops is 'a lot'; a number is needed"),
        ({"bitops": "-5"}, "bitops is '-5'; a number is needed"),
        ({"bitops": 0}, "bitops is 0; a limit above zero"),
        ({"bitops": "0*w4a4"}, "bitops is '0[*]w4a4'; a limit above zero"),
        ({"size": -1}, "size is -1; a limit above zero"),
        ({"size": float("nan")}, "size is nan; a finite number"),
        ({"bitops": float("inf")}, "bitops is inf; a finite number"),
    ],
)
def test_bad_values(budget, message):
    with pytest.raises(ValueError, match=message):
        Budget(**budget)


@pytest.mark.parametrize("bitops", [True, [1], b"w4a4"], ids=["bool", "list", "bytes"])
def test_bad_types(bitops):
    with pytest.raises(TypeError, match=r"bitops is .*; a number or a string is needed"):
        Budget(bitops=bitops)


def test_profiles_of_another_model():
    with pytest.raises(ValueError, match="not in the model:\n  'odd'"):
        Budget(bitops="w4a4").limits({name: PROFILES[name] for name in ("first", "body")}, CHOICES)


@pytest.mark.parametrize(
    ("given", "kept"),
    [(np.int64(7), 7), (np.float32(0.009), 0.009), (np.float64(0.5), 0.5), (Fraction(1, 4), 0.25)],
    ids=repr,
)
def test_other_numbers_become_those_of_python(given, kept):
    budget = Budget(size=given)
    assert budget == Budget(size=kept)
    assert json.loads(json.dumps(budget.to_dict())) == {"size": kept}


def test_a_word_that_costs_nothing():
    profiles = {
        name: replace(profile, latency_ns=tuple((*bits, 0) for *bits, _ in profile.latency_ns))
        for name, profile in MEASURED.items()
    }
    with pytest.raises(ValueError, match="latency is 'w8a8', which costs nothing in this model: give a number"):
        Budget(latency="w8a8").limits(profiles, CHOICES)
