import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn


class Problem:
    """A small regression: a network, one batch, and the closure that a training loop would write."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, batchnorm: bool = False) -> None:
        generator = torch.Generator().manual_seed(1)
        layers = [nn.Linear(6, 8), nn.BatchNorm1d(8)] if batchnorm else [nn.Linear(6, 8)]
        self.model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(8, 3)).to(dtype)
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5)
        self.x = torch.randn(16, 6, generator=generator, dtype=torch.float64).to(dtype)
        self.y = torch.randn(16, 3, generator=generator, dtype=torch.float64).to(dtype)

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def loss(self) -> Tensor:
        return (self.model(self.x) - self.y).square().mean()

    def closure(self, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        return closure

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]


@pytest.fixture
def make_problem() -> type[Problem]:
    return Problem


@pytest.fixture
def problem() -> Problem:
    return Problem()


def identical(left: list[Tensor], right: list[Tensor]) -> bool:
    """Same bits: integers compare NaN payloads and the sign of zero too."""
    views = {torch.float32: torch.int32, torch.float64: torch.int64, torch.bfloat16: torch.int16}
    return all(
        torch.equal(a.detach().view(views[a.dtype]), b.detach().view(views[b.dtype]))
        for a, b in zip(left, right, strict=True)
    )


@pytest.fixture
def same_bits() -> Callable[[list[Tensor], list[Tensor]], bool]:
    return identical


# Forked after the import, so that torch is loaded once; a store of its own for every case.
ON_RANKS = """
{source}

import json, os, tempfile
import torch.distributed as dist, torch.multiprocessing as mp

CASES = json.loads({cases!r})

def all_cases(rank, folder):
    torch.set_num_threads(1)
    for number, case in enumerate(CASES):
        dist.init_process_group("gloo", init_method=f"file://{{folder}}/{{number}}", rank=rank, world_size={ranks})
        result = work(rank, **case)
        results = [None] * {ranks}
        dist.all_gather_object(results, result)
        if rank == 0:
            print("RESULT", json.dumps(results), flush=True)
        dist.destroy_process_group()

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(all_cases, (folder,), nprocs={ranks}, start_method="fork")
"""


@pytest.fixture(scope="session")
def on_ranks(run_python: Callable[..., str]) -> Callable[..., list[list[object]]]:
    """A function that calls ``work(rank, **case)`` of some source in `ranks` processes (gloo), for every case.

    Returns, for every case, what the processes returned. Cases and results pass through JSON.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch without gloo")

    def run(source: str, cases: list[dict], ranks: int = 2) -> list[list[object]]:
        # Interfaces of containers are not always reachable by name.
        program = ON_RANKS.format(source=source, cases=json.dumps(cases), ranks=ranks)
        printed = run_python(program, GLOO_SOCKET_IFNAME="lo")
        results = [json.loads(line[7:]) for line in printed.splitlines() if line.startswith("RESULT ")]
        assert len(results) == len(cases)
        return results

    return run
