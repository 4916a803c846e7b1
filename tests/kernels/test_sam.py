"""The Triton kernels of the fused ASGA step against the reference."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the Triton kernels need triton")

from asga.kernels import sam, tensor_lists
from asga.ops import sam_reference
from asga.ops.sam_library import COUNTS, VARIANTS

# Interpreted, a program takes milliseconds: one list of all that is small, and one whose pointers are all aligned.
LAYOUTS = (
    *("7 values", "1025 values", "a scalar", "empty", "channels_last", "gradient of other strides"),
    *("weight with gaps", "transposed", "unaligned"),
)
ALIGNED = ("1025 values", "channels_last", "16 values")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(torch.float32, torch.float16), (torch.float64, torch.float32)]
pairs = pytest.mark.parametrize(("dtype", "grad_dtype"), PAIRS, ids=str)


def scalar(value: float, device: str) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def sgd(target, step, device, *, valid=1.0, rate=False, momentum=0.9, decay=0.01, nesterov=False):
    lists = (step.params, step.backups, step.first_grads, step.grads, step.momentum_buffers if momentum else [])
    of, lr = torch.tensor([0.3, 0.6, valid, 0.0], dtype=torch.float64, device=device), scalar(0.1, device)
    target.sam_sgd(*lists, of, lr if rate else None, 0.1, momentum, decay, nesterov)


def adam(target, step, device, *, valid=1.0, rate=False, decay=0.01, decoupled=False):
    of, lr = torch.tensor([0.3, 0.6, valid, 0.0], dtype=torch.float64, device=device), scalar(0.1, device)
    lists = (step.params, step.backups, step.first_grads, step.grads, step.momentum_buffers, step.exp_avg_sqs)
    target.sam_adam(*lists, step.steps, of, lr if rate else None, 0.1, 0.9, 0.99, 1e-8, decay, decoupled)


def combine(target, step, device, *, valid=1.0):
    of = torch.tensor([0.3, 0.6, valid, 0.0], dtype=torch.float64, device=device)
    target.sam_combine(step.params, step.backups, step.first_grads, step.grads, of)


UPDATES = {
    "combine": (combine, {}),
    "SGD": (sgd, {"momentum": 0.0, "decay": 0.0}),
    "SGD momentum": (sgd, {"rate": True}),
    "SGD Nesterov": (sgd, {"nesterov": True}),
    "Adam": (adam, {"rate": True}),
    "AdamW": (adam, {"decoupled": True}),
}
updates = pytest.mark.parametrize("name", UPDATES)


@pytest.fixture
def assert_same_step(assert_same_rounded) -> Callable[..., None]:
    """The same bits in every list, but where a bfloat16 is rounded."""

    def check(actual, expected, *, exact: bool = True) -> None:
        for name, tensors in vars(expected).items():
            for one, other in zip(getattr(actual, name), tensors, strict=True):
                if not isinstance(one, Tensor):
                    continue
                if one.dtype == torch.bfloat16:
                    # Moments and d cancel: an ulp of the largest value is as close as truncation comes.
                    torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-6)
                elif exact:
                    assert_same_rounded(one.reshape(-1), other.reshape(-1))
                else:
                    torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)

    return check


@pytest.mark.parametrize("layouts", [LAYOUTS, ALIGNED], ids=["all", "aligned"])
@pairs
def test_sums(make_step, device, dtype, grad_dtype, layouts):
    step = make_step(dtype, grad_dtype, layouts=layouts, device=device)
    adaptive = layouts is LAYOUTS
    # A tile adds 8 values a thread and halves ten times; beyond it, float64.
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    args = (step.params, step.grads, step.rho_scales, adaptive)
    torch.testing.assert_close(sam.sam_norm(*args), sam_reference.sam_norm(*args), rtol=32 * eps, atol=0)
    lists = (step.backups, step.first_grads, step.grads)
    actual, expected = (target.sam_dots(*lists, step.rho_scales, adaptive) for target in (sam, sam_reference))
    magnitudes = sam_reference.sam_dots(*([t.abs() for t in each] for each in lists), step.rho_scales, adaptive)
    assert ((actual - expected).abs() <= 32 * eps * magnitudes).all()


def test_dot_products_without_first_gradients(make_step, device):
    step = make_step(torch.float64, layouts=ALIGNED, device=device)
    for first in ([], [g if i else g.new_empty(0) for i, g in enumerate(step.first_grads)]):
        args = (step.backups, first, step.grads, step.rho_scales, True)
        torch.testing.assert_close(sam.sam_dots(*args), sam_reference.sam_dots(*args), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_sums_of_nothing_and_of_what_is_not_finite(device):
    empty, grads = torch.empty(0, 3, device=device), [torch.ones(3, device=device), torch.ones(1030, device=device)]
    assert sam.sam_norm([empty], [empty], [1.0], True) == 0
    assert sam.sam_dots([empty], [], [empty], [1.0], True).tolist() == [0, 0, 0, 0]
    grads[1][-1] = math.inf
    assert not sam.sam_norm(grads, grads, [1.0, 1.0], False).isfinite()
    assert sam.sam_norm(grads, grads, [1.0, 0.0], False) == 3
    dots = sam.sam_dots(grads, grads, grads, [1.0, 0.0], False)
    assert not dots[2].isfinite()
    assert dots[3] == 3


@pairs
@pytest.mark.parametrize("adaptive", [False, True], ids=["T = 1", "T = |theta|"])
def test_perturb(make_step, device, assert_same_step, dtype, grad_dtype, adaptive):
    ours, theirs = (make_step(dtype, grad_dtype, layouts=LAYOUTS, device=device) for _ in range(2))
    for target, step in ((sam, ours), (sam_reference, theirs)):
        lists = (step.params, step.backups, [] if adaptive else step.first_grads, step.grads)
        target.sam_perturb(*lists, scalar(0.3, device), step.rho_scales, adaptive)
    assert_same_step(ours, theirs)


def test_a_step_of_zero_moves_nothing_whatever_the_gradient(make_step, device, bits_of):
    step = make_step(layouts=ALIGNED, device=device)
    before = bits_of([p.cpu() for p in step.params])
    for grad in step.grads:
        grad.fill_(math.nan)
    lists = (step.params, step.backups, step.first_grads, step.grads)
    sam.sam_perturb(*lists, scalar(0.0, device), step.rho_scales, True)
    assert bits_of([p.cpu() for p in step.params]) == before
    assert all(grad.isnan().all() for grad in step.first_grads)


@pairs
@updates
def test_updates(make_step, device, assert_same_step, dtype, grad_dtype, name):
    run, options = UPDATES[name]
    layouts = LAYOUTS if dtype == torch.float32 else ALIGNED
    ours, theirs = (make_step(dtype, grad_dtype, layouts=layouts, device=device) for _ in range(2))
    run(sam, ours, device, **options)
    run(sam_reference, theirs, device, **options)
    # In float64 the powers of the bias corrections differ by their last bits.
    assert_same_step(ours, theirs, exact=not (dtype == torch.float64 and "Adam" in name))


@updates
def test_updates_without_first_gradients(make_step, device, assert_same_step, name):
    run, options = UPDATES[name]
    theirs = make_step(layouts=ALIGNED, device=device)
    theirs.first_grads = []
    run(sam_reference, theirs, device, **options)
    for missing in ([], [torch.empty(0, device=device)] * len(ALIGNED)):
        ours = make_step(layouts=ALIGNED, device=device)
        ours.first_grads = missing
        run(sam, ours, device, **options)
        ours.first_grads = []
        assert_same_step(ours, theirs)


@updates
def test_an_invalid_step_restores_and_writes_nothing_else(make_step, device, bits_of, name):
    run, options = UPDATES[name]
    step, before = make_step(layouts=LAYOUTS), make_step(layouts=LAYOUTS)
    run(sam, step, device, valid=0.0, **options)
    assert bits_of(step.params) == bits_of(before.backups)
    before.params = step.params
    assert bits_of(vars(step)) == bits_of(vars(before))


def test_bias_corrections_of_many_steps(device):
    count = torch.tensor([0.0, 1.0, 2.0, 999.0, 2.0**20, 2.0**24 - 1], device=device)
    lists = [[torch.ones(1, dtype=torch.float64, device=device) for _ in count] for _ in range(6)]
    ours, theirs = ([list(map(torch.clone, each)) for each in lists] for _ in range(2))
    of = torch.tensor([0.3, 0.6, 1.0, 0.0], dtype=torch.float64, device=device)
    for target, values in ((sam, ours), (sam_reference, theirs)):
        target.sam_adam(*values, list(count.clone().unbind()), of, None, 0.1, 0.9, 0.9999, 1e-8, 0.0, False)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=0)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("q0", [4.0, 1e-300, 0.0, math.nan, math.inf])
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_ascent_step(device, q0, scale, relative):
    args = (scalar(q0, device), scalar(0.3, device), None if scale is None else scalar(scale, device), 0.1, relative)
    assert torch.equal(sam.sam_ascent_step(*args), sam_reference.sam_ascent_step(*args))


@pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
@pytest.mark.parametrize("max_norm", [None, 0.1], ids=lambda norm: f"max_norm {norm}")
@pytest.mark.parametrize(
    "case",
    [
        {},
        {"dots": [4.0, -2.0, 3.0, 2.0]},
        {"dots": [4.0, 0.0, 0.0, 0.0]},
        {"losses": []},
        {"losses": [1.0, 0.2]},
        {"losses": [1.0, 1.0 + 1e-12]},
        {"losses": [1.0, math.nan]},
        {"dots": [4.0, math.nan, 3.0, 2.0]},
        {"q0": math.inf},
        {"scale": 64.0, "losses": [1.0]},
        {"found_inf": 1.0},
        {"found_inf": 0.0, "follow_gap": False},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_decision(device, variant, max_norm, case):
    results = []
    for target in (sam, sam_reference):
        rho, counts = scalar(0.1, device), torch.zeros(len(COUNTS), dtype=torch.int64, device=device)
        vectors = [
            torch.tensor(case.get(name, default), dtype=torch.float64, device=device)
            for name, default in (("dots", [4.0, 2.0, 3.0, 2.0]), ("losses", [1.0, 1.5]))
        ]
        optional = [scalar(case[name], device) if name in case else None for name in ("scale", "found_inf")]
        result = target.sam_coefficients(
            *(scalar(case.get("q0", 4.0), device), scalar(0.5, device), *vectors, *optional, rho, counts),
            *(variant, 0.3, max_norm, case.get("follow_gap", True), 1e-13, 0.5),
        )
        # Of an invalid step the coefficients mean nothing.
        results.append([*(result if result[2] else result[2:]).tolist(), rho.item(), *counts.tolist()])
    assert results[0] == pytest.approx(results[1], rel=1e-14, abs=0, nan_ok=True)


def test_lists_that_do_not_fit(device):
    a, b = torch.ones(3, device=device), torch.ones(4, device=device)
    with pytest.raises(RuntimeError, match="grads has 1 tensors, but params 2"):
        sam.sam_norm([a, a], [a], [1.0, 1.0], False)
    with pytest.raises(RuntimeError, match=r"grads\[1\] does not have the shape of its parameter"):
        sam.sam_norm([a, a], [a, b], [1.0, 1.0], False)
    with pytest.raises(RuntimeError, match="rho_scales has 1 entries"):
        sam.sam_norm([a, a], [a, a], [1.0], False)
    with pytest.raises(RuntimeError, match="the gradients have several dtypes"):
        sam.sam_norm([a, a], [a, a.half()], [1.0, 1.0], False)
    with pytest.raises(RuntimeError, match=r"backups\[0\] does not have the dtype of params"):
        sam.sam_perturb([a], [a.half()], [], [a], scalar(0.1, device), [1.0], False)
    with pytest.raises(RuntimeError, match=r"coefficients must be a contiguous torch.float64 tensor with 4"):
        sam.sam_combine([a], [a], [], [a], scalar(1.0, device))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"counts": torch.zeros(3, dtype=torch.int64)}, r"counts must be a contiguous torch.int64 tensor with 5"),
        ({"counts": torch.zeros(5)}, r"counts must be a contiguous torch.int64 tensor with 5 .* got torch.float32"),
        ({"dots": torch.zeros(2, dtype=torch.float64)}, r"dots must be .* with 4 element\(s\) on \S+, got"),
        ({"losses": torch.zeros(3, dtype=torch.float64)}, "losses has 3 elements; at most two are used"),
        ({"rho": torch.zeros((), dtype=torch.float64, device="meta")}, "rho must be .* on meta"),
        ({"found_inf": torch.zeros(())}, r"found_inf must be a contiguous torch.float64 tensor with 1"),
    ],
    ids=["few counts", "counts of another dtype", "few dots", "many losses", "another device", "another dtype"],
)
def test_scalars_that_do_not_fit(changed, message, device):
    given = dict.fromkeys(("q0", "step"), scalar(1.0, device))
    given |= {"dots": torch.zeros(4, dtype=torch.float64), "losses": torch.zeros(2, dtype=torch.float64)}
    given |= {"grad_scale": None, "found_inf": None, "rho": scalar(0.1, device)}
    given |= {"counts": torch.zeros(len(COUNTS), dtype=torch.int64), **changed}
    tensors = [t if t is None or t.is_meta else t.to(device) for t in given.values()]
    with pytest.raises(RuntimeError, match=message):
        sam.sam_coefficients(*tensors, 1, 0.3, None, True, 0.01, 0.5)


def test_tables_are_made_once_and_do_not_pile_up(device):
    tensors = [torch.ones(5, device=device) for _ in range(3)]
    first = tensor_lists.pointer_table(tensors)
    assert first.tolist() == [t.data_ptr() for t in tensors]
    assert tensor_lists.pointer_table(tensors) is first
    for i in range(200):
        tensor_lists.pointer_table([tensors[k] for k in (i % 3, i // 3 % 3, i // 9 % 3, i // 27 % 3, i // 81 % 3)])
    assert len(tensor_lists._kept) <= 64


def test_a_graph_has_tables_of_its_own(monkeypatch):
    """Nothing else may count on its replays, nor it on those of another graph or on calls outside of graphs."""
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 7}))
    monkeypatch.setattr(tensor_lists, "_copied", lambda *_: tensor_lists._Kept(torch.empty(1), torch.empty(1)))
    monkeypatch.setattr(tensor_lists, "_kept", type(tensor_lists._kept)())
    monkeypatch.setattr(tensor_lists, "_kept_for_graphs", [])

    def table() -> Tensor:
        return tensor_lists._on_device((1, 2), torch.int64, torch.device("cuda", 0))

    graphs = [table(), table()]
    capturing = False
    eager = table()
    assert eager is table()
    assert len({id(found) for found in (*graphs, eager)}) == 3
    assert [kept.table for kept in tensor_lists._kept_for_graphs] == graphs
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 8}))
    assert table() is not eager


def test_tables_are_made_on_the_host_whatever_the_default_device_is():
    with torch.device("meta"):
        assert tensor_lists._copied((1, 2), torch.int64, torch.device("cpu")).table.tolist() == [1, 2]
