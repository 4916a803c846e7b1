"""The CUDA kernels of the fused ASGA step against the definition in plain torch, run on the CPU to share nothing with
them."""

import math
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from asga.ops import backend, sam_reference
from asga.ops.sam_library import COUNTS, VARIANTS
from asga.optim import ASGA

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

ops = torch.ops.asga

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Every dtype with gradients of its own, and every other one once.
PAIRS = [(dtype, dtype) for dtype in DTYPES] + list(zip(DTYPES, [*DTYPES[1:], DTYPES[0]], strict=True))
pairs = pytest.mark.parametrize(
    ("dtype", "grad_dtype"), PAIRS, ids=[" and ".join(str(d).removeprefix("torch.") for d in pair) for pair in PAIRS]
)
adaptives = pytest.mark.parametrize("adaptive", [False, True], ids=["T = 1", "T = |theta|"])

# Of a whole step with SGD; AdamW has one more, which counts its steps.
MOST_LAUNCHES = 12


@pytest.fixture(autouse=True, scope="module")
def _kernels_are_loaded():
    if torch._C._dispatch_has_kernel_for_dispatch_key("asga::sam_norm", DEVICE.upper()):
        return
    if os.environ.get("ASGA_CUDA") == "skip":
        pytest.skip("the CUDA library was left out (ASGA_CUDA=skip)")
    pytest.fail("there is a GPU but no CUDA library; build it with `ASGA_CUDA=force pip install -e .`")


def scalar(value: float, device: str = DEVICE) -> Tensor:
    return torch.tensor(value, dtype=torch.float64, device=device)


def on_device(values: object) -> object:
    """Tensors in lists moved with their strides; everything else stays. Never the same memory."""
    if isinstance(values, Tensor):
        if 0 in values.stride() and values.numel() > 1:
            return values.clone().to(DEVICE)
        return torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device=DEVICE).copy_(values)
    return [on_device(value) for value in values] if isinstance(values, list) else values


def launches(run: Callable[[], None]) -> list[str]:
    """The names of what the device does in a call; it is an error if the host waits for the device."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]


def on_cpu(values: object) -> object:
    if isinstance(values, dict):
        return {key: on_cpu(value) for key, value in values.items()}
    return [on_cpu(value) for value in values] if isinstance(values, list | tuple) else _cpu(values)


def _cpu(value: object) -> object:
    return value.cpu() if isinstance(value, Tensor) else value


def coefficients(device: str, valid: float = 1.0) -> Tensor:
    return torch.tensor([0.3, 0.6, valid, 0.0], dtype=torch.float64, device=device)


def sgd(target, step, *, valid=1.0, rate=False, momentum=0.9, decay=0.01, nesterov=False):
    device = step.params[0].device
    lists = (step.params, step.backups, step.first_grads, step.grads, step.momentum_buffers if momentum else [])
    lr = scalar(0.1, device) if rate else None
    target.sam_sgd(*lists, coefficients(device, valid), lr, 0.0 if rate else 0.1, momentum, decay, nesterov)


def adam(target, step, *, valid=1.0, rate=False, decay=0.01, decoupled=False):
    device = step.params[0].device
    state = (step.momentum_buffers, step.exp_avg_sqs, step.steps, coefficients(device, valid))
    lists = (step.params, step.backups, step.first_grads, step.grads)
    lr = scalar(0.1, device) if rate else None
    target.sam_adam(*lists, *state, lr, 0.0 if rate else 0.1, 0.9, 0.99, 1e-8, decay, decoupled)


def combine(target, step, *, valid=1.0):
    lists = (step.params, step.backups, step.first_grads, step.grads)
    target.sam_combine(*lists, coefficients(step.params[0].device, valid))


UPDATES = {
    "combine": (combine, {}),
    "SGD": (sgd, {"momentum": 0.0, "decay": 0.0}),
    "SGD momentum": (sgd, {}),
    "SGD Nesterov": (sgd, {"nesterov": True, "rate": True}),
    "Adam": (adam, {}),
    "Adam without decay": (adam, {"decay": 0.0, "rate": True}),
    "AdamW": (adam, {"decoupled": True}),
}
updates = pytest.mark.parametrize("name", UPDATES)


@pytest.fixture
def make_pair(make_step):
    """A function that makes a step on the device and the same one on the CPU."""

    def make(*args, **options):
        ours, theirs = (make_step(*args, **options) for _ in range(2))
        for name, values in vars(ours).items():
            setattr(ours, name, on_device(values))
        return ours, theirs

    return make


class TestSums:
    @pairs
    @adaptives
    def test_of_the_norm(self, make_pair, dtype, grad_dtype, adaptive):
        ours, theirs = make_pair(dtype, grad_dtype, writable=False)
        actual = ops.sam_norm(ours.params, ours.grads, ours.rho_scales, adaptive)
        expected = sam_reference.sam_norm(theirs.params, theirs.grads, theirs.rho_scales, adaptive)
        # A thread adds at most 512 positive numbers, each wrong by half an eps; a block 13 times more.
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        torch.testing.assert_close(actual.cpu(), expected, rtol=270 * eps, atol=0)

    @pairs
    @adaptives
    def test_of_the_dot_products(self, make_pair, dtype, grad_dtype, adaptive):
        ours, theirs = make_pair(dtype, grad_dtype, writable=False)
        actual = ops.sam_dots(ours.backups, ours.first_grads, ours.grads, ours.rho_scales, adaptive)
        args = (theirs.backups, theirs.first_grads, theirs.grads)
        expected = sam_reference.sam_dots(*args, theirs.rho_scales, adaptive)
        magnitudes = sam_reference.sam_dots(*([t.abs() for t in lists] for lists in args), theirs.rho_scales, adaptive)
        eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        assert ((actual.cpu() - expected).abs() <= 270 * eps * magnitudes).all()

    def test_of_the_dot_products_without_first_gradients(self, make_pair):
        ours, theirs = make_pair(torch.float64)
        for missing in (lambda grads: [], lambda grads: [g if i % 2 else g.new_empty(0) for i, g in enumerate(grads)]):
            actual = ops.sam_dots(ours.backups, missing(ours.first_grads), ours.grads, ours.rho_scales, True)
            args = (theirs.backups, missing(theirs.first_grads), theirs.grads, theirs.rho_scales, True)
            torch.testing.assert_close(actual.cpu(), sam_reference.sam_dots(*args), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_show_a_value_that_is_not_finite_wherever_it_is(self, value):
        for size, at in ((1, 0), (17, 16), (20_003, 0), (20_003, 20_002)):
            grads = [torch.ones(3, device=DEVICE), torch.ones(size, device=DEVICE)]
            grads[1][at] = value
            assert not ops.sam_norm(grads, grads, [1.0, 1.0], False).isfinite()
            assert ops.sam_norm(grads, grads, [1.0, 0.0], False) == 3
            dots = ops.sam_dots(grads, grads, grads, [1.0, 0.0], False).tolist()
            assert not math.isfinite(dots[2])
            assert dots[3] == 3

    def test_of_nothing(self):
        empty, one = torch.empty(0, 3, device=DEVICE), torch.ones(2, device=DEVICE)
        assert ops.sam_norm([empty], [empty], [1.0], True) == 0
        assert ops.sam_norm([one], [one], [0.0], True) == 0
        assert ops.sam_dots([empty], [], [empty], [1.0], True).tolist() == [0, 0, 0, 0]

    def test_two_runs_give_the_same_bits(self, make_step):
        step = make_step(layouts=("several blocks", "transposed", "7 values") * 20, device=DEVICE)
        found = set()
        for _ in range(3):
            dots = ops.sam_dots(step.backups, step.first_grads, step.grads, step.rho_scales, True)
            norm = ops.sam_norm(step.params, step.grads, step.rho_scales, True)
            found.add((norm.item(), *dots.tolist()))
        assert len(found) == 1


class TestPerturb:
    @pairs
    @adaptives
    def test_has_the_bits_of_the_reference(self, make_pair, bits_of, dtype, grad_dtype, adaptive):
        pair = make_pair(dtype, grad_dtype, writable=False)
        for target, step, device in zip((ops, sam_reference), pair, (DEVICE, "cpu"), strict=True):
            lists = (step.params, step.backups, step.first_grads, step.grads)
            target.sam_perturb(*lists, scalar(0.3, device), step.rho_scales, adaptive)
        assert bits_of(on_cpu(vars(pair[0]))) == bits_of(vars(pair[1]))

    def test_without_copies_of_the_gradients(self, make_pair, bits_of):
        pair = make_pair()
        for target, step, device in zip((ops, sam_reference), pair, (DEVICE, "cpu"), strict=True):
            target.sam_perturb(step.params, step.backups, [], step.grads, scalar(0.3, device), step.rho_scales, False)
        assert bits_of(on_cpu(vars(pair[0]))) == bits_of(vars(pair[1]))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_a_step_of_zero_moves_nothing_whatever_the_gradient(self, make_pair, bits_of, dtype):
        step, before = make_pair(dtype)
        for grad in step.grads:
            grad.fill_(math.nan)
        lists = (step.params, step.backups, step.first_grads, step.grads)
        ops.sam_perturb(*lists, scalar(0.0), step.rho_scales, True)
        assert bits_of(on_cpu(step.params)) == bits_of(before.params)
        assert all(grad.isnan().all() for grad in step.first_grads)


class TestUpdates:
    @pairs
    @updates
    def test_have_the_bits_of_the_reference(self, make_pair, bits_of, dtype, grad_dtype, name):
        run, options = UPDATES[name]
        ours, theirs = make_pair(dtype, grad_dtype, writable=name == "combine")
        run(ops, ours, **options)
        run(sam_reference, theirs, **options)
        if dtype == torch.float64 and name.startswith("Adam"):
            # Powers and square roots of a float64 may differ by an ulp between devices.
            torch.testing.assert_close(on_cpu(ours.params), theirs.params, rtol=1e-15, atol=1e-15)
            theirs.params = ours.params
        assert bits_of(on_cpu(vars(ours))) == bits_of(on_cpu(vars(theirs)))

    @updates
    def test_without_first_gradients(self, make_pair, bits_of, name):
        run, options = UPDATES[name]
        results = []
        for whose, target in enumerate((ops, sam_reference)):
            for missing in (lambda grads: [], lambda grads: [grad.new_empty(0) for grad in grads]):
                step = make_pair()[whose]
                step.first_grads = missing(step.first_grads)
                run(target, step, **options)
                results.append(bits_of(on_cpu([step.params, step.grads, step.momentum_buffers])))
        assert all(result == results[0] for result in results[1:])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @updates
    def test_an_invalid_step_restores_and_writes_nothing_else(self, make_pair, bits_of, name, dtype):
        run, options = UPDATES[name]
        step, _ = make_pair(dtype)
        step.grads[3].fill_(math.inf)
        before = bits_of(on_cpu(vars(step)))
        run(ops, step, valid=0.0, **options)
        after = bits_of(on_cpu(vars(step)))
        assert after.pop("params") == before.pop("backups")
        assert after.pop("backups") is not None
        assert after == {key: value for key, value in before.items() if key != "params"}

    @updates
    def test_a_parameter_may_be_its_own_backup(self, make_pair, bits_of, name):
        run, options = UPDATES[name]
        for valid in (1.0, 0.0):
            ours, theirs = make_pair()
            theirs.params = [backup.clone() for backup in theirs.backups]
            ours.params = ours.backups
            run(ops, ours, valid=valid, **options)
            run(sam_reference, theirs, valid=valid, **options)
            assert bits_of(on_cpu(ours.params)) == bits_of(theirs.params)

    def test_of_more_tensors_than_a_table_holds(self, make_pair, bits_of):
        ours, theirs = make_pair(layouts=("1 values", "7 values", "transposed", "16 values", "empty") * 250)
        for target, step in ((ops, ours), (sam_reference, theirs)):
            adam(target, step)
            dots = target.sam_dots(step.backups, step.first_grads, step.grads, step.rho_scales, True)
            step.rho_scales = [round(value, 3) for value in dots.tolist()]
        assert bits_of(on_cpu(vars(ours))) == bits_of(vars(theirs))

    @updates
    def test_of_chunks_of_every_length(self, bits_of, name):
        """From 2**25 values on, chunks grow; the second tensor is not aligned."""
        run, options = UPDATES[name]

        def make(device):
            class Step:
                pass

            generator, step = torch.Generator().manual_seed(0), Step()
            for entries in ("params", "backups", "first_grads", "grads", "momentum_buffers", "exp_avg_sqs"):
                tensors = [torch.randn(20_500_003, generator=generator).abs().to(device) for _ in range(2)]
                setattr(step, entries, [tensors[0], tensors[1][1:]])
            step.steps = [torch.zeros((), device=device) for _ in range(2)]
            return step

        ours, theirs = make(DEVICE), make("cpu")
        run(ops, ours, **options)
        run(sam_reference, theirs, **options)
        assert bits_of(on_cpu(vars(ours))) == bits_of(vars(theirs))


class TestScalars:
    @pytest.mark.parametrize("relative", [False, True])
    @pytest.mark.parametrize("scale", [None, 1024.0])
    @pytest.mark.parametrize("q0", [4.0, 1e-300, 0.0, -1.0, math.nan, math.inf])
    def test_of_the_ascent_step(self, q0, scale, relative):
        results = []
        for target, device in ((ops, DEVICE), (sam_reference, "cpu")):
            factor = None if scale is None else scalar(scale, device)
            step = target.sam_ascent_step(scalar(q0, device), scalar(0.3, device), factor, 0.1, relative)
            results.append(step.item())
        assert results[0] == results[1]

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
        for target, device in ((ops, DEVICE), (sam_reference, "cpu")):
            rho, counts = scalar(0.1, device), torch.zeros(len(COUNTS), dtype=torch.int64, device=device)
            vectors = [
                torch.tensor(case.get(name, default), dtype=torch.float64, device=device)
                for name, default in (("dots", [4.0, 2.0, 3.0, 2.0]), ("losses", [1.0, 1.5]))
            ]
            optional = [scalar(case[name], device) if name in case else None for name in ("scale", "found_inf")]
            result = target.sam_coefficients(
                *(scalar(case.get("q0", 4.0), device), scalar(0.5, device), *vectors, *optional, rho, counts),
                *(variant, 0.3, max_norm, case.get("follow_gap", True), 0.01, 0.5),
            )
            # Of an invalid step the coefficients mean nothing.
            results.append([*(result if result[2] else result[2:]).tolist(), rho.item(), *counts.tolist()])
        assert results[0] == pytest.approx(results[1], rel=1e-14, nan_ok=True)


class TestRefusals:
    """What memory safety needs; everything else is the optimizer's business."""

    def test_lists_that_do_not_fit(self):
        a, b = torch.ones(3, device=DEVICE), torch.ones(4, device=DEVICE)
        with pytest.raises(RuntimeError, match="grads has 1 tensors, but params 2"):
            ops.sam_norm([a, a], [a], [1.0, 1.0], False)
        with pytest.raises(RuntimeError, match=r"grads\[1\] does not have the shape of its parameter"):
            ops.sam_norm([a, a], [a, b], [1.0, 1.0], False)
        with pytest.raises(RuntimeError, match="rho_scales has 1 entries"):
            ops.sam_norm([a, a], [a, a], [1.0], False)
        with pytest.raises(RuntimeError, match="params holds several dtypes"):
            ops.sam_norm([a, a.double()], [a, a], [1.0, 1.0], False)
        with pytest.raises(RuntimeError, match=r"grads\[1\] does not have the dtype of the other gradients"):
            ops.sam_norm([a, a], [a, a.half()], [1.0, 1.0], False)
        with pytest.raises(RuntimeError, match=r"backups\[0\] does not have the dtype of params"):
            ops.sam_perturb([a], [a.half()], [], [a], scalar(0.1), [1.0], False)
        with pytest.raises(RuntimeError, match="grads holds a tensor with dtype code"):
            ops.sam_norm([a], [a.int()], [1.0], False)

    def test_scalars_of_another_kind(self):
        a = torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="step must be a float64 tensor"):
            ops.sam_perturb([a], [a.clone()], [], [a], torch.tensor(0.1, device=DEVICE), [1.0], False)
        with pytest.raises(RuntimeError, match=r"coefficients must be a float64 tensor .* with 4"):
            ops.sam_combine([a], [a], [], [a], scalar(1.0))
        args = ([torch.tensor(1, device=DEVICE)], coefficients(DEVICE), None, 0.1, 0.9, 0.99, 1e-8, 0.0, False)
        with pytest.raises(RuntimeError, match="steps must hold float32"):
            ops.sam_adam([a], [a], [], [a], [a], [a], *args)


class TestWholeStep:
    """Every operator of a step, in order, on as many tensors as a ResNet-50 has."""

    def _tensors(self):
        class Step:
            pass

        generator, step = torch.Generator().manual_seed(0), Step()
        for entries in ("params", "backups", "first_grads", "grads", "momentum_buffers", "exp_avg_sqs"):
            sizes = [(257, 5003, 64)[i % 3] for i in range(161)]
            setattr(step, entries, [torch.randn(n, generator=generator).abs().to(DEVICE) for n in sizes])
        step.steps = [torch.zeros((), device=DEVICE) for _ in step.params]
        step.rho, step.counts = scalar(0.1), torch.zeros(len(COUNTS), dtype=torch.int64, device=DEVICE)
        step.losses = torch.tensor([1.0, 1.2], dtype=torch.float64, device=DEVICE)
        return step

    def _run(self, step, *, of_adam: bool):
        scales = [1.0] * len(step.params)
        q0 = ops.sam_norm(step.params, step.grads, scales, False)
        size = ops.sam_ascent_step(q0, step.rho, None, 0.1, True)
        ops.sam_perturb(step.params, step.backups, step.first_grads, step.grads, size, scales, False)
        dots = ops.sam_dots(step.backups, step.first_grads, step.grads, scales, False)
        options = (VARIANTS.index("gsam"), 0.4, 1.0, True, 0.01, 0.5)
        of = ops.sam_coefficients(q0, size, dots, step.losses, None, None, step.rho, step.counts, *options)
        lists = (step.params, step.backups, step.first_grads, step.grads, step.momentum_buffers)
        if of_adam:
            ops.sam_adam(*lists, step.exp_avg_sqs, step.steps, of, None, 0.1, 0.9, 0.99, 1e-8, 0.01, True)
        else:
            ops.sam_sgd(*lists, of, None, 0.1, 0.9, 0.01, True)

    @pytest.mark.parametrize("of_adam", [False, True], ids=["SGD", "AdamW"])
    def test_launches_few_kernels_and_waits_for_none(self, of_adam):
        step = self._tensors()
        self._run(step, of_adam=of_adam)
        on_gpu = launches(lambda: self._run(step, of_adam=of_adam))
        assert 0 < len(on_gpu) <= MOST_LAUNCHES - 4 + of_adam, on_gpu
        assert all("_kernel" in name for name in on_gpu)  # neither copies nor fills

    @pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
    @pytest.mark.parametrize("loss", [torch.tensor(1.0), 1.0], ids=["a tensor", "a number"])
    def test_the_optimizer_adds_four_launches_and_waits_for_none(self, base, loss):
        step = self._tensors()
        params = [nn.Parameter(p) for p in step.params]
        optimizer = ASGA(params, base, lr=0.1, variant="gsam", max_norm=1.0, fused=True)
        loss = on_device(loss)

        def both_passes():
            for take, grads in ((optimizer.first_step, step.first_grads), (optimizer.second_step, step.grads)):
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                take(loss)

        both_passes()
        on_gpu = launches(both_passes)
        assert 0 < len(on_gpu) <= MOST_LAUNCHES + (base is torch.optim.AdamW), on_gpu

    @pytest.mark.parametrize("of_adam", [False, True], ids=["SGD", "AdamW"])
    def test_a_captured_graph_replays_to_the_same_bits(self, bits_of, of_adam):
        plain, captured = self._tensors(), self._tensors()
        self._run(self._tensors(), of_adam=of_adam)  # loads the kernels, which a capture does not allow
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._run(captured, of_adam=of_adam)
        for _ in range(3):
            graph.replay()
            self._run(plain, of_adam=of_adam)
        assert bits_of(on_cpu(vars(captured))) == bits_of(on_cpu(vars(plain)))

    @pytest.mark.parametrize("name", [None, "triton"], ids=["CUDA", "Triton"])
    def test_graphs_do_not_count_on_each_other(self, bits_of, name):
        """The one that was captured last runs first, the other one not at all."""
        if name is not None:
            pytest.importorskip("triton")
        plain, captured = self._tensors(), self._tensors()
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with backend(name):
            self._run(self._tensors(), of_adam=False)  # loads the kernels, which a capture does not allow
            for graph in graphs:
                with torch.cuda.graph(graph):
                    self._run(captured, of_adam=False)
            graphs[1].replay()
            self._run(plain, of_adam=False)
            assert bits_of(on_cpu(vars(captured))) == bits_of(on_cpu(vars(plain)))
            # Nor do calls outside of graphs count on them.
            self._run(captured, of_adam=False)
            self._run(plain, of_adam=False)
        assert bits_of(on_cpu(vars(captured))) == bits_of(on_cpu(vars(plain)))

    def test_triton_waits_for_nothing_whatever_the_default_device_is(self):
        pytest.importorskip("triton")
        step = self._tensors()
        with backend("triton"), torch.device(DEVICE):
            self._run(step, of_adam=False)
            launches(lambda: self._run(self._tensors_like(step), of_adam=False))

    def _tensors_like(self, step):
        """Of other addresses, so that their tables are new."""
        other = type(step)()
        for name, value in vars(step).items():
            setattr(other, name, [t.clone() for t in value] if isinstance(value, list) else value.clone())
        return other

    def test_with_cuda_graphs_of_torch_compile(self):
        """Their memory is written again by pass 2; what pass 1 left there must have been copied."""

        def losses(mode: str | None) -> list[float]:
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 8)).to(DEVICE)
            run = model if mode is None else torch.compile(model, mode=mode)
            optimizer = ASGA(model.parameters(), lr=0.1)
            x, y = torch.randn(16, 64, device=DEVICE), torch.randint(8, (16,), device=DEVICE)

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(run(x), y)
                loss.backward()
                return loss

            return [optimizer.step(closure).item() for _ in range(8)]

        assert losses("reduce-overhead") == pytest.approx(losses(None), rel=1e-3)

    @pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
    def test_the_optimizer_is_captured_with_both_passes(self, bits_of, base):
        def build():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 8)).to(DEVICE)
            optimizer = ASGA(model.parameters(), base, lr=0.1, variant="gsam", fused=True, model=model)
            x, y = torch.randn(16, 64, device=DEVICE), torch.randint(8, (16,), device=DEVICE)

            def closure():
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            return model, lambda: optimizer.step(closure)

        (eager, step), (model, captured_step) = build(), build()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                captured_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured_step()
        for _ in range(3):
            step()
        for _ in range(3):
            graph.replay()
            step()
        ours, theirs = ([*net.parameters(), *net.buffers()] for net in (model, eager))
        assert bits_of(on_cpu(ours)) == bits_of(on_cpu(theirs))
