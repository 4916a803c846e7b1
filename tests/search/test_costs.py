from dataclasses import replace

import numpy as np
import pytest
import torch

from asga.nn import FloatWeightQuantizer
from asga.policy import LayerPolicy, Policy
from asga.search.costs import Costs, cost_tables, known_metrics, layer_size_bits, policy_costs
from asga.search.groups import Group
from asga.search.profiles import LayerProfile
from asga.search.space import LayerChoices, SpaceChoices

PROFILES = {
    "a": LayerProfile("a", "Conv2d", macs=1000, weight_numel=90, out_channels=5),
    "b": LayerProfile("b", "Conv2d", macs=300, weight_numel=40, out_channels=4),
    "c": LayerProfile("c", "Linear", macs=20, weight_numel=20, out_channels=2),
}


TIMED = {
    "a": replace(PROFILES["a"], latency_ns=((4, 8, 500), (8, 8, 900))),
    "b": replace(PROFILES["b"], latency_ns=((8, 8, 70),)),
    "c": replace(PROFILES["c"], latency_ns=((None, None, 3),)),
}


class TestCosts:
    def test_by_hand(self):
        policy = Policy({"a": LayerPolicy(3, 4), "b": LayerPolicy(8, 2), "c": LayerPolicy(2, 2)})
        bitops = 1000 * 12 + 300 * 16 + 20 * 4
        size_bits = (90 * 3 + 32 * 6) + (40 * 8 + 32 * 5) + (20 * 2 + 32 * 3)
        assert policy_costs(PROFILES, policy) == Costs(bitops, size_bits)
        assert size_bits == 1078
        assert policy_costs(PROFILES, policy).size_bytes == 135  # 134.75 rounded up

    @pytest.mark.parametrize(
        ("bits", "bitops", "size_bits"),
        [
            (LayerPolicy(None, None), 20 * 32 * 32, 20 * 32),
            (LayerPolicy(4, None), 20 * 4 * 32, 20 * 4 + 32 * 2),
            (LayerPolicy(None, 4), 20 * 32 * 4, 20 * 32 + 32),
        ],
        ids=["float", "float input", "float weight"],
    )
    def test_float_tensors_count_32_bits_and_have_no_scale(self, bits, bitops, size_bits):
        assert policy_costs({"c": PROFILES["c"]}, Policy({"c": bits})) == Costs(bitops, size_bits)

    def test_small_floats_by_hand(self):
        policy = Policy({"a": LayerPolicy("fp8", 4), "b": LayerPolicy("fp4", 2), "c": LayerPolicy("fp4", None)})
        bitops = 1000 * 8 * 4 + 300 * 4 * 2 + 20 * 4 * 32
        # a: 5 channels; b: 4 channels of 10 values, a block each; c: 2 channels of 10 values.
        size_bits = (90 * 8 + 32 * 6) + (40 * 4 + 4 * 8 + 32 + 32) + (20 * 4 + 2 * 8 + 32)
        assert policy_costs(PROFILES, policy) == Costs(bitops, size_bits)

    @pytest.mark.parametrize(("values", "blocks"), [(16, 1), (17, 2), (160, 10)])
    def test_blocks_are_counted_per_channel(self, values, blocks):
        layer = LayerProfile("a", "Linear", macs=1, weight_numel=3 * values, out_channels=3)
        assert layer_size_bits(layer, "fp4", None) == 3 * values * 4 + 3 * blocks * 8 + 32

    def test_scales_counted_are_those_of_the_quantizer(self):
        weight = torch.randn(5, 7, 3, 3)
        layer = LayerProfile("a", "Conv2d", macs=1, weight_numel=weight.numel(), out_channels=5)
        for bits, per_scale, more in (("fp4", 8, 32), ("fp8", 32, 0)):
            scales = FloatWeightQuantizer(weight, bits).scale.numel()
            assert layer_size_bits(layer, bits, None) == weight.numel() * int(bits[2]) + scales * per_scale + more

    @pytest.mark.parametrize(
        ("act_bits", "peak"), [((4, 4, 4), 600 * 4), ((2, 8, 4), 200 * 8), ((2, 2, None), 50 * 32)], ids=str
    )
    def test_activation_memory_is_the_largest_input(self, act_bits, peak):
        sizes = dict(zip("abc", (600, 200, 50), strict=True))
        profiles = {name: replace(PROFILES[name], in_numel=numel) for name, numel in sizes.items()}
        policy = Policy({name: LayerPolicy(8, bits) for name, bits in zip("abc", act_bits, strict=True)})
        assert policy_costs(profiles, policy).act_memory_bits == peak

    def test_latency_is_the_sum_of_the_table(self):
        policy = Policy({"a": LayerPolicy(4, 8), "b": LayerPolicy(8, 8), "c": LayerPolicy(None, None)})
        costs = policy_costs(TIMED, policy)
        assert costs.latency_ns == 500 + 70 + 3
        assert costs.to_dict().keys() == {"bitops", "size_bits", "latency_ns"}
        with pytest.raises(ValueError, match="no time for layer 'b' with 5 weight bits and float activation bits"):
            policy_costs(TIMED, Policy({**policy, "b": LayerPolicy(5, None)}))

    @pytest.mark.parametrize(
        ("bits", "weights"),
        [
            ((4, 4), 90 * 4 + 32 * 5),
            ((4, 6), 90 * 10 + 2 * 32 * 5),
            ((None, None), 90 * 32),
            ((8, None), 90 * 40 + 160),
        ],
        ids=["same", "others", "float", "one float"],
    )
    def test_a_tied_weight_is_stored_once_for_each_of_its_bits(self, bits, weights):
        profiles = {name: replace(PROFILES["a"], name=name, tied_to="a") for name in "ab"}
        costs = policy_costs(profiles, Policy({name: LayerPolicy(b, 8) for name, b in zip("ab", bits, strict=True)}))
        assert costs.size_bits == weights + 2 * 32
        assert costs.bitops == sum(1000 * 8 * (32 if b is None else b) for b in bits)

    def test_what_no_profile_or_not_every_profile_knows_is_no_metric(self):
        assert set(known_metrics(PROFILES)) == {"bitops", "size_bits"}
        assert "latency_ns" in known_metrics(TIMED)
        assert "latency_ns" not in known_metrics({**TIMED, "a": PROFILES["a"]})
        assert policy_costs(PROFILES, Policy(dict.fromkeys("abc", LayerPolicy(2, 2)))).to_dict().keys() == {
            "bitops",
            "size_bits",
        }

    def test_policy_and_profiles_must_be_about_the_same_layers(self):
        with pytest.raises(ValueError, match="does not mention: 'c'"):
            policy_costs(PROFILES, Policy({"a": LayerPolicy(2, 2), "b": LayerPolicy(2, 2)}))
        with pytest.raises(ValueError, match="not in the model:\n  'd'"):
            policy_costs(PROFILES, Policy(dict.fromkeys("abcd", LayerPolicy(2, 2))))


class TestTables:
    CHOICES = SpaceChoices(
        layers={"a": LayerChoices((2, 3), (2, 4, 8)), "b": LayerChoices((8,), (8,), pinned=True)},
        skipped={"c": "excluded by the search space"},
        names=("a", "b", "c"),
    )

    def test_every_entry_is_the_cost_of_that_policy(self):
        tables = cost_tables(PROFILES, self.CHOICES)
        assert {name: table.shape for name, table in tables["bitops"].items()} == {
            "a": (2, 3),
            "b": (1, 1),
            "c": (1, 1),
        }
        for i, j in np.ndindex(2, 3):
            costs = policy_costs(PROFILES, self.CHOICES.policy({"a": (i, j), "b": (0, 0)}))
            for metric, table in tables.items():
                assert table["a"].dtype == np.int64
                assert table["a"][i, j] + table["b"][0, 0] + table["c"][0, 0] == getattr(costs, metric)

    @pytest.mark.parametrize("given", [{}, {"d": (3,)}, {"d": (3,), "e": (3,)}, {"d": (8,), "e": (None,)}], ids=str)
    def test_entries_of_tied_layers_add_up_to_the_cost_of_every_policy(self, given):
        names = ("d", "a", "e", "b")
        layers = {name: LayerChoices(given.get(name, (2, 3)), (2, 8)) for name in names if given.get(name) != (None,)}
        free = tuple(name for name in names if name not in given)
        choices = SpaceChoices(layers, {}, names, (Group(free, "weight"),))
        profiles = {name: replace(PROFILES["a"], name=name, tied_to="d") for name in names}
        table = cost_tables(profiles, choices)["size_bits"]
        assert all((entries > 0).all() for entries in table.values())  # at least the scale of an input
        for weight in (0, 1):
            chosen = {name: (weight if name in free else 0, 1) for name in layers}
            costs = policy_costs(profiles, choices.policy(chosen))
            assert sum(table[name][chosen.get(name, (0, 0))] for name in names) == costs.size_bits

    def test_totals_beyond_64_bits_are_refused(self):
        huge = LayerProfile("a", "Linear", macs=2**59, weight_numel=1, out_channels=1)
        with pytest.raises(ValueError, match=r"bitops of the largest policy is .*64-bit"):
            cost_tables(PROFILES | {"a": huge}, self.CHOICES)

    def test_missing_profile(self):
        with pytest.raises(ValueError, match="profiles lacks layers of the search space: 'c'"):
            cost_tables({"a": PROFILES["a"], "b": PROFILES["b"]}, self.CHOICES)
