import math

import pytest
import torch
from torch import nn

from asga.optim import ASGA
from asga.optim.batchnorm import choose_running_statistics, restore_running_statistics, save_running_statistics


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_same_buffers(model, expected):
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, expected[name]), name


LAYERS = {
    "BatchNorm1d": (nn.BatchNorm1d(4), (8, 4)),
    "BatchNorm2d": (nn.BatchNorm2d(4), (8, 4, 3, 3)),
    "BatchNorm3d": (nn.BatchNorm3d(4), (8, 4, 2, 2, 2)),
    "cumulative average (momentum None)": (nn.BatchNorm2d(4, momentum=None), (8, 4, 3, 3)),
    "InstanceNorm2d with running statistics": (nn.InstanceNorm2d(4, track_running_stats=True), (8, 4, 3, 3)),
    "without running statistics": (nn.BatchNorm2d(4, track_running_stats=False), (8, 4, 3, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("second_input", [1.0, math.inf, math.nan], ids=["finite", "Inf", "NaN"])
def test_statistics_of_a_second_pass_are_undone(name, second_input):
    layer, shape = LAYERS[name]
    generator = torch.Generator().manual_seed(0)
    layer.reset_running_stats()
    layer(torch.randn(shape, generator=generator))
    expected = buffers(layer)
    saved = save_running_statistics(layer)
    layer(torch.randn(shape, generator=generator) * second_input)
    restore_running_statistics(layer, saved)
    assert_same_buffers(layer, expected)


def test_sync_batchnorm_statistics_are_undone():
    layer = nn.SyncBatchNorm(4)  # its forward runs on a GPU only, so the buffers are written by hand
    expected = buffers(layer)
    saved = save_running_statistics(layer)
    layer.running_mean.fill_(math.inf)
    layer.running_var.fill_(2.0)
    layer.num_batches_tracked.add_(1)
    restore_running_statistics(layer, saved)
    assert_same_buffers(layer, expected)


@pytest.mark.parametrize("condition", [True, False])
def test_the_device_chooses_between_two_states(condition):
    layers = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm2d(2).double())
    states, saved = [], []
    for value in (1.0, math.nan):
        for layer in layers:
            layer.running_mean.fill_(value)
            layer.num_batches_tracked.add_(1)
        states.append(buffers(layers))
        saved.append(save_running_statistics(layers))
    restore_running_statistics(layers, choose_running_statistics(torch.tensor(condition), *saved))
    for name, buffer in layers.named_buffers():
        torch.testing.assert_close(buffer, states[0 if condition else 1][name], rtol=0, atol=0, equal_nan=True)


def test_a_buffer_that_a_layer_replaces_is_restored_where_it_is_now():
    layer = nn.BatchNorm1d(4)
    saved = save_running_statistics(layer)
    layer.running_mean = layer.running_mean + 1.0
    restore_running_statistics(layer, saved)
    assert layer.running_mean.tolist() == [0.0] * 4


@pytest.mark.parametrize("protocol", ["closure", "two calls"])
def test_buffers_after_a_step_equal_those_of_a_single_pass(make_problem, protocol):
    problem, twin = make_problem(batchnorm=True), make_problem(batchnorm=True)
    optimizer = ASGA(problem.params, lr=0.1, model=problem.model)
    twin.loss()
    if protocol == "closure":
        optimizer.step(problem.closure(optimizer))
    else:
        for take in (optimizer.first_step, optimizer.second_step):
            loss = problem.loss()
            loss.backward()
            take(loss)
    assert_same_buffers(problem.model, buffers(twin.model))


@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("value", [math.inf, math.nan], ids=["Inf", "NaN"])
def test_a_skipped_step_leaves_the_buffers_as_before_it(make_problem, bad_pass, value):
    problem = make_problem(batchnorm=True)
    optimizer = ASGA(problem.params, lr=0.1, model=problem.model)
    closure = problem.closure(optimizer)
    optimizer.step(closure)
    expected, passes = buffers(problem.model), []

    def overflowing():
        passes.append(1)
        if len(passes) == bad_pass:
            problem.x = problem.x * value
        return closure()

    optimizer.step(overflowing)
    assert optimizer.diagnostics()["skipped"] == 1
    assert_same_buffers(problem.model, expected)


def test_eval_mode_layers_keep_their_statistics(make_problem):
    problem = make_problem(batchnorm=True)
    problem.model.eval()
    expected = buffers(problem.model)
    optimizer = ASGA(problem.params, lr=0.1, model=problem.model)
    optimizer.step(problem.closure(optimizer))
    assert_same_buffers(problem.model, expected)
