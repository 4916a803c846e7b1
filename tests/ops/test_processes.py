"""The operators in threads and in child processes, as training loops and data loaders have them."""

import multiprocessing as mp
import os
import threading

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from asga.ops import fake_quant, mixed_fake_quant

VALUES = torch.randn(16, 301, generator=torch.Generator().manual_seed(0))
SCALES = torch.linspace(0.1, 1, 32).reshape(2, 16)
PROBS = torch.tensor([0.4, 0.6])


def one(x: Tensor, scales: Tensor, probs: Tensor) -> Tensor:
    return fake_quant(x, scales[0], quant_min=-8, quant_max=7, axis=0)


def several(x: Tensor, scales: Tensor, probs: Tensor) -> Tensor:
    return mixed_fake_quant(x, scales, probs, quant_mins=[-8, -2], quant_maxs=[7, 1], axis=0)


@pytest.mark.parametrize("repeat", [1, 64], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [one, several])
def test_threads_share_parameters_and_a_graph(function, dtype, repeat):
    leaves = [t.clone().requires_grad_() for t in (VALUES.repeat(1, repeat).to(dtype), SCALES, PROBS)]
    shared = function(*leaves)
    weights = torch.linspace(-1, 1, shared.numel()).reshape(shared.shape).to(dtype)

    def gradients(output: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(output, leaves, weights, retain_graph=True, allow_unused=True)
        return [grad for grad in found if grad is not None]

    expected = gradients(shared)
    same = []

    def work() -> None:
        for _ in range(3):
            same.append(all(map(torch.equal, gradients(shared), expected)))
            same.append(all(map(torch.equal, gradients(function(*leaves)), expected)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 24


class _Quantized(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return one((index + 1) * VALUES.repeat(1, 40), SCALES, PROBS)


def _mixture_of(batch: list[Tensor]) -> Tensor:
    return several(torch.cat(batch), SCALES.repeat(1, len(batch)), PROBS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_workers_of_a_data_loader_use_them_after_a_fork():
    """Larger than what one thread does alone; torch gives each worker one thread, whatever the parent has used."""
    expected = list(DataLoader(_Quantized(), batch_size=2, collate_fn=_mixture_of))
    workers = DataLoader(
        _Quantized(), batch_size=2, collate_fn=_mixture_of, num_workers=2, multiprocessing_context="fork", timeout=60
    )
    assert all(map(torch.equal, workers, expected))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_small_tensors_train_in_a_forked_child():
    def gradient() -> Tensor:
        x = VALUES.clone().requires_grad_()
        one(x, SCALES, PROBS).square().sum().backward()
        return x.grad

    expected = gradient()
    child = mp.get_context("fork").Process(target=lambda: os._exit(0 if torch.equal(gradient(), expected) else 1))
    child.start()
    child.join(60)
    if child.is_alive():
        child.kill()
    assert child.exitcode == 0
