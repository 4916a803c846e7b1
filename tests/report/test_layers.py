import math
from dataclasses import replace

import pytest

from asga.policy import LayerPolicy, Policy
from asga.report.layers import layer_rows, toss_ups
from asga.report.run import read_run


def test_rows_follow_the_policy(run_folder):
    rows = layer_rows(read_run(run_folder))
    assert [(row.name, row.weight.shown, row.act.shown) for row in rows] == [
        ("conv1", "8", "8"),
        ("layer1.0.conv1", "2", "4"),
        ("fc", "float", "8"),
    ]
    assert [(c.bits, c.probability) for c in rows[1].weight.candidates] == [(2, 0.45), (4, 0.44), (8, 0.11)]
    assert rows[0].weight.candidates == ()


def test_gap_is_the_log_ratio_of_the_two_best(run_folder):
    row = layer_rows(read_run(run_folder))[1]
    assert row.weight.gap == pytest.approx(math.log(0.45 / 0.44))
    assert row.act.gap == pytest.approx(math.log(8))
    assert (row.weight.toss_up, row.act.toss_up) == (True, False)


def test_toss_ups_are_counted_among_searched_choices(run_folder):
    assert toss_ups(layer_rows(read_run(run_folder))) == (1, 2)


def test_gaps_of_the_result_go_before_probabilities(run_folder):
    run = read_run(run_folder)
    run = replace(run, result={**run.result, "logit_gaps": {"layer1.0.conv1": {"weight": 0.7}}})
    row = layer_rows(run)[1]
    assert row.weight.gap == 0.7
    assert row.act.gap is None  # it shares its bits with a layer before
    assert toss_ups(layer_rows(run))[1] == 1


def test_while_there_is_no_result_gaps_are_those_of_the_probabilities(run_folder):
    row = layer_rows(replace(read_run(run_folder), result=None))[1]
    assert row.act.gap == pytest.approx(math.log(8))


def test_a_single_candidate_was_not_searched(run_folder):
    found = {
        "layer1.0.conv1": {"weight_bits": [2, 4], "weight_probs": [0.9, 0.1], "act_bits": [None], "act_probs": [1]}
    }
    row = layer_rows(replace(read_run(run_folder), probabilities={"": {1: found}}))[1]
    assert len(row.weight.candidates) == 2
    assert (row.act.candidates, row.act.by_epoch) == ((), None)


def test_without_a_policy_the_searched_layers_are_shown(run_folder):
    (run_folder / "policy.json").unlink()
    rows = layer_rows(read_run(run_folder))
    assert [(row.name, row.weight.bits, row.weight.shown) for row in rows] == [("layer1.0.conv1", None, "")]


def test_a_probability_that_underflowed_is_an_infinite_gap(run_folder):
    run = read_run(run_folder)
    found = {"layer1.0.conv1": {"weight_bits": [2, 4], "weight_probs": [1.0, 0.0], "act_bits": [4], "act_probs": [1.0]}}
    row = layer_rows(replace(run, probabilities={"": {1: found}}))[1]
    assert row.weight.gap == math.inf
    assert row.act.gap is None


def test_small_floats_have_their_names(run_folder):
    run = read_run(run_folder)
    layers = {**run.policy, "layer1.0.conv1": LayerPolicy("fp4", 4)}
    found = {
        "layer1.0.conv1": {"weight_bits": [4, "fp4"], "weight_probs": [0.4, 0.6], "act_bits": [4], "act_probs": [1]}
    }
    choice = layer_rows(replace(run, policy=Policy(layers), probabilities={"seed0": {2: found}}))[1].weight
    assert (choice.bits, choice.shown) == ("fp4", "fp4")
    assert [candidate.shown for candidate in choice.candidates] == ["4 bits", "fp4"]
