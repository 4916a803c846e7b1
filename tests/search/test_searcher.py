import copy
import json
import math
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import asga
from asga import Budget, InfeasibleBudgetError, LatencyTable, PolicySearcher, SearchSpace
from asga.models import resnet20
from asga.policy import LayerPolicy, Policy
from asga.runs import RunExistsError, RunFolder
from asga.search.comparison import NotBetterThanUniform
from asga.search.costs import policy_costs
from asga.search.groups import Group
from asga.search.held_out import split_loader
from asga.search.scoring import Scorer
from asga.steps import TrainingError

METHODS = pytest.mark.parametrize("method", ["asga", "sgd"])
WITHOUT_TRAINING = pytest.mark.parametrize("method", ["sensitivity", "hawq", "uniform", "random"])
W4A4 = Budget(bitops="w4a4")


def search(model: nn.Module, loader, space: SearchSpace | None = None, **options):
    options = {"budget": W4A4, "epochs": 1, **options}
    return PolicySearcher(model, space, **options).fit(loader)


class TestBudget:
    @pytest.mark.parametrize(
        "budget",
        [
            Budget(bitops="w8a8"),
            Budget(bitops="w4a4"),
            Budget(bitops="w3a3"),
            Budget(bitops="w2a2"),
            Budget(bitops="0.93*w5a3"),
            Budget(size="w3"),
            Budget(size="w2"),
            Budget(bitops="w3a4", size="w3"),
            Budget(bitops=700_000, size="600B"),
        ],
        ids=str,
    )
    @METHODS
    def test_is_met(self, tiny_net, labeled_batches, budget, method):
        result = search(tiny_net(), labeled_batches(), budget=budget, method=method)
        limits = budget.limits(result.profiles, result.choices)
        costs = policy_costs(result.profiles, result.policy)
        assert all(getattr(costs, metric) <= limit for metric, limit in limits.items())
        assert result.cost_shares(result.policy).keys() == limits.keys() == result.expected_cost.keys()
        assert result.policy.meta["limits"] == limits

    @pytest.mark.filterwarnings("ignore::asga.search.FarFromBudget")
    def test_other_budgets_from_the_same_run(self, tiny_net, labeled_batches, tmp_path):
        result = search(tiny_net(), labeled_batches())
        result.save(tmp_path / "search.json")
        loaded = asga.SearchResult.load(tmp_path / "search.json")
        for budget in (W4A4, Budget(bitops="w2a2"), Budget(bitops="w6a5"), Budget(size="w2"), Budget(size=900)):
            policy = result.policy_for(budget)
            limits = budget.limits(result.profiles, result.choices)
            assert all(getattr(result.costs(policy), metric) <= limit for metric, limit in limits.items())
            assert loaded.policy_for(budget) == policy
        assert result.policy_for(W4A4) == result.policy

    @METHODS
    @pytest.mark.parametrize(
        ("budget", "metric"), [(Budget(bitops="w3a3"), "bitops"), (Budget(size="w3"), "size_bits")]
    )
    def test_expected_cost_moves_to_it(self, tiny_net, labeled_batches, method, budget, metric):
        result = search(tiny_net(), labeled_batches(10), budget=budget, epochs=12, method=method)
        # Uniform probabilities over 2, 3, 4, 6, 8 bits are 4.6 bits.
        assert result.history[0]["expected_cost"][metric] > 1.15
        assert result.expected_cost[metric] == pytest.approx(1, abs=0.03)
        assert result.expected_cost == result.history[-1]["expected_cost"]

    @pytest.mark.parametrize("size", [0.01, 100.0])
    def test_expected_cost_moves_to_it_whatever_the_size_of_the_loss(self, tiny_net, labeled_batches, size):
        result = search(
            tiny_net(),
            labeled_batches(10),
            budget=Budget(bitops="w3a3"),
            epochs=12,
            lr=0.0,
            loss_fn=lambda logits, labels: size * nn.functional.cross_entropy(logits, labels),
        )
        assert result.expected_cost["bitops"] == pytest.approx(1, abs=0.03)

    @pytest.mark.parametrize("given", [False, True], ids=["no example_inputs", "example_inputs"])
    def test_impossible_is_refused_before_any_training(self, tiny_net, labeled_batches, tmp_path, given):
        folder = RunFolder(tmp_path, "search", {})
        batches = labeled_batches()
        taken = []

        class Loader:
            def __len__(self):
                return len(batches)

            def __iter__(self):
                for batch in batches:
                    taken.append(1)
                    yield batch

        model = tiny_net()
        example = {"example_inputs": torch.zeros(1, 1, 8, 8)} if given else {}
        with pytest.raises(InfeasibleBudgetError) as error:
            search(model, Loader(), budget=Budget(bitops=1000), folder=folder, progress=pytest.fail, **example)
        macs = {"conv1": 8 * 8 * 4 * 9, "conv2": 4 * 4 * 8 * 4 * 9, "conv3": 4 * 4 * 8 * 8 * 9, "fc": 8 * 3}
        least = (macs["conv1"] + macs["fc"]) * 64 + (macs["conv2"] + macs["conv3"]) * 4
        assert error.value.least == {"bitops": least}
        assert f"least possible {least:,}" in str(error.value)
        assert len(taken) <= 1
        assert [file.name for file in tmp_path.iterdir()] == ["config.json"]

    @pytest.mark.parametrize("method", ["sgd", "sensitivity", "random"])
    def test_activation_memory_and_latency(self, tiny_net, labeled_batches, method):
        names, bits = SearchSpace().choices(tiny_net()).names, (2, 3, 4, 6, 8)
        # Twice as long for twice the product of the bits, whatever the layer.
        table = LatencyTable({(name, w, a): 1000 * w * a for name in names for w in bits for a in bits})
        budget = Budget(act_memory="a4", latency="0.9*w4a4", size="w6")
        result = search(tiny_net(), labeled_batches(), budget=budget, method=method, latency_table=table)
        costs = result.costs(result.policy)
        assert costs.latency_ns == sum(1000 * layer.weight_bits * layer.act_bits for layer in result.policy.values())
        assert costs.latency_ns <= 0.9 * (2 * 64_000 + 2 * 16_000)
        inputs = {"conv1": 64, "conv2": 256, "conv3": 128, "fc": 8}
        assert costs.act_memory_bits == max(inputs[name] * layer.act_bits for name, layer in result.policy.items())
        assert costs.act_memory_bits <= 1024
        assert result.cost_shares(result.policy).keys() == {"act_memory_bits", "latency_ns", "size_bits"}

    def test_a_table_that_lacks_entries_is_refused_before_any_training(self, tiny_net, labeled_batches):
        table = LatencyTable({("conv1", 8, 8): 1})
        with pytest.raises(ValueError, match="the latency table lacks 51 entries of the search space"):
            search(tiny_net(), labeled_batches(), budget=Budget(latency=1), latency_table=table, progress=pytest.fail)
        with pytest.raises(ValueError, match="a limit on latency needs a latency table"):
            search(tiny_net(), labeled_batches(), budget=Budget(latency=1), progress=pytest.fail)

    def test_costs_at_the_resolution_of_the_target(self, tiny_net, labeled_batches):
        small = search(tiny_net(), labeled_batches(side=8))
        large = search(tiny_net(), labeled_batches(side=8), example_inputs=torch.zeros(1, 1, 16, 16))
        assert large.profiles["conv2"].macs == 4 * small.profiles["conv2"].macs
        assert large.profiles["fc"].macs == small.profiles["fc"].macs
        assert large.costs(large.policy).bitops <= W4A4.limits(large.profiles, large.choices)["bitops"]


class TestGroups:
    SPACE = SearchSpace(first_last=None, groups=[["conv2", "conv3"], Group(["conv1", "fc"], "act")])

    @pytest.mark.filterwarnings("ignore::asga.search.FarFromBudget")
    @pytest.mark.parametrize("method", ["asga", "sensitivity", "hawq", "random", "uniform"])
    def test_layers_of_a_group_have_the_same_bits(self, tiny_net, labeled_batches, method):
        result = search(tiny_net(), labeled_batches(), self.SPACE, budget=Budget(bitops="0.9*w4a4"), method=method)
        assert result.policy["conv2"] == result.policy["conv3"]
        assert result.policy["conv1"].act_bits == result.policy["fc"].act_bits
        if method == "asga":
            assert result.log_probs["conv2"] == result.log_probs["conv3"]
            assert len(set(result.log_probs["conv2"].weight)) == 5
        other = result.policy_for(Budget(size="w5"))
        assert other["conv2"] == other["conv3"]

    @pytest.mark.parametrize("given", [False, True], ids=["no example_inputs", "example_inputs"])
    def test_rules(self, labeled_batches, given):
        torch.manual_seed(0)
        model = resnet20(num_classes=3, in_channels=1)
        space = SearchSpace(weight_bits=(2, 4), act_bits=(2, 4), groups=["residual"])
        example = {"example_inputs": torch.zeros(1, 1, 8, 8)} if given else {}
        searcher = PolicySearcher(model, space, budget=W4A4, **example)
        profiles, _ = searcher.check(labeled_batches())
        assert [len(group.layers) for group in searcher.choices.groups] == [5, 4, 2]
        assert len(searcher.start(labeled_batches()).relaxation.logits) == 2 * 20 - (4 + 3 + 1)
        assert list(profiles) == list(searcher.choices.names)


class TestResult:
    def test_policy_follows_the_space(self, tiny_net, labeled_batches):
        space = SearchSpace(weight_bits=(2, 5), act_bits=(3, 7), first_last=(8, 6), exclude=["conv3"])
        policy = search(tiny_net(), labeled_batches(), space, budget=Budget(bitops="w5a7")).policy
        assert policy["conv1"] == policy["fc"] == LayerPolicy(8, 6)
        assert policy["conv3"] == LayerPolicy(None, None)
        assert policy["conv2"].weight_bits in (2, 5)
        assert policy["conv2"].act_bits in (3, 7)

    def test_single_candidates_leave_nothing_to_choose(self, tiny_net, labeled_batches):
        space = SearchSpace(weight_bits=(4,), act_bits=(3,))
        result = search(tiny_net(), labeled_batches(), space)
        assert result.policy == result.choices.uniform(4, 3)
        assert result.expected_cost == pytest.approx(result.cost_shares(result.policy))

    def test_meta(self, tiny_net, labeled_batches):
        meta = search(tiny_net(), labeled_batches(), meta={"architecture": "tiny"}).policy.meta
        assert meta["architecture"] == "tiny"
        assert meta["budget"] == {"bitops": "w4a4"}
        assert meta["costs"]["bitops"] <= meta["limits"]["bitops"]

    def test_probabilities_sum_to_one_and_have_moved(self, tiny_net, labeled_batches):
        result = search(tiny_net(), labeled_batches())
        for name in ("conv2", "conv3"):
            for log_probs in (result.log_probs[name].weight, result.log_probs[name].act):
                assert sum(map(math.exp, log_probs)) == pytest.approx(1)
                assert len(set(log_probs)) == 5
        assert result.log_probs["conv1"].weight == (0.0,)

    @METHODS
    def test_a_loop_of_ones_own_makes_the_same_steps(self, tiny_net, labeled_batches, method):
        batches = labeled_batches()
        torch.manual_seed(0)
        result = search(tiny_net(), batches, method=method)
        torch.manual_seed(0)
        started = PolicySearcher(tiny_net(), budget=W4A4, epochs=1, method=method).start(batches)
        for inputs, labels in batches:
            assert started.step(inputs, labels).metrics.keys() == {"loss", "accuracy"}
        assert started.log_probs() == result.log_probs

    @METHODS
    def test_the_model_is_left_alone(self, tiny_net, labeled_batches, bits_of, method):
        model = tiny_net().eval()
        before = bits_of(copy.deepcopy(model.state_dict()))
        search(model, labeled_batches(), method=method)
        assert bits_of(model.state_dict()) == before
        assert not model.training

    @METHODS
    def test_learns(self, tiny_net, labeled_batches, method):
        history = search(tiny_net(), labeled_batches(12), epochs=6, lr=0.1, method=method).history
        assert history[-1]["loss"] < 0.8 * history[0]["loss"]
        assert history[-1]["temperature"] == pytest.approx(0.2)
        assert ("rho" in history[0]) is (method == "asga")

    def test_metrics(self, tiny_net, labeled_batches, tmp_path):
        folder = RunFolder(tmp_path, "search", {})
        search(tiny_net(), labeled_batches(), epochs=2, folder=folder)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [(line["event"], line["stage"], line["epoch"]) for line in lines] == [
            ("probabilities", "search", 1),
            ("epoch", "search", 1),
            ("probabilities", "search", 2),
            ("epoch", "search", 2),
        ]
        layers = lines[0]["layers"]
        assert list(layers) == ["conv2", "conv3"]
        assert layers["conv2"]["weight_bits"] == [2, 3, 4, 6, 8]
        assert sum(layers["conv2"]["act_probs"]) == pytest.approx(1)
        assert lines[1]["multiplier"].keys() == lines[1]["expected_cost"].keys() == {"bitops"}

    def test_bfloat16(self, tiny_net, labeled_batches):
        assert math.isfinite(search(tiny_net(), labeled_batches(), autocast=torch.bfloat16).history[0]["loss"])


@METHODS
def test_batches_of_any_form(tiny_net, labeled_batches, bits_of, batch_form, method):
    """The same search as with pairs of tensors."""
    wrapper, form = batch_form
    batches = labeled_batches()
    torch.manual_seed(0)
    expected = search(tiny_net(), batches, epochs=2, method=method)
    torch.manual_seed(0)
    found = search(wrapper(tiny_net()), [form(*batch) for batch in batches], epochs=2, method=method)
    assert dict(found.policy) == {f"net.{name}": layer for name, layer in expected.policy.items()}
    assert found.log_probs == {f"net.{name}": value for name, value in expected.log_probs.items()}
    assert bits_of(found.history) == bits_of(expected.history)


class TestMethods:
    @pytest.fixture(autouse=True)
    def short_fine_tuning(self, monkeypatch):
        monkeypatch.setattr("asga.search.scoring._TUNING_STEPS", 4)

    @pytest.mark.parametrize("method", list(asga.search.METHODS))
    def test_every_one_gives_the_same_kind_of_result(self, tiny_net, labeled_batches, tmp_path, method):
        budget, batches = Budget(bitops="w3a4", size="w3"), labeled_batches()
        torch.manual_seed(0)
        result = search(tiny_net(), batches, budget=budget, method=method)
        assert result.method == method
        assert all(share <= 1 for share in result.cost_shares(result.policy).values())
        assert list(result.policy) == ["conv1", "conv2", "conv3", "fc"]
        assert result.policy_for(budget) == result.policy
        assert result.policy_for(Budget(bitops="w2a2")) == result.choices.uniform(2, 2)
        assert result.trained is bool(result.expected_cost) is ("loss" in result.history[-1])
        result.save(tmp_path / "search.json")
        loaded = asga.SearchResult.load(tmp_path / "search.json")
        assert (loaded.method, loaded.uniform, loaded.log_probs) == (method, result.uniform, result.log_probs)
        torch.manual_seed(0)
        again = search(tiny_net(), batches, budget=budget, method=method)
        assert (again.policy, again.log_probs, again.uniform) == (result.policy, result.log_probs, result.uniform)

    @pytest.mark.parametrize(
        ("method", "variant", "radius"),
        [("asga", "aligned", "adaptive"), ("aligned", "aligned", "constant"), ("sam", "sam", "constant")],
    )
    def test_variant_and_radius(self, tiny_net, labeled_batches, method, variant, radius):
        """A fixed one is SAM's customary 0.05, or whatever is asked for."""

        def optimizer(**options: object):
            started = PolicySearcher(tiny_net(), budget=W4A4, epochs=1, method=method, **options).start(
                labeled_batches()
            )
            before = started.parts["optimizer"].rho.item()
            started.step(*labeled_batches()[0])
            return started.parts["optimizer"], before

        found, before = optimizer()
        assert found.options.variant == variant
        assert (found.rho.item() == before == 0.05) is (radius == "constant")
        if radius == "constant":
            found, before = optimizer(optimizer_options={"rho_max": 0.2, "variant": "gsam"})
            assert found.options.variant == "gsam"
            assert found.rho.item() == before == 0.2

    @pytest.mark.parametrize("method", list(asga.search.METHODS))
    def test_impossible_budget(self, tiny_net, labeled_batches, method):
        with pytest.raises(InfeasibleBudgetError, match="least possible"):
            search(tiny_net(), labeled_batches(), budget=Budget(bitops=1000), method=method)

    def test_sensitivities_are_the_scores(self, tiny_net, labeled_batches):
        batches = labeled_batches()
        result = search(tiny_net(), batches, method="sensitivity", measure_batches=2)
        found = asga.search.gradient_sensitivity(tiny_net(), SearchSpace(), batches[:2])
        assert result.log_probs["conv2"].weight == tuple(-x for x in found["conv2"].weight)
        assert result.log_probs["conv3"].act == tuple(-x for x in found["conv3"].act)

    def test_uniform_is_the_pair_of_least_loss(self, tiny_net, labeled_batches):
        result = search(tiny_net(), labeled_batches(), method="uniform")
        assert list(result.uniform.pairs) == ["w2a8", "w4a4", "w8a2"]
        best = result.uniform.best
        assert result.policy == result.choices.uniform(int(best[1]), int(best[3]))
        assert result.uniform.policy == result.uniform.pairs[best]

    def test_random_differs_from_seed_to_seed(self, tiny_net, labeled_batches):
        policies = []
        for seed in range(4):
            torch.manual_seed(seed)
            policies.append(search(tiny_net(), labeled_batches(), method="random").policy)
        assert any(policy != policies[0] for policy in policies)

    @WITHOUT_TRAINING
    def test_make_no_steps(self, tiny_net, labeled_batches, method):
        with pytest.raises(ValueError, match=f"method is '{method}', which makes no steps"):
            PolicySearcher(tiny_net(), budget=W4A4, method=method).start(labeled_batches())

    @WITHOUT_TRAINING
    def test_the_model_is_left_alone(self, tiny_net, labeled_batches, bits_of, method):
        model = tiny_net()
        before = bits_of(copy.deepcopy(model.state_dict()))
        search(model, labeled_batches(), method=method)
        assert bits_of(model.state_dict()) == before
        assert model.training

    def test_a_policy_no_better_than_uniform_is_warned_of(self, tiny_net, labeled_batches):
        space = SearchSpace(weight_bits=(4,), act_bits=(3,))
        with pytest.warns(NotBetterThanUniform, match="^the policy is the uniform pair w4a3 itself: loss"):
            search(tiny_net(), labeled_batches(), space)


class Shared(nn.Module):
    """A layer that is registered under two names and called by both, and two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(8, 8)
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.tied = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.tied[1].weight = self.tied[0].weight
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for layer in (self.stem, self.first, self.second, *self.tied):
            x = layer(x).relu()
        return self.head(x)


@METHODS
class TestSharedModules:
    DATA = tuple((torch.randn(8, 8, generator=torch.Generator().manual_seed(k)), torch.arange(8) % 3) for k in (0, 1))

    def test_two_names_are_one_layer_that_is_called_twice(self, method):
        result = search(Shared(), self.DATA, method=method)
        assert list(result.policy) == ["stem", "first", "tied.0", "tied.1", "head"]
        assert result.profiles["first"].macs == 2 * result.profiles["stem"].macs
        assert result.profiles["first"].weight_numel == 64
        quantized = asga.quantize(Shared(), result.policy)
        assert quantized.second is quantized.first
        assert quantized.first.weight_quantizer.bits == result.policy["first"].weight_bits

    def test_a_pin_by_the_second_name_is_refused(self, method):
        with pytest.raises(ValueError, match="the pattern 'second' matches no quantizable layer"):
            search(Shared(), self.DATA, SearchSpace(pinned={"second": 4}), method=method)

    def test_tied_weights_have_the_same_bits_and_are_stored_once(self, method):
        result = search(Shared(), self.DATA, budget=Budget(size="w3"), method=method)
        assert result.choices.groups == (Group(("tied.0", "tied.1"), "weight"),)
        assert result.policy["tied.0"].weight_bits == result.policy["tied.1"].weight_bits
        by_hand = 8 * (64 + 24) + 3 * (64 + 64) + 32 * (8 + 8 + 8 + 3) + 5 * 32
        assert result.policy.meta["limits"] == {"size_bits": by_hand}
        quantized = asga.quantize(Shared(), result.policy)
        scales = [p for name, p in quantized.named_parameters() if "weight_quantizer" in name]
        assert sum(p.numel() for p in scales) == 8 + 8 + 8 + 3

    def test_tied_weights_stay_so_whatever_their_bits(self, method):
        space = SearchSpace(pinned={"tied.0": (2, 4), "tied.1": (6, 4)})
        started = PolicySearcher(Shared(), space, budget=W4A4, epochs=1, method=method).start(self.DATA)
        tied = started.model.tied
        before = tied[0].weight.detach().clone()
        for batch in self.DATA:
            started.step(*batch)
        assert tied[1].weight is tied[0].weight
        assert not torch.equal(tied[0].weight, before)
        policy = search(Shared(), self.DATA, space, method=method).policy
        quantized = asga.quantize(Shared(), policy)
        assert quantized.tied[1].weight is quantized.tied[0].weight
        assert [layer.weight_quantizer.bits for layer in quantized.tied] == [2, 6]


class TestCompare:
    """A policy of no search, beside uniform ones."""

    def test_all_are_fine_tuned(self, tiny_net, labeled_batches, bits_of):
        model, batches = tiny_net(), labeled_batches()
        searcher = PolicySearcher(model, budget=W4A4, lr=0.05)
        before = bits_of(model.state_dict())
        policy = searcher.choices.uniform(2, 2)
        torch.manual_seed(0)
        found = searcher.compare(policy, batches)
        assert found.tuned
        assert "w4a4" in found.pairs
        assert found.policy.cost_shares["bitops"] < 0.6
        assert found.policy.loss < nn.functional.cross_entropy(torch.zeros(1, 3), torch.tensor([0]))
        assert bits_of(model.state_dict()) == before
        torch.manual_seed(0)
        assert searcher.compare(policy, batches) == found

    def test_a_uniform_policy_is_itself(self, tiny_net, labeled_batches):
        space = SearchSpace(weight_bits=(4,), act_bits=(4,))
        searcher = PolicySearcher(tiny_net(), space, budget=W4A4)
        found = searcher.compare(searcher.choices.uniform(4, 4), labeled_batches())
        assert found.verdict == "the uniform pair w4a4 itself"

    def test_a_policy_of_another_model(self, tiny_net, labeled_batches):
        with pytest.raises(ValueError, match="the policy is for another architecture"):
            PolicySearcher(tiny_net(), budget=W4A4).compare(Policy({"a": LayerPolicy(4, 4)}), labeled_batches())


class TestFormats:
    """Small floats beside integers, in every method."""

    FLOATS = SearchSpace(formats=("int2", "int4", "fp4", "int8", "fp8"))

    @pytest.mark.parametrize("method", ["asga", "sgd", "sensitivity", "hawq", "uniform", "random"])
    def test_are_candidates_like_others(self, tiny_net, labeled_batches, method, tmp_path):
        result = search(tiny_net(), labeled_batches(2), self.FLOATS, budget=Budget(bitops="w5a4"), method=method)
        assert result.policy["conv2"].weight_bits in self.FLOATS.weight_bits
        assert result.cost_shares(result.policy)["bitops"] <= 1
        assert any("fp" in pair for pair in result.uniform.pairs)
        result.save(tmp_path / "search.json")
        assert asga.SearchResult.load(tmp_path / "search.json").policy == result.policy

    def test_weights_alone(self, tiny_net, labeled_batches):
        space = SearchSpace(formats=("int4", "fp4", "fp8"), act_bits=None, first_last=("fp8", None))
        result = search(tiny_net(), labeled_batches(), space, budget=Budget(size="w6"))
        assert {layer.act_bits for layer in result.policy.values()} == {None}
        assert set(result.gaps()["conv2"]) == {"weight"}
        assert set(result.uniform.pairs) <= {"w4", "wfp4"}

    def test_with_perturbed_quantized_weights(self, tiny_net, labeled_batches):
        result = search(tiny_net(), labeled_batches(), self.FLOATS, optimizer_options={"perturb": "quantized"})
        assert all(math.isfinite(record["loss"]) for record in result.history)

    def test_of_a_target(self, tiny_net, labeled_batches):
        with pytest.raises(ValueError, match="tensorrt cannot run"):
            PolicySearcher(tiny_net(), SearchSpace(target="tensorrt"), budget=W4A4)
        space = SearchSpace(weight_bits=(8,), act_bits=(8,), target="tensorrt", exclude=("fc",))
        result = search(tiny_net(), labeled_batches(), space, budget=Budget(bitops="w8a8"))
        assert result.policy.meta["deployment_target"] == "tensorrt"


class TestLogits:
    def test_train_on_the_batches_held_out_and_weights_on_the_others(self, tiny_net, labeled_batches):
        """Where the weights stand still, other images to train them on leave the logits as they are."""
        batches = labeled_batches(8)
        _, held_out = split_loader(batches, 0.25)
        apart = {id(held_out.batch(step)[0]) for step in range(2)}

        def logits(changed: list[int], **options: object) -> dict[str, object]:
            other = [(x + 1 if i in changed else x, y) for i, (x, y) in enumerate(batches)]
            torch.manual_seed(0)
            started = PolicySearcher(
                tiny_net(), budget=W4A4, epochs=1, calibration_batches=1, held_out=0.25, **options
            ).start(other)
            assert len(started.loader) == 6
            for inputs, labels in started.loader:
                started.step(inputs, labels)
            return started.log_probs()

        train = [i for i, (x, _) in enumerate(batches) if i > 0 and id(x) not in apart]
        held = [i for i, (x, _) in enumerate(batches) if i > 0 and id(x) in apart]
        still = {"lr": 0.0, "method": "sgd"}
        assert logits([], **still) == logits(train, **still) != logits(held, **still)
        assert logits([]) != logits(train)

    def test_alternating_leaves_running_statistics_to_the_weights(self, tiny_net, labeled_batches):
        started = PolicySearcher(tiny_net(), budget=W4A4, epochs=1, held_out=0.25).start(labeled_batches(8))
        started.step(*started.loader[0])
        assert started.model.bn1.num_batches_tracked == 1

    @METHODS
    def test_weight_decay_touches_neither_logits_nor_scales(self, tiny_net, labeled_batches, method):
        def after(weight_decay: float) -> dict[str, torch.Tensor]:
            torch.manual_seed(0)
            started = PolicySearcher(
                tiny_net(),
                budget=Budget(bitops="w3a3"),
                epochs=1,
                method=method,
                lr=0.1,
                weight_decay=weight_decay,
                loss_fn=lambda logits, labels: logits.sum() * 0,
            ).start(labeled_batches())
            for inputs, labels in labeled_batches():
                started.step(inputs, labels)
            return started.model.state_dict()

        without, decayed = after(0.0), after(0.5)
        changed = {name for name in without if not torch.equal(without[name], decayed[name])}
        assert {"conv2.weight", "conv3.weight", "fc.weight"} <= changed
        assert not any("scale" in name or "logits" in name or "bias" in name for name in changed)
        assert without["conv2.weight_quantizer.logits"].any()  # moved, by the cost

    @pytest.mark.parametrize("held_out", [0.0, 1.0, 1.5])
    def test_share_out_of_range(self, tiny_net, held_out):
        with pytest.raises(ValueError, match="held_out is"):
            PolicySearcher(tiny_net(), budget=W4A4, held_out=held_out)

    @pytest.mark.parametrize("relaxation", ["gumbel", "softmax"])
    def test_learns(self, tiny_net, labeled_batches, relaxation):
        options = {"relaxation": relaxation, "budget": Budget(bitops="w3a3"), "lr": 0.1}
        result = search(tiny_net(), labeled_batches(12), epochs=6, **options)
        assert result.history[-1]["loss"] < result.history[0]["loss"]
        assert result.history[-1]["temperature"] == pytest.approx(0.2)
        assert result.expected_cost["bitops"] == pytest.approx(1, abs=0.2)

    @pytest.mark.parametrize("relaxation", ["softmax", "gumbel"])
    def test_temperature_falls_exponentially(self, tiny_net, labeled_batches, relaxation):
        """One step an epoch; what is logged after a step is what the next one would have, the last one's at the end."""
        options = {"relaxation": relaxation, "temperature": (4.0, 0.25)}
        history = search(tiny_net(), labeled_batches(1), epochs=5, **options).history
        assert [record["temperature"] for record in history] == pytest.approx([2, 1, 0.5, 0.25, 0.25])


class TestNotFinite:
    @METHODS
    @pytest.mark.parametrize("bad", [0, 3], ids=["first batch", "a later batch"])
    def test_one_batch_is_skipped(self, tiny_net, labeled_batches, tmp_path, run_contents, method, bad):
        batches = labeled_batches()
        batches[bad][0][0, 0, 0, 0] = math.nan
        folder = RunFolder(tmp_path, "search", {})
        result = search(tiny_net(), batches, epochs=2, method=method, folder=folder)
        state = folder.load_checkpoint()["parts"]["model"]
        assert all(torch.isfinite(value).all() for value in state.values())
        assert state["bn1.num_batches_tracked"] == 10  # of 12 steps
        assert all(math.isfinite(record["loss"]) for record in result.history)
        assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()

    @METHODS
    def test_every_batch(self, tiny_net, labeled_batches, method):
        batches = [(x * math.nan, y) for x, y in labeled_batches()]
        with pytest.raises(TrainingError, match="every batch of the loader holds NaN"):
            search(tiny_net(), batches, method=method)

    @METHODS
    def test_loss(self, tiny_net, labeled_batches, tmp_path, method):
        folder = RunFolder(tmp_path, "search", {})
        with pytest.raises(TrainingError, match="the loss is nan for 10 steps in a row"):
            search(
                tiny_net(),
                labeled_batches(),
                epochs=3,
                method=method,
                folder=folder,
                loss_fn=lambda logits, labels: logits.sum() * math.nan,
            )
        assert folder.load_checkpoint() is None  # no state has been good

    @pytest.mark.parametrize("method", ["sgd", "hawq", "random", "sensitivity", "uniform"])
    def test_loss_of_one_batch_that_policies_are_measured_on(self, tiny_net, labeled_batches, tmp_path, method):
        batches = labeled_batches()

        def loss_fn(logits, labels):
            return functional.cross_entropy(logits, labels) * (math.nan if labels.equal(batches[1][1]) else 1.0)

        space = SearchSpace(weight_bits=(2, 4), act_bits=(4, 8))
        result = search(tiny_net(), batches, space, method=method, loss_fn=loss_fn)
        scores = (result.uniform.policy, *result.uniform.pairs.values())
        assert all(len(score.losses) == 2 and score.finite for score in scores)
        assert all(math.isfinite(p) for found in result.log_probs.values() for p in (*found.weight, *found.act))
        result.save(tmp_path / "search.json")

    @WITHOUT_TRAINING
    def test_loss_of_methods_without_training(self, tiny_net, labeled_batches, monkeypatch, method):
        """Known before the first policy is scored."""
        monkeypatch.setattr("asga.search.scoring.Scorer.__call__", pytest.fail)
        message = "the loss of the float model, in eval mode, is nan on batch 1 of the proxy, and .* any of the 6 "
        with pytest.raises(TrainingError, match=message):
            search(tiny_net(), labeled_batches(), method=method, loss_fn=lambda logits, _: logits.sum() * math.nan)

    def test_policies_whose_loss_is_not_finite(self, tiny_net, labeled_batches, monkeypatch):
        """Uniform pairs are left out; a policy is refused."""
        measured, worst = Scorer._measured, []

        def measure(scorer, model, policy):
            score = measured(scorer, model, policy)
            worst.append(policy)
            return replace(score, losses=(math.nan,) * len(score.losses)) if policy == worst[0] else score

        monkeypatch.setattr(Scorer, "_measured", measure)
        space = SearchSpace(weight_bits=(2, 4, 8), act_bits=(2, 4, 8))
        result = search(tiny_net(), labeled_batches(), space, method="uniform")
        assert len(result.uniform.pairs) == len({str(policy) for policy in worst}) - 1
        assert result.policy != worst[0]
        worst.clear()
        with pytest.raises(TrainingError, match="a loss of the policy on the proxy is not finite"):
            search(tiny_net(), labeled_batches(), SearchSpace(weight_bits=(2,), act_bits=(3,)), method="random")

    @METHODS
    def test_goes_back_when_it_goes_on(self, tiny_net, labeled_batches, tmp_path, bits_of, method):
        """Eleven bad batches of fourteen, one after the other, in each epoch."""
        batches = labeled_batches(14)
        for inputs, _ in batches[2:13]:
            inputs[:] = math.nan
        torch.manual_seed(0)
        result = search(tiny_net(), batches, epochs=2, method=method, folder=RunFolder(tmp_path, "search", {}))
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        returns = [(line["epoch"], line["step"], line["what"]) for line in lines if line["event"] == "recovery"]
        said = {
            "asga": ("half the radius (rho_max is now 0.25)", "half the radius (rho_max is now 0.125)"),
            "sgd": ("half the learning rate", "half the learning rate"),
        }[method]
        problem = "the loss is nan for 10 steps in a row: back to"
        assert returns == [
            (1, 12, f"{problem} epoch 1, step 0, {said[0]}"),
            (2, 12, f"{problem} epoch 2, step 0, {said[1]}"),
        ]
        assert [record["skipped_steps"] for record in result.history] == [11, 11]
        assert all(math.isfinite(p) for found in result.log_probs.values() for p in (*found.weight, *found.act))
        # Time goes on: the temperature has come down as far as ever.
        assert result.history[-1]["temperature"] == pytest.approx(0.2)


class _SideLayer(nn.Module):
    """A layer whose output the loss never sees."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.side = nn.Linear(8, 8)
        self.last = nn.Linear(3, 3)

    def forward(self, x):
        self.side(x.mean((1, 2)))
        return self.last(self.net(x))


class TestBadInput:
    @METHODS
    def test_labels_exceed_the_classes(self, tiny_net, labeled_batches, method):
        with pytest.raises(TrainingError, match="the label 2, but the model has 2 classes"):
            search(tiny_net(num_classes=2), labeled_batches(), method=method)

    def test_a_layer_that_is_never_called_can_be_excluded(self, tiny_net, labeled_batches):
        model = tiny_net()
        model.spare = nn.Linear(3, 3)
        with pytest.raises(ValueError, match=r"forward: 'spare'\. .* exclude it from the search"):
            search(model, labeled_batches())
        result = search(model, labeled_batches(), SearchSpace(exclude=["spare"]))
        assert result.policy["spare"] == LayerPolicy(None, None)
        assert result.profiles["spare"].macs == 0

    @pytest.mark.parametrize("meta", [{"path": Path("x")}, {"loss": math.nan}], ids=str)
    def test_meta_that_no_policy_could_be_saved_with(self, tiny_net, meta):
        with pytest.raises((TypeError, ValueError), match="meta cannot be kept as JSON"):
            PolicySearcher(tiny_net(), budget=W4A4, meta=meta)

    def test_a_model_that_cannot_be_evaluated(self, tiny_net, labeled_batches, tmp_path):
        """It is known before the search, not after it."""

        class Detector(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = tiny_net()

            def forward(self, x):
                return self.net(x) if self.training else {"boxes": self.net(x)}

        with pytest.raises(TrainingError, match="the model gives a dict"):
            search(Detector(), labeled_batches(), progress=pytest.fail, folder=tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_layers_that_are_called_from_a_plain_list(self, labeled_batches):
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.convs = [nn.Conv2d(1, 1, 3, padding=1) for _ in range(3)]
                for k, conv in enumerate(self.convs):
                    self.add_module(f"conv{k}", conv)

            def forward(self, x):
                for conv in self.convs:
                    x = conv(x)
                return x.mean(2)[:, 0]

        with (
            pytest.warns(UserWarning, match="no calibration batch reached"),
            pytest.raises(ValueError, match=r"never called in place of 'conv0', .* use nn\.ModuleList"),
        ):
            search(Net(), labeled_batches(), progress=pytest.fail)

    def test_the_model_is_left_as_it_was(self, tiny_net, labeled_batches):
        """A norm that is frozen stays so, and what counts the calls does not see those of the search."""

        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.net, self.norm = tiny_net(), nn.BatchNorm1d(3)
                self.register_buffer("calls", torch.zeros(()))

            def forward(self, x):
                self.calls += 1
                return self.norm(self.net(x))

        model = Counting().train()
        model.norm.eval()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        search(model, labeled_batches())
        assert (model.training, model.norm.training) == (True, False)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    def test_numbers_of_numpy(self, tiny_net, labeled_batches, tmp_path):
        counts = dict.fromkeys(("epochs", "calibration_batches", "measure_batches", "checkpoint_every"), np.int64(1))
        numbers = {"lr": np.float64(0.01), "logit_lr": np.float32(0.03), "weight_decay": np.float64(0.0)}
        others = {"momentum": np.float32(0.9), "warmup": np.int32(2), "temperature": np.array([1.0, 0.5])}
        options = {**counts, **numbers, **others, "optimizer_options": {"rho_max": np.float64(0.2)}}
        options["temperature"] = tuple(options["temperature"])
        search(tiny_net(), labeled_batches(2), folder=tmp_path / "run", **options)
        search(tiny_net(), labeled_batches(2), folder=tmp_path / "run", progress=pytest.fail, **options)

    @pytest.mark.parametrize(("loader", "message"), [([], "loader is empty"), (iter([]), "without a length")])
    def test_loader(self, tiny_net, loader, message):
        with pytest.raises(ValueError, match=message):
            search(tiny_net(), loader)

    @pytest.mark.parametrize("kind", ["tensor", "list", "words"])
    def test_single_class(self, tiny_net, kind):
        class Data(TensorDataset):
            targets = {"tensor": torch.ones(8, dtype=torch.int64), "list": [1] * 8, "words": ["cat"] * 8}[kind]

        loader = DataLoader(Data(torch.zeros(8, 1, 8, 8), torch.ones(8, dtype=torch.int64)), batch_size=4)
        with pytest.raises(ValueError, match="the proxy has a single class"):
            search(tiny_net(), loader)

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (nn.Sequential(nn.Flatten(), nn.ReLU()), "no layer that can be quantized"),
            (nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 3)), "no layer is left to search"),
        ],
        ids=["no layer", "first and last only"],
    )
    def test_nothing_to_search(self, model, message):
        with pytest.raises(ValueError, match=message):
            PolicySearcher(model, budget=W4A4, epochs=1)

    @pytest.mark.parametrize("wrap", [lambda y: {"scores": y}, lambda y: (y, None)], ids=["dict", "tuple"])
    def test_output_is_no_tensor(self, tiny_net, labeled_batches, wrap):
        class Wrapped(nn.Module):
            def __init__(self, net):
                super().__init__()
                self.net = net

            def forward(self, x):
                return wrap(self.net(x))

        with pytest.raises(TrainingError, match="a tensor of logits"):
            search(Wrapped(tiny_net()), labeled_batches())

    def test_odd_batches(self, tiny_net):
        with pytest.raises(TypeError, match="a batch is a dict of 'x': Tensor, 'y': Tensor"):
            search(tiny_net(), [{"x": torch.zeros(2, 1, 8, 8), "y": torch.zeros(2)}])

    @METHODS
    def test_a_layer_without_gradient_is_named_and_does_no_harm(self, tiny_net, labeled_batches, method):
        budget = Budget(size="w4")  # so that its activation logits have no gradient from the costs either
        with pytest.warns(UserWarning, match="the loss does not depend on the bits of 'side'"):
            result = search(_SideLayer(tiny_net()), labeled_batches(), budget=budget, method=method)
        assert result.history[0]["without_gradient"] == ["side"]
        assert len(set(result.log_probs["side"].act)) == 1

    @METHODS
    def test_frozen_weights_have_bits_to_choose_all_the_same(self, tiny_net, labeled_batches, method, recwarn):
        model = tiny_net().requires_grad_(False)
        result = search(model, labeled_batches(), method=method)
        assert "without_gradient" not in result.history[0]
        assert len(set(result.log_probs["conv2"].weight)) == 5
        assert not any("does not depend" in str(warning.message) for warning in recwarn)

    @pytest.mark.parametrize("method", list(asga.search.METHODS))
    def test_a_layer_called_twice_costs_twice(self, twice_net, labeled_batches, method):
        result = search(twice_net(), labeled_batches(), budget=Budget(bitops="w3a3"), method=method)
        assert result.profiles["twice"].macs == 2 * 8 * 8 * 4 * 4 * 9
        assert result.cost_shares(result.policy)["bitops"] <= 1

    @pytest.mark.parametrize("targets", [torch.ones(8, 3), ["defect"], len, [{"boxes": 1}] * 8], ids=str)
    def test_what_a_dataset_says_that_is_no_class_of_every_sample(self, tiny_net, labeled_batches, targets):
        (images, labels), *_ = labeled_batches(1)
        dataset = TensorDataset(images, labels)
        dataset.targets = targets
        search(tiny_net(), DataLoader(dataset, batch_size=4), method="sensitivity")

    @pytest.mark.parametrize("shuffle", [False, True])
    def test_single_class_in_the_batches_alone(self, tiny_net, shuffle):
        loader = DataLoader(
            TensorDataset(torch.randn(8, 1, 8, 8), torch.ones(8, dtype=torch.int64)), batch_size=4, shuffle=shuffle
        )
        for method in ("asga", "sensitivity"):
            whose = "the proxy has" if method == "asga" else "the first 2 batches of the proxy have"
            with pytest.raises(ValueError, match=rf"{whose} a single class.* All labels are 1"):
                search(tiny_net(), loader, epochs=3, method=method)

    def test_loaders_sorted_by_class(self, tiny_net):
        labels = torch.arange(2).repeat_interleave(8)
        loader = DataLoader(TensorDataset(torch.randn(16, 1, 8, 8), labels), batch_size=4)
        assert search(tiny_net(), loader, epochs=2).history

    @pytest.mark.parametrize(
        "wrap",
        [torch.compile, nn.DataParallel, lambda model: torch.compile(nn.DataParallel(model))],
        ids=["compiled", "data parallel", "both"],
    )
    def test_a_wrapped_model_has_the_names_of_its_own_layers(self, tiny_net, labeled_batches, wrap):
        result = search(wrap(tiny_net()), labeled_batches())
        assert list(result.policy) == ["conv1", "conv2", "conv3", "fc"]
        assert next(iter(asga.quantize(wrap(tiny_net()), result.policy).state_dict())) == "conv1.weight"

    def test_a_wrapped_part_is_named(self, tiny_net):
        model = nn.Sequential(tiny_net(), nn.Linear(3, 3))
        model[0].conv2 = torch.compile(model[0].conv2)
        with pytest.raises(ValueError, match=r"the module '0\.conv2' is wrapped by OptimizedModule"):
            PolicySearcher(model, budget=W4A4)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs is 0"),
            ({"calibration_batches": 0}, "calibration_batches is 0"),
            ({"method": "hawk"}, "method is 'hawk'; it must be one of 'asga'"),
            ({"temperature": (0.2, 1.0)}, r"temperature is \(0.2, 1.0\); the second must be above zero and"),
            ({"temperature": (1.0, 0.0)}, r"temperature is \(1.0, 0.0\); the second must be above zero and"),
            ({"lr": -1}, "lr is -1; it must be finite and not negative"),
            ({"lr": math.nan}, "lr is nan"),
            ({"logit_lr": -0.1}, "logit_lr is -0.1"),
            ({"weight_decay": math.inf}, "weight_decay is inf"),
            ({"momentum": 1.0}, "momentum is 1.0; it must be below 1 and not negative"),
            ({"warmup": -1}, "warmup is -1; it must be at least 0"),
            ({"measure_batches": 0}, "measure_batches is 0"),
            ({"checkpoint_every": 0}, "checkpoint_every is 0"),
            ({"autocast": torch.int8}, r"autocast is torch.int8; it must be torch.bfloat16"),
            (
                {"optimizer_options": {"rho_mx": 0.2}},
                "'rho_mx', which is no option of method 'asga'; did you mean ",
            ),
            ({"optimizer_options": {"rho_max": 0.2}, "method": "sgd"}, "'rho_max', which is no option of method 'sgd'"),
            ({"optimizer_options": {"lr": 0.2}}, "optimizer_options has 'lr', an argument of its own: lr=0.2"),
            ({"optimizer_options": {"rho_max": -1}}, "rho_max is -1; it must be finite and not negative"),
        ],
    )
    def test_options_out_of_range(self, tiny_net, options, message):
        with pytest.raises(ValueError, match=message):
            PolicySearcher(tiny_net(), **{"budget": W4A4, "epochs": 1, **options})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"budget": "w4a4"}, r"budget is 'w4a4'; a Budget is needed, such as Budget\(bitops='w4a4'\)"),
            ({"budget": 1000}, r"budget is 1000; a Budget is needed, such as Budget\(bitops='w4a4'\)"),
            ({"space": {}}, "space is {}; a SearchSpace"),
            ({"epochs": 1.5}, "epochs is 1.5; an integer is needed"),
            ({"epochs": True}, "epochs is True; an integer is needed"),
            ({"warmup": 0.1}, "warmup is 0.1; an integer is needed"),
            ({"lr": "0.1"}, "lr is '0.1'; a number is needed"),
            ({"held_out": "0.1"}, "held_out is '0.1'; a number is needed"),
            ({"temperature": 1.0}, "temperature is 1.0; a pair is needed"),
            ({"temperature": ("1", "0.2")}, r"temperature\[0\] is '1'; a number is needed"),
            ({"autocast": "bfloat16"}, "autocast is 'bfloat16'; a dtype such as torch.bfloat16, or None, is needed"),
            ({"optimizer_options": [0.2]}, r"optimizer_options is \[0.2\]; a mapping"),
            ({"latency_table": "times.csv"}, "latency_table is 'times.csv'; a LatencyTable"),
            ({"folder": 3}, "folder is 3; a path or a RunFolder"),
            ({"optimizer_options": []}, r"optimizer_options is \[\]; a mapping"),
            ({"loss_fn": "mse"}, "loss_fn is 'mse'; a function is needed"),
            ({"progress": True}, "progress is True; a function, or None, is needed"),
            ({"stage": 1}, "stage is 1; a name is needed"),
            ({"meta": "resnet20"}, "meta is 'resnet20'; a mapping is needed"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_options_of_another_type(self, tiny_net, options, message):
        with pytest.raises(TypeError, match=message):
            PolicySearcher(tiny_net(), **{"budget": W4A4, "epochs": 1, **options})

    def test_a_converted_model(self, tiny_net):
        quantized = asga.quantize(tiny_net(), SearchSpace().choices(tiny_net()).uniform(4, 4))
        with pytest.raises(ValueError, match="the model is converted already"):
            PolicySearcher(quantized, budget=W4A4)

    @pytest.mark.parametrize("example_inputs", [None, torch.zeros(1, 3)], ids=["without", "with"])
    def test_a_model_without_parameters(self, example_inputs):
        with pytest.raises(ValueError, match="no layer that can be quantized"):
            PolicySearcher(nn.Flatten(), budget=W4A4, example_inputs=example_inputs)

    def test_no_model(self):
        with pytest.raises(TypeError, match=r"model is 'resnet20'; a torch.nn.Module is needed"):
            PolicySearcher("resnet20", budget=W4A4)

    def test_without_scipy(self, tiny_net, labeled_batches, monkeypatch):
        """Said before the first step, not after the last."""
        monkeypatch.setitem(sys.modules, "scipy.optimize", None)
        with pytest.raises(ImportError, match=r"asga\[search\]"):
            search(tiny_net(), labeled_batches(), budget=Budget(bitops="w3a3"), progress=pytest.fail)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def _kill() -> None:
    raise Killed


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@METHODS
class TestResume:
    """Bit for bit on a CPU: weights, logits, scales, statistics, both optimizers, multiplier, policy and metrics."""

    def _search(self, tiny_net, batches, path, method, *, at=None, end=None, resume=False, **options):
        steps = []

        def progress(state) -> None:
            steps.append(state)
            if end is not None and 6 * (state.epoch - 1) + state.step == at:
                end()

        torch.manual_seed(1)
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        # Draws its order from torch's random numbers, like dropout.
        loader = DataLoader(TensorDataset(inputs, labels), batch_size=8, shuffle=True)
        folder = RunFolder(path, "test", {"method": method}, resume=resume)
        result = search(
            tiny_net(),
            loader,
            epochs=3,
            method=method,
            folder=folder,
            progress=progress,
            **{"budget": Budget(bitops="w3a3", size="w3"), **options},
        )
        return result, len(steps)

    @pytest.mark.parametrize(
        ("at", "end", "left"),
        [(2, _interrupt, 16), (9, _interrupt, 9), (18, _interrupt, 0), (5, _kill, 18), (14, _kill, 6)],
        ids=["stopped early", "stopped", "stopped at the last step", "killed early", "killed"],
    )
    def test_same_as_never_interrupted(
        self, tiny_net, labeled_batches, tmp_path, run_contents, bits_of, method, at, end, left
    ):
        batches = labeled_batches()
        expected, _ = self._search(tiny_net, batches, tmp_path / "whole", method)
        with pytest.raises((KeyboardInterrupt, Killed)):
            self._search(tiny_net, batches, tmp_path / "parts", method, at=at, end=end)
        result, steps = self._search(tiny_net, batches, tmp_path / "parts", method, resume=True)
        assert steps == left
        assert result.policy == expected.policy
        assert result.log_probs == expected.log_probs
        assert result.expected_cost == expected.expected_cost
        assert bits_of(result.history) == bits_of(expected.history)
        assert result.uniform == expected.uniform
        assert run_contents(tmp_path / "parts") == run_contents(tmp_path / "whole")

    def test_in_a_folder_of_that_name(self, tiny_net, labeled_batches, tmp_path, method):
        path = tmp_path / "runs" / "one"
        with pytest.raises(InfeasibleBudgetError):
            search(tiny_net(), labeled_batches(), budget=Budget(bitops=1000), method=method, folder=str(path))
        assert not path.exists()
        options = {"method": method, "folder": str(path), "checkpoint_every": 2}

        def stop(state) -> None:
            if state.step == 4:
                _interrupt()

        with pytest.raises(KeyboardInterrupt):
            search(tiny_net(), labeled_batches(), progress=stop, **options)
        steps = []
        search(tiny_net(), labeled_batches(), progress=steps.append, **options)
        assert [state.step for state in steps] == [5, 6]
        with pytest.raises(RunExistsError, match="holds a run with other options"):
            RunFolder(path, "transfer", {}, resume=True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"lr": 0.5}, "was made with lr 0.01, now it is 0.5"),
            ({"relaxation": "softmax"}, "was made with relaxation gumbel, now it is softmax"),
            ({"loss_fn": nn.MultiMarginLoss()}, "was made with loss_fn cross_entropy, now it is MultiMarginLoss"),
            (
                {"space": SearchSpace(weight_bits=(2, 3, 4, 5, 8))},
                r"candidates of \S+ \(2, 3, 4, 6, 8\) x .* now it is",
            ),
            ({"space": SearchSpace(weight_bits=(2, 4, 8))}, r"candidates of \S+ \(2, 3, 4, 6, 8\) x .* now it is"),
        ],
        ids=["lr", "relaxation", "loss", "other candidates", "fewer candidates"],
    )
    def test_another_search_is_refused(
        self, tiny_net, labeled_batches, tmp_path, run_contents, method, options, message
    ):
        with pytest.raises(KeyboardInterrupt):
            self._search(tiny_net, labeled_batches(), tmp_path, method, at=9, end=_interrupt)
        before = run_contents(tmp_path)
        with pytest.raises(ValueError, match=message):
            self._search(tiny_net, labeled_batches(), tmp_path, method, resume=True, **options)
        assert run_contents(tmp_path) == before

    @pytest.mark.parametrize("changed", ["limits", "costs of the layers"])
    def test_other_costs_are_refused(self, tiny_net, labeled_batches, tmp_path, method, changed):
        """The same words may stand for them: they count what the table and the resolution say."""
        names, bits = SearchSpace().choices(tiny_net()).names, (2, 3, 4, 6, 8)

        def options(conv2: int, conv3: int) -> dict:
            factor = {"conv2": conv2, "conv3": conv3}
            times = {(name, w, a): 1000 * factor.get(name, 1) * w * a for name in names for w in bits for a in bits}
            return {"budget": Budget(latency="w4a4"), "latency_table": LatencyTable(times)}

        with pytest.raises(KeyboardInterrupt):
            self._search(tiny_net, labeled_batches(), tmp_path, method, at=9, end=_interrupt, **options(1, 2))
        other = options(2, 2) if changed == "limits" else options(2, 1)
        with pytest.raises(ValueError, match=f"was made with {changed}"):
            self._search(tiny_net, labeled_batches(), tmp_path, method, resume=True, **other)
        self._search(tiny_net, labeled_batches(), tmp_path, method, resume=True, **options(1, 2))

    @pytest.mark.parametrize(("at", "end"), [(2, _interrupt), (9, _interrupt), (8, _kill)])
    def test_with_noise_and_batches_held_out(self, tiny_net, labeled_batches, tmp_path, run_contents, method, at, end):
        batches, options = labeled_batches(8), {"relaxation": "gumbel", "held_out": 0.25}
        expected, _ = self._search(tiny_net, batches, tmp_path / "whole", method, **options)
        with pytest.raises((KeyboardInterrupt, Killed)):
            self._search(tiny_net, batches, tmp_path / "parts", method, at=at, end=end, **options)
        result, _ = self._search(tiny_net, batches, tmp_path / "parts", method, resume=True, **options)
        assert (result.log_probs, result.uniform) == (expected.log_probs, expected.uniform)
        assert run_contents(tmp_path / "parts") == run_contents(tmp_path / "whole")
