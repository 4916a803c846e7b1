import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn

from asga.policy import LayerPolicy
from asga.search.groups import Group
from asga.search.space import LayerChoices, SearchSpace, SpaceChoices


def small_net() -> nn.Module:
    blocks = {name: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)) for name in ("a", "b")}
    return nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), **blocks, "embed": nn.Embedding(5, 4), "head": nn.Linear(4, 2)})


NAMES = ("stem", "a.0", "a.2", "b.0", "b.2", "head")
SEARCHED = LayerChoices((2, 4), (3, 8))
INT8 = {"weight_bits": (8,), "act_bits": (8,)}
EIGHT = LayerChoices((8,), (8,), pinned=True)


def space(**changes: object) -> SearchSpace:
    return SearchSpace(**{"weight_bits": (2, 4), "act_bits": (3, 8)} | changes)


class TestSearchSpace:
    def test_defaults(self):
        assert SearchSpace().weight_bits == SearchSpace().act_bits == (2, 3, 4, 6, 8)
        assert SearchSpace().first_last == (8, 8)

    def test_first_and_last_inputs_are_float_where_all_are(self):
        assert SearchSpace(act_bits=None).first_last == (8, None)
        assert SearchSpace(act_bits=None, first_last=(8, 8)).first_last == (8, 8)

    def test_candidates_are_sorted(self):
        assert SearchSpace(weight_bits=[8, 2, 4]).weight_bits == (2, 4, 8)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"pinned": {"a.*": 4, "b.0": (2, 8)}, "exclude": ("b.2",)},
            {"weight_bits": (4, "fp4", "fp8"), "act_bits": None, "pinned": {"a.*": ("fp8", None)}},
            {"target": "tensorrt"},
        ],
        ids=["integers", "floats", "target"],
    )
    def test_survives_json(self, arguments):
        original = space(**arguments)
        assert SearchSpace(**json.loads(json.dumps(asdict(original)))) == original

    def test_numbers_of_numpy_become_those_of_python(self):
        pins = {"first_last": np.int64(8), "pinned": {"a": np.int8(4)}}
        space = SearchSpace(tuple(np.arange(2, 5)), list(np.uint8([4, 8])), **pins)
        assert space == SearchSpace((2, 3, 4), (4, 8), first_last=8, pinned={"a": 4})
        json.dumps(asdict(space))

    def test_small_floats_come_behind_the_integer_of_their_width(self):
        assert SearchSpace(weight_bits=["fp8", "fp4", 8, "int4", 2]).weight_bits == (2, 4, "fp4", 8, "fp8")
        everything = (2, 3, 4, "fp4", 5, 6, 7, 8, "fp8")
        assert SearchSpace(weight_bits=everything[::-1]).weight_bits == everything

    @pytest.mark.parametrize(
        ("arguments", "weights", "acts"),
        [
            ({"formats": ("int8", "int4", "fp8")}, (4, 8, "fp8"), (4, 8)),
            ({"formats": ("int4", "fp4"), "act_bits": (6, 8)}, (4, "fp4"), (6, 8)),
            ({"formats": ("fp4", "fp8"), "act_bits": None}, ("fp4", "fp8"), None),
            ({"formats": ("int2", "int3")}, (2, 3), (2, 3)),
        ],
        ids=["both", "act_bits given", "float inputs", "integers"],
    )
    def test_formats_by_name(self, arguments, weights, acts):
        found = SearchSpace(**arguments)
        assert (found.weight_bits, found.act_bits) == (weights, acts)
        assert found == SearchSpace(weight_bits=weights, act_bits=acts)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"weight_bits": ()}, "weight_bits has 0 candidates; between 1 and 8"),
            ({"weight_bits": (2, 9)}, r"weight_bits\[1\] is 9; supported are 2 to 8"),
            ({"act_bits": (1, 2)}, r"act_bits\[0\] is 1; supported are 2 to 8"),
            ({"weight_bits": (4, "int4")}, r"weight_bits is \(4, 'int4'\); each candidate may be there only once"),
            ({"weight_bits": ("fp6",)}, r"weight_bits\[0\] is 'fp6'; supported are int2, .* fp4, fp8"),
            ({"formats": ("int4",), "weight_bits": (2, 4)}, "formats is .* and weight_bits is .*; give one of them"),
            ({"target": "tensort"}, "target is 'tensort'; .*; did you mean 'tensorrt'"),
            ({"pinned": {"a.*": ("fp6", 8)}}, r"pinned\['a\.\*'\]\[0\] is 'fp6'"),
            ({"act_bits": (2, 3, 2)}, r"act_bits is \(2, 3, 2\); each candidate may be there only once"),
            ({"act_bits": (2,) * 9}, "act_bits has 9 candidates; between 1 and 8"),
            ({"first_last": 16}, "first_last is 16; supported are 2 to 8"),
            ({"pinned": {"a.*": (4, 1)}}, r"pinned\['a\.\*'\]\[1\] is 1; supported are 2 to 8"),
        ],
    )
    def test_refuses_bad_values(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            SearchSpace(**arguments)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"weight_bits": 4}, "weight_bits is 4; a sequence of integers is needed"),
            ({"weight_bits": "248"}, "weight_bits is '248'; a sequence"),
            ({"weight_bits": (2, 4.0)}, r"weight_bits\[1\] is 4.0; an integer"),
            ({"act_bits": (4, "fp8")}, r"act_bits\[1\] is 'fp8'; an integer"),
            ({"first_last": (8, "fp8")}, r"first_last\[1\] is 'fp8'; an integer"),
            ({"first_last": (8, 8, 8)}, r"first_last is \(8, 8, 8\); an integer or a pair"),
            ({"pinned": {"a.*": "8"}}, r"pinned\['a\.\*'\] is '8'; an integer or a pair"),
            ({"pinned": ["a"]}, r"pinned is \['a'\]; bits by pattern are needed"),
            ({"exclude": "head"}, "exclude is 'head'; a sequence of name patterns"),
            ({"exclude": (3,)}, r"exclude is \(3,\); a sequence of name patterns"),
        ],
    )
    def test_refuses_bad_types(self, arguments, message):
        with pytest.raises(TypeError, match=message):
            SearchSpace(**arguments)

    def test_formats_need_an_integer_for_the_inputs(self):
        with pytest.raises(ValueError, match=r"no integer for the inputs: give act_bits, or act_bits=None"):
            SearchSpace(formats=("fp4", "fp8"))


class TestChoices:
    def test_first_and_last_are_pinned_in_registration_order(self):
        choices = space().choices(small_net())
        assert choices.names == tuple(choices.layers) == NAMES
        assert choices.layers["stem"] == choices.layers["head"] == EIGHT
        assert all(choices.layers[name] == SEARCHED for name in NAMES[1:-1])
        assert set(choices.skipped) == {"embed"}
        assert choices.excluded == ()

    def test_first_last_can_be_searched(self):
        choices = space(first_last=None).choices(small_net())
        assert all(layer == SEARCHED for layer in choices.layers.values())

    def test_pins_win_over_first_last_and_the_last_match_counts(self):
        choices = space(pinned={"*.2": 6, "b.2": (2, 8), "head": 4}).choices(small_net())
        assert choices.layers["stem"] == EIGHT
        assert choices.layers["a.2"] == LayerChoices((6,), (6,), pinned=True)
        assert choices.layers["b.2"] == LayerChoices((2,), (8,), pinned=True)
        assert choices.layers["head"] == LayerChoices((4,), (4,), pinned=True)

    def test_small_floats_and_float_inputs(self):
        found = space(weight_bits=(4, "fp4"), act_bits=None, pinned={"b.*": ("fp8", None)}).choices(small_net())
        assert found.layers["a.0"] == LayerChoices((4, "fp4"), (None,))
        assert found.layers["b.0"] == LayerChoices(("fp8",), (None,), pinned=True)
        assert found.layers["stem"] == LayerChoices((8,), (None,), pinned=True)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({}, r"Conv2d: int2 x int3/int8, int4 x int3/int8, for 'a\.0', 'a\.2', 'b\.0' and 1 more\n"),
            (
                {"weight_bits": (8,), "act_bits": (8,), "pinned": {"b.*": (4, 8)}},
                r"Conv2d: int4 x int8, for 'b\.0', 'b",
            ),
            ({"weight_bits": (8,), "act_bits": (8,), "first_last": ("fp8", 8)}, r"Linear: fp8 x int8, for 'head'"),
        ],
        ids=["candidates", "pins", "first_last"],
    )
    def test_what_the_target_cannot_run_is_refused(self, arguments, message):
        with pytest.raises(ValueError, match=f"onnxruntime-cpu cannot run, as weights x inputs:\n(.*\n)*.*{message}"):
            space(target="onnxruntime-cpu", **arguments).choices(small_net())

    def test_what_the_target_can_run_is_not(self):
        only_int8 = space(target="onnxruntime-cpu", **INT8).choices(small_net())
        assert only_int8.layers["a.0"] == LayerChoices((8,), (8,))
        weights = {"weight_bits": (2, 4, 8), "act_bits": None, "first_last": None}
        found = space(target="onnxruntime-cpu", **weights, exclude=("stem", "a.*", "b.*")).choices(small_net())
        assert found.layers == {"head": LayerChoices((2, 4, 8), (None,))}

    def test_excluded_layers_stay_float(self):
        choices = space(exclude=("b.*", "head"), pinned={"b.0": 4}).choices(small_net())
        assert choices.excluded == ("b.0", "b.2", "head")
        assert choices.names == NAMES
        assert set(choices.layers) == {"stem", "a.0", "a.2"}
        assert choices.skipped["b.0"] == "excluded by the search space"

    def test_pattern_without_a_match_shows_the_nearest_names(self):
        with pytest.raises(ValueError, match=r"pinned: the pattern 'a\.1' .*; did you mean 'a\.[02]'"):
            space(pinned={"a.1": 4}).choices(small_net())
        with pytest.raises(ValueError, match=r"exclude: the pattern 'haed' .*; did you mean 'head'"):
            space(exclude=("haed",)).choices(small_net())

    def test_pattern_that_matches_what_cannot_be_quantized_says_why(self):
        with pytest.raises(ValueError, match=r"'emb\*' matches no quantizable layer\n  'embed': Embedding"):
            space(exclude=("emb*",)).choices(small_net())

    @pytest.mark.parametrize(
        ("arguments", "argument"),
        [
            ({"pinned": {"twin.*": 4}}, "pinned"),
            ({"exclude": ("twin.0",)}, "exclude"),
            ({"groups": [["twin.0", "b.*"]]}, "groups"),
        ],
        ids=["pin", "exclude", "group"],
    )
    def test_second_name_of_a_shared_layer_says_the_first(self, arguments, argument):
        model = small_net()
        model["twin"] = nn.Sequential(model["a"][0])
        with pytest.raises(ValueError, match=argument) as caught:
            space(**arguments).choices(model)
        assert "\n  'twin.0': the same layer as 'a.0': use that name" in str(caught.value)

    def test_a_name_like_a_second_one_is_shown(self):
        model = small_net()
        model["twin"] = model["a"][0]
        with pytest.raises(ValueError, match="did you mean 'twin'"):
            space(exclude=("twim",)).choices(model)

    def test_nothing_quantizable(self):
        with pytest.raises(ValueError, match="no layer that can be quantized\n  'embed': Embedding"):
            space().choices(nn.ModuleDict({"embed": nn.Embedding(3, 2), "bn": nn.BatchNorm1d(2)}))

    @pytest.mark.parametrize(
        ("model", "arguments"),
        [
            (nn.Linear(2, 2), {}),
            (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {}),
            (small_net(), {"pinned": {"*": 4}}),
            (small_net(), {"exclude": ("*",)}),
        ],
        ids=["one layer", "two layers", "all pinned", "all excluded"],
    )
    def test_nothing_left_to_search(self, model, arguments):
        with pytest.raises(ValueError, match=r"no layer is left to search: .*first_last=None"):
            space(**arguments).choices(model)

    def test_model_that_is_a_layer(self):
        assert space(first_last=None).choices(nn.Linear(2, 2)).layers == {"": SEARCHED}


class Branches(nn.Module):
    """Two linear layers that read the stem's output, whose results are added."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(self.body(self.left(x) + self.right(x) + x)))


class TestGroups:
    def test_by_hand(self):
        found = space(groups=[["a.*"], Group(["b.0", "a.0"], "act"), {"layers": ["b.2", "b.0"], "share": "weight"}])
        assert found.choices(small_net()).groups == (
            Group(("a.0", "a.2", "b.0"), "act"),  # joined: a.0 is in both
            Group(("a.0", "a.2"), "weight"),
            Group(("b.0", "b.2"), "weight"),
        )

    def test_pinned_and_excluded_layers_are_left_out(self):
        found = space(groups=[["*"]], pinned={"a.0": 4}, exclude=["b.0"]).choices(small_net())
        assert found.groups == (Group(("a.2", "b.2")),)

    def test_tied_weights_share_their_bits(self):
        model = small_net()
        model["b"][0].weight = model["stem"].weight = model["a"][0].weight
        tied = Group(("a.0", "b.0"), "weight")
        assert space().choices(model).groups == (tied,)  # the stem is pinned
        assert space(groups=[Group(["a.*"], "both")]).choices(model).groups == (
            Group(("a.0", "a.2"), "act"),
            Group(("a.0", "a.2", "b.0"), "weight"),
        )
        assert space(groups=[["a.0", "b.0"]]).choices(model).groups == (Group(("a.0", "b.0")),)
        assert space(exclude=["b.0"]).choices(model).groups == ()

    def test_by_rule(self):
        rules = space(groups=["residual", "qkv"], first_last=None)
        assert rules.choices(Branches(), torch.zeros(1, 4)).groups == (
            Group(("left", "right", "body"), "act"),
            Group(("left", "right"), "weight"),
        )
        # The head is pinned, and what it reads is no sum.
        assert space(groups=["residual"]).choices(Branches(), {"x": torch.zeros(1, 4)}).groups == (
            Group(("left", "right", "body"), "act"),
        )

    def test_inputs_that_stay_float_share_nothing(self):
        found = SearchSpace(act_bits=None, groups=["residual", "qkv"]).choices(Branches(), torch.zeros(1, 4))
        assert found.groups == (Group(("left", "right"), "weight"),)

    def test_decisions(self):
        choices = SearchSpace(weight_bits=(4,), groups=[["a.0", "b.0"]]).choices(small_net())
        assert choices.decisions == (("a.0", "act"), ("a.2", "act"), ("b.2", "act"))
        assert ("a.0", "weight") in space(pinned={"b.*": 4}).choices(small_net()).decisions

    def test_a_rule_needs_an_example(self):
        assert space(groups=["qkv"]).runs_the_model
        assert not space(groups=[["a.*"]]).runs_the_model
        with pytest.raises(ValueError, match=r"groups has rules \(qkv, residual\), which need example_inputs"):
            space(groups=["qkv", ["left", "right"], "residual"]).choices(Branches())

    def test_survive_json(self):
        original = space(groups=["residual", ["a.*", "b.0"], Group(["b.2", "b.0"], "act")])
        assert SearchSpace(**json.loads(json.dumps(asdict(original)))) == original

    @pytest.mark.parametrize(
        ("groups", "error", "message"),
        [
            ("residual", TypeError, r"groups is 'residual'; a sequence of rules or groups is needed, such as \('res"),
            (["residuals"], ValueError, "groups has 'residuals', which is no rule; rules are residual, qkv, depthwise"),
            ([[3]], TypeError, r"layers of a group are \[3\]"),
            ([{"layers": ["a"], "share": "all"}], ValueError, "share of a group is 'all'"),
        ],
    )
    def test_bad_values(self, groups, error, message):
        with pytest.raises(error, match=message):
            space(groups=groups)

    @pytest.mark.parametrize(
        ("group", "message"),
        [
            (["a.1", "b.*"], r"groups\[0\]: the pattern 'a\.1' matches no quantizable layer; did you mean"),
            (["a.0", "stem"], r"groups\[0\] is .*; at least two layers that are searched are needed"),
        ],
    )
    def test_bad_names(self, group, message):
        with pytest.raises(ValueError, match=message):
            space(groups=[group]).choices(small_net())


class TestPolicies:
    @pytest.fixture
    def choices(self) -> SpaceChoices:
        return space(pinned={"b.0": (2, 6)}, exclude=("a.2",)).choices(small_net())

    def test_uniform(self, choices):
        policy = choices.uniform(5, 7, meta={"budget": "w5a7"})
        assert tuple(policy) == NAMES
        assert policy["a.0"] == policy["b.2"] == LayerPolicy(5, 7)
        assert policy["b.0"] == LayerPolicy(2, 6)
        assert policy["stem"] == LayerPolicy(8, 8)
        assert policy["a.2"] == LayerPolicy(None, None)
        assert policy.meta == {"budget": "w5a7"}

    def test_uniform_keeps_float_inputs_float(self):
        choices = space(weight_bits=(4, "fp4"), act_bits=None).choices(small_net())
        assert choices.uniform(3, 5)["a.0"] == LayerPolicy(3, None)
        assert choices.uniform("fp4", None)["a.0"] == LayerPolicy("fp4", None)
        assert choices.policy(choices.uniform_choice("fp4", None)) == choices.uniform("fp4", None)

    def test_from_indices(self, choices):
        chosen = {"stem": (0, 0), "a.0": (1, 0), "b.0": (0, 0), "b.2": (0, 1), "head": (0, 0)}
        policy = choices.policy(chosen)
        assert tuple(policy) == NAMES
        assert policy["a.0"] == LayerPolicy(4, 3)
        assert policy["b.2"] == LayerPolicy(2, 8)
        assert policy["a.2"] == LayerPolicy(None, None)
