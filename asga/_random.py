"""The state of all generators that a loader, an augmentation or a model may draw from."""

import random
from collections.abc import Sequence

import numpy as np
import torch


def random_state(own: Sequence[torch.Generator] = ()) -> dict[str, object]:
    """The states of torch (CPU and, where it is in use, CUDA), NumPy and Python, in tensors and plain containers.

    Args:
        own: Further generators.
    """
    name, keys, *rest = np.random.get_state()
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
        "own": [generator.get_state() for generator in own],
    }


def set_random_state(state: dict[str, object], own: Sequence[torch.Generator] = ()) -> None:
    """Take over what `random_state` gave, of as many CUDA devices as there are.

    Args:
        state: From `random_state`.
        own: The further generators, in the same order.
    """
    torch.set_rng_state(state["cpu"])
    for device in range(min(len(state["cuda"]), torch.cuda.device_count())):
        torch.cuda.set_rng_state(state["cuda"][device], device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
    for generator, its_state in zip(own, state["own"], strict=False):
        generator.set_state(its_state)


def generators_of(loader: object) -> list[torch.Generator]:
    """The generators that a `torch.utils.data.DataLoader` or its samplers were given, each once."""
    found = (getattr(owner, "generator", None) for owner in owners_of(loader))
    return list(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))


def owners_of(loader: object) -> list[object]:
    """What decides the order of a `torch.utils.data.DataLoader`: itself and its samplers, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = (loader, batch_sampler, getattr(loader, "sampler", None), getattr(batch_sampler, "sampler", None))
    return list({id(owner): owner for owner in found if owner is not None}.values())
