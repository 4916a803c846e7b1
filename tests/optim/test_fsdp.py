"""FSDP2 on two processes (gloo): the run of one process, with everything sharded that is as large as the weights."""

import pytest

SOURCE = """
import contextlib, math, torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from asga.optim import ASGA

def network():
    torch.manual_seed(0)
    # Nothing divides evenly, and of the last bias the second process holds nothing.
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1)).double()

def shard(mesh):
    model = network()
    mesh = init_device_mesh("cpu", (2,)) if mesh is None else init_device_mesh("cpu", tuple(mesh), mesh_dim_names="rs")
    for layer in (model[0], model):
        fully_shard(layer, mesh=mesh)
    return model

def optimizer_of(model, base="SGD", **options):
    base = getattr(torch.optim, base)
    return ASGA(model.parameters(), base, lr=0.02, weight_decay=0.1, rho_min=1e-4, **options)

def train(model, optimizer, rank, size, *, steps=10, interfere=None):
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        x, y = (torch.randn(8, n, generator=generator).double().chunk(size)[rank] for n in (6, 1))
        for index, take in enumerate((optimizer.first_step, optimizer.second_step), 1):
            loss = 2 * (model(x) - y).square().mean()
            loss.backward()
            if interfere is not None:
                interfere(number, index)
            take(loss)

def whole(model):
    return [(p.full_tensor() if isinstance(p, DTensor) else p).detach() for p in model.parameters()]
"""

PARITY = (
    SOURCE
    + """
def work(rank, options, mesh=None):
    alone = network()
    reference = optimizer_of(alone, process_group=None, **options)
    train(alone, reference, 0, 1)
    model = shard(mesh)
    optimizer = optimizer_of(model, **options)
    train(model, optimizer, rank, 2)
    one, two = optimizer.diagnostics(), reference.diagnostics()
    state = [v for s in optimizer.state.values() for v in s.values() if v.dim()]
    rooms = (optimizer._memory.backups, optimizer._memory.first_grads)
    kept = [(k.shape, p.to_local().shape) for b in rooms for p, k in b.items()]
    return {
        "error": max((a - b).abs().max().item() for a, b in zip(whole(model), whole(alone))),
        "moved": max((a - b).abs().max().item() for a, b in zip(whole(model), network().parameters())),
        "diagnostics": [one, two],
        "state": sorted({type(v).__name__ for v in state}),
        "kept": len(kept),
        "kept is local": all(a == b for a, b in kept),
        "local": sum(p.to_local().numel() for p in model.parameters()),
        "fused": optimizer.reason_not_fused is None,
    }
"""
)

CASES = {
    "aligned": {"options": {}},
    "gsam, clipped": {"options": {"variant": "gsam", "max_norm": 0.5}},
    "conflict": {"options": {"variant": "conflict"}},
    "ASAM": {"options": {"variant": "sam", "adaptive": True}},
    "AdamW": {"options": {"base": "AdamW"}},
    "unfused": {"options": {"base": "Adagrad"}},
    "replicated, not sharded": {"options": {"variant": "gsam"}, "mesh": [2, 1]},
    "a mesh of two dimensions": {"options": {"variant": "gsam"}, "mesh": [1, 2]},
}


@pytest.fixture(scope="module")
def parity(on_ranks):
    return dict(zip(CASES, on_ranks(PARITY, list(CASES.values())), strict=True))


@pytest.mark.parametrize("case", CASES)
class TestParity:
    def test_weights_and_scalars_are_those_of_one_process(self, parity, case):
        for rank in parity[case]:
            assert rank["error"] < 1e-12
            assert rank["moved"] > 1e-2
            ours, theirs = rank["diagnostics"]
            assert ours == pytest.approx(theirs, rel=1e-8)
            assert ours["share_at_rho_min"] + ours["share_at_rho_max"] < 0.9

    def test_moments_and_backups_are_sharded(self, parity, case):
        one, two = parity[case]
        for rank in (one, two):
            assert rank["fused"] == (case != "unfused")
            assert rank["kept is local"]
            assert rank["kept"] >= 4, "backups of all tensors with elements here"
            # Without momentum, SGD has none.
            assert rank["state"] in ([], ["DTensor"])
        total = 6 * 7 + 7 + 7 + 1
        assert one["local"] + two["local"] == (2 * total if case == "replicated, not sharded" else total)


TENSOR_PARALLEL = (
    SOURCE
    + """
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()

def work(rank, options, mesh):
    alone = network()
    reference = optimizer_of(alone, process_group=None, **options)
    mesh = init_device_mesh("cpu", tuple(mesh), mesh_dim_names=("data", "tensor"))
    model = parallelize_module(network(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["data"])
    optimizer = optimizer_of(model, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        x, y = (torch.randn(8, n, generator=generator).double() for n in (6, 4))
        parts = [t.chunk(mesh["data"].size())[mesh["data"].get_local_rank()] for t in (x, y)]
        for net, one, (a, b) in ((alone, reference, (x, y)), (model, optimizer, parts)):
            for take in (one.first_step, one.second_step):
                loss = (net(a) - b).square().mean()
                loss.backward()
                take(loss)
    return {
        "error": max((a - b).abs().max().item() for a, b in zip(whole(model), whole(alone))),
        "moved": max((a - b).abs().max().item() for a, b in zip(whole(model), network().parameters())),
        "diagnostics": [optimizer.diagnostics(), reference.diagnostics()],
        "placements": sorted({type(place).__name__ for p in model.parameters() for place in p.placements}),
    }
"""
)


@pytest.mark.parametrize("options", [{}, {"variant": "gsam", "max_norm": 0.5}], ids=["aligned", "gsam, clipped"])
def test_tensor_parallel_layers_under_fsdp(on_ranks, options):
    """Two ways of sharding at once, in a mesh of 2 x 2: to torch, the shards of the first weight are strided."""
    for rank in on_ranks(TENSOR_PARALLEL, [{"options": options, "mesh": [2, 2]}], ranks=4)[0]:
        assert rank["error"] < 1e-12
        assert rank["moved"] > 1e-2
        ours, theirs = rank["diagnostics"]
        assert ours == pytest.approx(theirs, rel=1e-8)
        assert rank["placements"] == ["Replicate", "Shard", "_StridedShard"]


FAULTY = (
    SOURCE
    + """
def work(rank, faulty_pass):
    model = shard(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
    optimizer = optimizer_of(model, scaler=scaler, momentum=0.9)
    before = []
    def interfere(number, index):
        if index == 1:
            if number:
                scaler.update()
            before.append(whole(model))
        if number == 3 and index == faulty_pass and rank == 1:
            next(model.parameters()).grad.to_local()[0, 0] = math.inf
    train(model, optimizer, rank, 2, interfere=interfere)
    changed = [any(not torch.equal(a, b) for a, b in zip(one, two)) for one, two in zip(before, before[1:])]
    return {"changed": changed, "skipped": optimizer.diagnostics()["skipped"], "rho": optimizer.rho.item(),
            "scale": scaler.get_scale(), "finite": all(bool(p.isfinite().all()) for p in whole(model))}
"""
)

INTERRUPTED = (
    SOURCE
    + """
def work(rank, error):
    model = shard(None)
    optimizer = optimizer_of(model, momentum=0.9)
    train(model, optimizer, rank, 2, steps=2)
    before = whole(model)
    x, y = torch.ones(4, 6).double(), torch.ones(4, 1).double()
    calls = moved = 0
    def closure():
        nonlocal calls, moved
        calls += 1
        if calls == 2:
            moved = max((a - b).abs().max().item() for a, b in zip(whole(model), before))
            raise KeyboardInterrupt if error == "KeyboardInterrupt" else RuntimeError
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss
    with contextlib.suppress(KeyboardInterrupt, RuntimeError):
        optimizer.step(closure)
    return {"moved": moved, "restored": all(torch.equal(a, b) for a, b in zip(whole(model), before))}
"""
)

LOCAL = (
    SOURCE
    + """
def work(rank):
    model = shard(None)
    before = whole(model)
    try:
        train(model, optimizer_of(model, local_ascent=True), rank, 2)
    except ValueError as error:
        return [str(error), all(torch.equal(a, b) for a, b in zip(whole(model), before))]
"""
)


@pytest.mark.parametrize("faulty_pass", [1, 2])
def test_an_infinity_in_one_shard_skips_the_step_on_both(on_ranks, faulty_pass):
    ((one, two),) = on_ranks(FAULTY, [{"faulty_pass": faulty_pass}])
    assert one == two
    assert one["changed"] == [number != 3 for number in range(9)]
    assert (one["skipped"], one["scale"], one["finite"]) == (1, 0.5, True)


def test_an_exception_between_the_passes_restores_the_shards(on_ranks):
    results = on_ranks(INTERRUPTED, [{"error": "KeyboardInterrupt"}, {"error": "RuntimeError"}])
    for rank in (*results[0], *results[1]):
        assert rank["moved"] > 1e-5
        assert rank["restored"]


def test_local_ascent_is_refused_before_anything_moves(on_ranks):
    for message, untouched in on_ranks(LOCAL, [{}])[0]:
        assert "local_ascent is True" in message
        assert untouched


QUANTIZED = (
    SOURCE
    + """
import asga
from torch.nn.parallel import DistributedDataParallel

def quantized():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 1))
    model = asga.quantize(net, asga.Policy({"0": asga.LayerPolicy(4, 4), "2": asga.LayerPolicy(4, 8)}))
    asga.calibrate(model, [torch.randn(64, 6)])
    return model.double()

def work(rank):
    results = []
    for parallel in (DistributedDataParallel, lambda model: fully_shard(model, mesh=init_device_mesh("cpu", (2,)))):
        model = quantized()
        around = parallel(model)
        train(around, optimizer_of(model), rank, 2)
        results.append(whole(model))
    return {
        "error": max((a - b).abs().max().item() for a, b in zip(*results)),
        "moved": [(a - b).abs().max().item() for a, b in zip(results[1], quantized().parameters())],
    }
"""
)


def test_fixed_bits_under_fsdp_are_those_under_ddp(on_ranks):
    """Scales of activations are learned there, too. One process alone would have another LSQ factor: a whole batch."""
    for rank in on_ranks(QUANTIZED, [{}])[0]:
        assert rank["error"] < 1e-12
        assert min(rank["moved"]) > 0
