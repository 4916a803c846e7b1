"""Two processes (gloo) that train the same weights: the same bits on both, whatever one of them sees."""

import pytest
import torch

RUN = """
import math, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from contextlib import nullcontext
from asga.optim import ASGA

STEPS, OPTIONS, VIEW, FAULT = {steps}, {options}, {view}, {fault!r}

def work(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model = DistributedDataParallel(net, gradient_as_bucket_view=VIEW)
    optimizer = ASGA(net.parameters(), lr=0.05, momentum=0.9, **OPTIONS)
    generator = torch.Generator().manual_seed(rank)
    local = OPTIONS.get("local_ascent", False)
    moved = 0
    for number in range(STEPS):
        x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
        bad = FAULT is not None and rank == 1 and number % 10 == 3
        before = [p.detach().clone() for p in net.parameters()]
        for index, take in enumerate((optimizer.first_step, optimizer.second_step)):
            with model.no_sync() if local and index == 0 else nullcontext():
                loss = (model(x) - y).square().mean()
                if bad and FAULT == "loss":
                    loss = loss * math.inf
                loss.backward()
            if bad and FAULT == "gradient" and index == 1:
                next(net.parameters()).grad[0, 0] = math.inf
            take(loss)
        moved += any(not torch.equal(p, b) for p, b in zip(net.parameters(), before))
    flat = torch.cat([p.detach().reshape(-1) for p in net.parameters()] + [optimizer.rho.float().reshape(1)])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat)
    report = optimizer.diagnostics()
    if rank == 0:
        print(torch.equal(*both), bool(flat.isfinite().all()), moved, int(report["skipped"]))
    dist.destroy_process_group()

if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder + "/store",), nprocs=2, start_method="fork")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(
    ("options", "view", "fault", "skipped"),
    [
        pytest.param({}, False, None, 0, id="averaged"),
        pytest.param({"variant": "gsam", "max_norm": 0.5}, True, None, 0, id="gradient_as_bucket_view"),
        pytest.param({}, True, "loss", 10, id="an infinite loss on one of them"),
        pytest.param({"fused": False}, False, "gradient", 10, id="an infinite gradient on one of them"),
        pytest.param({"local_ascent": True}, False, None, 0, id="per worker"),
        pytest.param({"local_ascent": True, "variant": "conflict"}, False, "loss", 10, id="per worker, infinite loss"),
    ],
)
def test_two_processes_hold_the_same_bits_after_100_steps(run_python, options, view, fault, skipped):
    printed = run_python(RUN.format(steps=100, options=options, view=view, fault=fault))
    assert printed.splitlines()[-1] == f"True True {100 - skipped} {skipped}"


SHARDED = """
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from asga.optim import ASGA

def work(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(0)
    full = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 3), (4,), (1, 2))]
    # Of the last one, the second process holds nothing.
    places = [[Shard(0)], [Replicate()], [Shard(0)]]
    sharded = [nn.Parameter(distribute_tensor(t, mesh, p)) for t, p in zip(full, places)]
    plain = [nn.Parameter(t.clone()) for t in full]
    options = {options}
    ours = ASGA(sharded, momentum=0.9, lr=0.1, **options)
    reference = ASGA(plain, momentum=0.9, lr=0.1, process_group=None, **options)
    for number in range(10):
        for call in ("first_step", "second_step"):
            grads = [torch.randn(p.shape, generator=generator, dtype=torch.float64) + p.detach() for p in plain]
            loss = float(number % 3) + (call == "second_step")
            for p, g, place in zip(sharded, grads, places):
                p.grad = distribute_tensor(g.clone(), mesh, place)
            for p, g in zip(plain, grads):
                p.grad = g
            getattr(ours, call)(loss)
            getattr(reference, call)(loss)
    close = all(torch.allclose(a.full_tensor(), b, rtol=1e-10, atol=1e-12) for a, b in zip(sharded, plain))
    moved = not torch.allclose(plain[0], full[0])
    momentum = ours.state[sharded[0]]["momentum_buffer"]
    same = abs(ours.diagnostics()["norm_g1"] - reference.diagnostics()["norm_g1"]) < 1e-9
    if rank == 0:
        print(close, moved, same, type(momentum).__name__)
    dist.destroy_process_group()

if __name__ == "__main__":
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(work, (folder + "/store",), nprocs=2, start_method="fork")
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(
    "options", [{}, {"variant": "gsam", "max_norm": 0.5}, {"fused": False}], ids=["aligned", "gsam, clipped", "unfused"]
)
def test_a_step_of_sharded_parameters_is_that_of_whole_ones(run_python, options):
    printed = run_python(SHARDED.replace("{options}", repr(options)))
    assert printed.splitlines()[-1] == "True True True DTensor"
