"""Parameters that are sharded over two processes (gloo), without a trainer; test_ddp.py and test_fsdp.py have those."""

import pytest
import torch

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
