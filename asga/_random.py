"""The state of all generators that a loader, an augmentation or a model may draw from."""

import random

import numpy as np
import torch


def random_state() -> dict[str, object]:
    """The states of torch (CPU and, where it is in use, CUDA), NumPy and Python, in tensors and plain containers."""
    name, keys, *rest = np.random.get_state()
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: dict[str, object]) -> None:
    """Take over what `random_state` gave, of as many CUDA devices as there are."""
    torch.set_rng_state(state["cpu"])
    for device in range(min(len(state["cuda"]), torch.cuda.device_count())):
        torch.cuda.set_rng_state(state["cuda"][device], device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
