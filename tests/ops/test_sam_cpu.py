"""The compiled kernels of the fused step against the reference, which is the definition."""

import hashlib
import math

import pytest
import torch
from torch import Tensor

from asga.ops import backends, sam_reference
from asga.ops.sam_library import COUNTS, VARIANTS

ops = torch.ops.asga

pytestmark = pytest.mark.skipif(
    backends.unavailable("cpu") is not None, reason=f"no CPU kernels: {backends.unavailable('cpu')}"
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Every dtype with gradients of its own, and every other one once.
PAIRS = [(dtype, dtype) for dtype in DTYPES] + list(zip(DTYPES, [*DTYPES[1:], DTYPES[0]], strict=True))
pairs = pytest.mark.parametrize(
    ("dtype", "grad_dtype"), PAIRS, ids=[" and ".join(str(d).removeprefix("torch.") for d in pair) for pair in PAIRS]
)
adaptives = pytest.mark.parametrize("adaptive", [False, True], ids=["T = 1", "T = |theta|"])


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def coefficients(valid: float = 1.0) -> Tensor:
    return torch.tensor([0.3, 0.6, valid, 0.0], dtype=torch.float64)


def sgd(target, step, *, valid: float = 1.0, rate: Tensor | None = None, momentum=0.9, decay=0.01, nesterov=False):
    lists = (step.params, step.backups, step.first_grads, step.grads, step.momentum_buffers if momentum else [])
    target.sam_sgd(*lists, coefficients(valid), rate, 0.1, momentum, decay, nesterov)


def adam(target, step, *, valid: float = 1.0, rate: Tensor | None = None, decay=0.01, decoupled=False):
    state = (step.momentum_buffers, step.exp_avg_sqs, step.steps, coefficients(valid))
    lists = (step.params, step.backups, step.first_grads, step.grads)
    target.sam_adam(*lists, *state, rate, 0.1, 0.9, 0.99, 1e-8, decay, decoupled)


def combine(target, step, *, valid: float = 1.0):
    target.sam_combine(step.params, step.backups, step.first_grads, step.grads, coefficients(valid))


UPDATES = {
    "combine": (combine, {}),
    "SGD": (sgd, {"momentum": 0.0, "decay": 0.0}),
    "SGD momentum": (sgd, {}),
    "SGD Nesterov": (sgd, {"nesterov": True, "rate": scalar(0.1)}),
    "Adam": (adam, {}),
    "Adam without decay": (adam, {"decay": 0.0, "rate": scalar(0.1)}),
    "AdamW": (adam, {"decoupled": True}),
}
updates = pytest.mark.parametrize("name", UPDATES)


class TestSums:
    @pairs
    @adaptives
    def test_of_the_norm(self, make_step, dtype, grad_dtype, adaptive):
        step = make_step(dtype, grad_dtype, writable=False)
        args = (step.params, step.grads, step.rho_scales, adaptive)
        actual, expected = ops.sam_norm(*args), sam_reference.sam_norm(*args)
        # 512 additions of positive numbers in a lane, each wrong by half an eps at most; the rest is float64.
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        torch.testing.assert_close(actual, expected, rtol=256 * eps, atol=0)

    @pairs
    @adaptives
    def test_of_the_dot_products(self, make_step, dtype, grad_dtype, adaptive):
        step = make_step(dtype, grad_dtype, writable=False)
        args = (step.backups, step.first_grads, step.grads, step.rho_scales, adaptive)
        actual, expected = ops.sam_dots(*args), sam_reference.sam_dots(*args)
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        magnitudes = sam_reference.sam_dots(*([t.abs() for t in tensors] for tensors in args[:3]), *args[3:])
        assert ((actual - expected).abs() <= 256 * eps * magnitudes).all()

    def test_of_the_dot_products_without_first_gradients(self, make_step):
        step = make_step(torch.float64)
        args = (step.backups, [], step.grads, step.rho_scales, True)
        torch.testing.assert_close(ops.sam_dots(*args), sam_reference.sam_dots(*args), rtol=1e-13, atol=0)
        first = [g if i % 2 else torch.empty(0, dtype=torch.float64) for i, g in enumerate(step.first_grads)]
        args = (step.backups, first, step.grads, step.rho_scales, True)
        torch.testing.assert_close(ops.sam_dots(*args), sam_reference.sam_dots(*args), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_show_a_value_that_is_not_finite_wherever_it_is(self, value):
        for size, at in ((1, 0), (17, 16), (20_003, 0), (20_003, 20_002)):
            grads = [torch.ones(3), torch.ones(size)]
            grads[1][at] = value
            assert not ops.sam_norm(grads, grads, [1.0, 1.0], False).isfinite()
            assert not ops.sam_dots(grads, [], grads, [1.0, 1.0], False)[2].isfinite()

    def test_have_the_same_bits_for_every_number_of_threads(self, make_step):
        step = make_step(layouts=("several blocks", "transposed", "7 values") * 20)
        before, found = torch.get_num_threads(), set()
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                dots = ops.sam_dots(step.backups, step.first_grads, step.grads, step.rho_scales, True)
                norm = ops.sam_norm(step.params, step.grads, step.rho_scales, True)
                found.add((norm.item(), *dots.tolist()))
        finally:
            torch.set_num_threads(before)
        assert len(found) == 1


class TestPerturb:
    @pairs
    @adaptives
    def test_has_the_bits_of_the_reference(self, make_step, bits_of, dtype, grad_dtype, adaptive):
        ours, theirs = (make_step(dtype, grad_dtype, writable=False) for _ in range(2))
        for target, step in ((ops, ours), (sam_reference, theirs)):
            target.sam_perturb(
                step.params, step.backups, step.first_grads, step.grads, scalar(0.3), step.rho_scales, adaptive
            )
        assert bits_of(vars(ours)) == bits_of(vars(theirs))

    def test_without_copies_of_the_gradients(self, make_step, bits_of):
        ours, theirs = make_step(), make_step()
        for target, step in ((ops, ours), (sam_reference, theirs)):
            target.sam_perturb(step.params, step.backups, [], step.grads, scalar(0.3), step.rho_scales, False)
        assert bits_of(vars(ours)) == bits_of(vars(theirs))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_step_of_zero_moves_nothing_whatever_the_gradient(self, make_step, bits_of, dtype):
        step = make_step(dtype)
        for grad in step.grads:
            grad.fill_(math.nan)
        before = step.clone()
        args = (step.params, step.backups, step.first_grads, step.grads, scalar(0.0), step.rho_scales, True)
        ops.sam_perturb(*args)
        assert bits_of(step.params) == bits_of(before.params)
        assert all(grad.isnan().all() for grad in step.first_grads)


class TestUpdates:
    @pairs
    @updates
    def test_have_the_bits_of_the_reference(self, make_step, bits_of, dtype, grad_dtype, name):
        run, options = UPDATES[name]
        writable = name == "combine"
        ours, theirs = (make_step(dtype, grad_dtype, writable=writable) for _ in range(2))
        run(ops, ours, **options)
        run(sam_reference, theirs, **options)
        if dtype == torch.float64 and name.startswith("Adam"):
            # torch's square root of a float64 is now and then the neighbor of the right one.
            torch.testing.assert_close(ours.params, theirs.params, rtol=1e-15, atol=1e-15)
            theirs.params = ours.params
        assert bits_of(vars(ours)) == bits_of(vars(theirs))

    @updates
    def test_without_first_gradients(self, make_step, bits_of, name):
        run, options = UPDATES[name]
        results = []
        for target in (ops, sam_reference):
            for missing in ([], [torch.empty(0)] * len(make_step().grads)):
                step = make_step()
                step.first_grads = missing
                run(target, step, **options)
                results.append(bits_of((step.params, step.grads, step.momentum_buffers)))
        assert all(result == results[0] for result in results[1:])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @updates
    def test_an_invalid_step_restores_and_writes_nothing_else(self, make_step, bits_of, name, dtype):
        run, options = UPDATES[name]
        step = make_step(dtype)
        step.grads[3].fill_(math.inf)
        before = bits_of(vars(step.clone()))
        run(ops, step, valid=0.0, **options)
        after = bits_of(vars(step))
        assert after.pop("params") == before.pop("backups")
        assert after.pop("backups") is not None
        assert after == {key: value for key, value in before.items() if key != "params"}

    @updates
    def test_a_parameter_may_be_its_own_backup(self, make_step, bits_of, name):
        run, options = UPDATES[name]
        ours, theirs = make_step(), make_step()
        theirs.params = [backup.clone() for backup in theirs.backups]
        ours.params = ours.backups
        run(ops, ours, **options)
        run(sam_reference, theirs, **options)
        assert bits_of(ours.params) == bits_of(theirs.params)

    @updates
    def test_of_lists_larger_than_the_caches(self, bits_of, name):
        """These are written past the caches where they are aligned, which the last tensor is not."""
        run, options = UPDATES[name]

        def make():
            class Step:
                pass

            generator, step = torch.Generator().manual_seed(0), Step()
            for entries in ("params", "backups", "first_grads", "grads", "momentum_buffers", "exp_avg_sqs"):
                tensors = [torch.randn(2_500_003, generator=generator).abs() for _ in range(2)]
                setattr(step, entries, [tensors[0], tensors[1][1:]])
            step.steps = [torch.zeros(()) for _ in range(2)]
            return step

        ours, theirs = make(), make()
        run(ops, ours, **options)
        run(sam_reference, theirs, **options)
        assert bits_of(vars(ours)) == bits_of(vars(theirs))


class TestScalars:
    @pytest.mark.parametrize("relative", [False, True])
    @pytest.mark.parametrize("scale", [None, 1024.0])
    @pytest.mark.parametrize("q0", [4.0, 1e-300, 0.0, -1.0, math.nan, math.inf])
    def test_of_the_ascent_step(self, q0, scale, relative):
        args = (scalar(q0), scalar(0.3), None if scale is None else scalar(scale), 0.1, relative)
        assert torch.equal(ops.sam_ascent_step(*args), sam_reference.sam_ascent_step(*args))

    @pytest.mark.parametrize("variant", range(len(VARIANTS)), ids=VARIANTS)
    @pytest.mark.parametrize("max_norm", [None, 0.1, 100.0], ids=lambda norm: f"max_norm {norm}")
    @pytest.mark.parametrize(
        "case",
        [
            {},
            {"dots": [4.0, -2.0, 3.0, 2.0]},
            {"dots": [4.0, 0.0, 0.0, 0.0]},
            {"losses": [1.0]},
            {"losses": []},
            {"losses": [1.0, 0.2]},
            {"losses": [1.0, math.nan]},
            {"losses": [1.0, -math.inf]},
            {"dots": [4.0, math.nan, 3.0, 2.0]},
            {"q0": math.inf},
            {"scale": 64.0},
            {"scale": 64.0, "losses": []},
            {"found_inf": 1.0},
            {"found_inf": 0.0},
            {"follow_gap": False},
        ],
        ids=str,
    )
    def test_of_the_decision(self, variant, max_norm, case):
        results = []
        for target in (ops, sam_reference):
            rho, counts = scalar(0.1), torch.zeros(len(COUNTS), dtype=torch.int64)
            vectors = [
                torch.tensor(case.get(name, default), dtype=torch.float64)
                for name, default in (("dots", [4.0, 2.0, 3.0, 2.0]), ("losses", [1.0, 1.5]))
            ]
            optional = [scalar(case[name]) if name in case else None for name in ("scale", "found_inf")]
            result = target.sam_coefficients(
                *(scalar(case.get("q0", 4.0)), scalar(0.5), *vectors, *optional, rho, counts),
                *(variant, 0.3, max_norm, case.get("follow_gap", True), 0.01, 0.5),
            )
            # Of an invalid step the coefficients mean nothing.
            results.append([*(result if result[2] else result[2:]).tolist(), rho.item(), *counts.tolist()])
        assert results[0] == pytest.approx(results[1], rel=1e-14, nan_ok=True)

    def test_without_dot_products(self):
        for variant in ("sam", "aligned"):
            rho, counts = scalar(0.1), torch.zeros(len(COUNTS), dtype=torch.int64)
            args = (None, torch.empty(0).double(), None, None, rho, counts, VARIANTS.index(variant))
            c0, c1, valid, gap = ops.sam_coefficients(
                scalar(4.0), scalar(0.5), *args, 0.0, None, True, 0.01, 0.5
            ).tolist()
            assert (c0, c1, valid) == ((0.0, 1.0, 1.0) if variant == "sam" else (0.5, 0.5, 1.0))
            assert math.isnan(gap)
            assert rho == 0.1


class TestRefusals:
    """What memory safety needs; everything else is the optimizer's business."""

    def test_lists_that_do_not_fit(self):
        a, b = torch.ones(3), torch.ones(4)
        with pytest.raises(RuntimeError, match="grads has 1 tensors, but params 2"):
            ops.sam_norm([a, a], [a], [1.0, 1.0], False)
        with pytest.raises(RuntimeError, match=r"grads\[1\] does not have the shape of its parameter"):
            ops.sam_norm([a, a], [a, b], [1.0, 1.0], False)
        with pytest.raises(RuntimeError, match="rho_scales has 1 entries"):
            ops.sam_norm([a, a], [a, a], [1.0], False)
        with pytest.raises(RuntimeError, match="params holds several dtypes"):
            ops.sam_norm([a, a.double()], [a, a], [1.0, 1.0], False)
        with pytest.raises(RuntimeError, match="grads holds a tensor with dtype code"):
            ops.sam_norm([a], [a.int()], [1.0], False)

    def test_scalars_of_another_kind(self):
        a = torch.ones(3)
        with pytest.raises(RuntimeError, match="step must be a float64 tensor"):
            ops.sam_perturb([a], [a.clone()], [], [a], torch.tensor(0.1), [1.0], False)
        with pytest.raises(RuntimeError, match=r"coefficients must be a float64 tensor .* with 4"):
            ops.sam_combine([a], [a], [], [a], scalar(1.0))
        args = ([torch.tensor(1)], coefficients(), None, 0.1, 0.9, 0.99, 1e-8, 0.0, False)
        with pytest.raises(RuntimeError, match="steps must hold float32"):
            ops.sam_adam([a], [a], [], [a], [a], [a], *args)


_DIGEST = """
import hashlib, torch, asga
ops, generator = torch.ops.asga, torch.Generator().manual_seed(0)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    def make():
        shapes = [(n,) for n in (1, 5, 16, 23, 8192, 20003)]
        return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).abs() for s in shapes]
    params, backups, first, grads, m, v = (make() for _ in range(6))
    steps, one = [torch.zeros(()) for _ in params], [1.0] * 6
    made = [ops.sam_norm(params, grads, one, True), ops.sam_dots(params, first, grads, one, True)]
    ops.sam_perturb(params, backups, first, grads, torch.tensor(0.3).double(), one, True)
    c = torch.tensor([0.3, 0.6, 1.0, 0.0]).double()
    made += [t.clone() for t in params + backups]
    ops.sam_sgd(params, backups, first, grads, m, c, None, 0.1, 0.9, 0.01, True)
    made += [t.clone() for t in params + m]
    ops.sam_adam(params, backups, first, grads, m, v, steps, c, None, 0.1, 0.9, 0.99, 1e-8, 0.01, False)
    ops.sam_combine(backups, params, first, grads, c)
    for t in made + params + m + v + grads:
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
print(digest.hexdigest())
"""


def test_all_instruction_sets_give_the_same_bits(run_python):
    """Each in a process of its own; a set that this processor lacks falls back to the next."""
    digests = {isa: run_python(_DIGEST, ASGA_CPU_ISA=isa) for isa in ("baseline", "avx2", "avx512")}
    assert len(set(digests.values())) == 1
    assert len(digests["baseline"]) == hashlib.sha256().digest_size * 2
