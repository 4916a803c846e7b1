import random

import numpy as np
import pytest
import torch

from asga._files import save_tensors
from asga._random import random_state, set_random_state


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
