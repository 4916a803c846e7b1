import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from asga._files import save_tensors
from asga._random import generators_of, random_state, set_random_state


def draws() -> list[float]:
    return [torch.rand(()).item(), np.random.rand(), np.random.standard_normal(), random.random(), random.gauss(0, 1)]


@pytest.mark.parametrize("draws_before", [0, 1])
def test_goes_on_where_it_was(tmp_path, draws_before):
    """Half of a pair of normal numbers included, and through a file."""
    for _ in range(draws_before):
        draws()
    save_tensors(tmp_path / "state", random_state())
    expected = draws()
    draws()
    set_random_state(torch.load(tmp_path / "state", weights_only=True))
    assert draws() == expected


def test_devices_that_are_gone_are_passed_over():
    """As when a run on GPUs is resumed without them."""
    state = random_state()
    expected = draws()
    present = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    set_random_state({**state, "cuda": [*present, torch.zeros(16, dtype=torch.uint8)]})
    assert draws() == expected


def test_further_generators():
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    state = random_state(generators)
    expected = [torch.rand(3, generator=generator) for generator in generators]
    set_random_state(state, generators)
    assert all(torch.equal(torch.rand(3, generator=g), e) for g, e in zip(generators, expected, strict=True))


class TestGeneratorsOf:
    def test_data_loaders(self):
        data, first, second = range(4), torch.Generator(), torch.Generator()
        sampler = RandomSampler(data, generator=second)
        assert generators_of(DataLoader(data, shuffle=True)) == []
        assert generators_of(DataLoader(data, shuffle=True, generator=first)) == [first]
        assert generators_of(DataLoader(data, sampler=sampler, generator=first)) == [first, second]
        assert generators_of(DataLoader(data, batch_sampler=BatchSampler(sampler, 2, False))) == [second]

    def test_other_loaders_have_none(self):
        assert generators_of([]) == []
