import math

import pytest
import torch

from asga.nn.observer import ActStatistics


def observe(*tensors, keep_sample=False):
    statistics = ActStatistics(keep_sample=keep_sample)
    for tensor in tensors:
        statistics.update(tensor)
    return statistics


def test_mean_counts_every_value_once_whatever_the_batch_sizes():
    statistics = observe(torch.ones(3), torch.tensor([5.0]), torch.empty(0, 2))
    # 2 * mean / sqrt(quant_max), mean = (3 * 1 + 5) / 4
    assert statistics.initial_scale(-2, 1, "lsq") == 4.0


def test_one_negative_value_in_any_batch_makes_it_signed():
    assert not observe(torch.ones(3), torch.zeros(2)).signed()
    assert observe(torch.ones(3), torch.tensor([1.0, -1e-6]), torch.ones(3)).signed()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_values_that_are_not_finite_are_an_error(value):
    with pytest.raises(ValueError, match="not finite"):
        observe(torch.tensor([1.0, value]), torch.ones(2)).signed()


def test_nothing_seen_is_an_error():
    with pytest.raises(ValueError, match="no value has been observed"):
        observe(torch.empty(0)).signed()


def test_bfloat16_is_summed_in_float32():
    # A bfloat16 sum of ones stops at 256.
    assert observe(torch.ones(10_000, dtype=torch.bfloat16)).initial_scale(-2, 1, "lsq") == 2.0


def test_sample_leaves_the_global_seed_alone_and_is_no_view():
    large, small = torch.ones(2**15), torch.ones(4)
    state = torch.get_rng_state()
    statistics = observe(large, small, keep_sample=True)
    assert torch.equal(torch.get_rng_state(), state)
    small.fill_(100.0)
    large.fill_(100.0)
    assert float(statistics.initial_scale(0, 1, "mse")) == pytest.approx(1.0)


def test_sample_is_not_tied_to_one_channel():
    # In this order every 64th value belongs to one channel; here it is the only one that is not zero.
    activation = torch.zeros(64, 64, 16, 16)
    activation[:, 0] = 1.0
    activation = activation.permute(0, 2, 3, 1)
    (sample,) = observe(activation, keep_sample=True)._samples
    # 16384 draws of probability 1/64: standard deviation 0.001
    assert float(sample.mean()) == pytest.approx(1 / 64, abs=0.005)
