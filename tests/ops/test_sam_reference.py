"""The definition of the fused step: against the equations, against torch.optim, and as operators of torch."""

import math

import pytest
import torch
from torch import Tensor

from asga.ops import backend, sam_reference
from asga.ops.sam_library import COUNTS, OPERATORS, VARIANTS

ops = torch.ops.asga

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
adaptives = pytest.mark.parametrize("adaptive", [False, True], ids=["T = 1", "T = |theta|"])


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def decide(q0=4.0, step=0.5, dots=(4.0, 2.0, 3.0, 2.0), losses=(1.0, 1.5), grad_scale=None, found_inf=None, **options):
    """`sam_coefficients` with something for every argument, and the state it moved."""
    rho, counts = scalar(0.1), torch.zeros(len(COUNTS), dtype=torch.int64)
    settings = {"variant": "sam", "weight": 0.3, "max_norm": None, "follow_gap": True, "rho_min": 0.01, "rho_max": 0.5}
    settings |= options
    settings["variant"] = VARIANTS.index(settings["variant"])
    dots = None if dots is None else torch.tensor(dots, dtype=torch.float64)
    optional = [None if value is None else scalar(value) for value in (grad_scale, found_inf)]
    losses = torch.tensor(losses, dtype=torch.float64)
    result = sam_reference.sam_coefficients(
        scalar(q0), scalar(step), dots, losses, *optional, rho, counts, *settings.values()
    )
    return result.tolist(), rho.item(), dict(zip(COUNTS, counts.tolist(), strict=True))


class TestNorm:
    @adaptives
    def test_is_the_sum_of_squares_in_the_metric(self, make_step, adaptive):
        step = make_step(torch.float64)
        terms = [
            (scale * grad * (param if adaptive else 1.0)).square().sum().item()
            for param, grad, scale in zip(step.params, step.grads, step.rho_scales, strict=True)
        ]
        actual = sam_reference.sam_norm(step.params, step.grads, step.rho_scales, adaptive)
        assert actual.item() == pytest.approx(sum(terms), rel=1e-13)

    def test_a_bad_gradient_of_a_tensor_that_is_not_perturbed_does_not_count(self):
        grads = [torch.ones(2), torch.full((2,), math.nan)]
        assert sam_reference.sam_norm(grads, grads, [1.0, 0.0], False) == 2.0

    def test_float16_squares_do_not_overflow(self):
        grads = [torch.full((4,), 300.0, dtype=torch.float16)]
        assert sam_reference.sam_norm(grads, grads, [1.0], False) == 360_000.0


class TestAscentStep:
    @pytest.mark.parametrize(
        ("relative", "scale", "expected"),
        [
            (True, None, 0.9 * 0.3 / 2),
            (False, None, 0.3 / 2 - 0.1),
            (True, 8.0, 0.9 * 0.3 / 2),
            # A factor 8 on the gradients: theirs is rho / ||8 g||, and alpha shrinks with it.
            (False, 8.0, 0.3 / 2 - 0.1 / 8),
        ],
    )
    def test_is_the_published_step(self, relative, scale, expected):
        factor = None if scale is None else scalar(scale)
        step = sam_reference.sam_ascent_step(scalar(4.0), scalar(0.3), factor, 0.1, relative)
        assert step.item() == pytest.approx(expected, rel=1e-15)

    @pytest.mark.parametrize("q0", [0.0, math.nan, math.inf, -1.0])
    def test_is_zero_without_a_usable_gradient(self, q0):
        assert sam_reference.sam_ascent_step(scalar(q0), scalar(0.3), None, 0.1, False) == 0.0


class TestPerturb:
    @adaptives
    def test_moves_along_the_gradient_and_keeps_weights_and_gradients(self, make_step, adaptive):
        step = make_step(torch.float64, writable=False)
        before = step.clone()
        sam_reference.sam_perturb(
            step.params, step.backups, step.first_grads, step.grads, scalar(0.3), step.rho_scales, adaptive
        )
        for index, scale in enumerate(step.rho_scales):
            theta, grad = before.params[index], before.grads[index]
            moved = theta + 0.3 * scale**2 * (theta**2 if adaptive else 1.0) * grad
            torch.testing.assert_close(step.params[index], moved, rtol=1e-15, atol=1e-15)
            assert torch.equal(step.backups[index], theta if scale > 0 else before.backups[index])
            assert torch.equal(step.first_grads[index], grad)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_step_of_zero_moves_nothing_whatever_the_gradient(self, value):
        theta, grad = torch.tensor([1.0, -0.0]), torch.tensor([value, value])
        backup = torch.empty(2)
        sam_reference.sam_perturb([theta], [backup], [], [grad], scalar(0.0), [1.0], True)
        assert theta.tolist() == [1.0, 0.0]
        assert theta.signbit().tolist() == [False, True]
        assert torch.equal(theta, backup)


class TestDots:
    @adaptives
    def test_are_the_four_products(self, make_step, adaptive):
        step = make_step(torch.float64)
        expected = torch.zeros(4, dtype=torch.float64)
        for param, g0, g1, scale in zip(step.params, step.first_grads, step.grads, step.rho_scales, strict=True):
            metric = scale**2 * (param**2 if adaptive else 1.0)
            expected += torch.stack([(g0 * g0).sum(), (g0 * g1).sum(), (g1 * g1).sum(), (metric * g0 * g1).sum()])
        actual = sam_reference.sam_dots(step.params, step.first_grads, step.grads, step.rho_scales, adaptive)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)

    def test_without_first_gradients_only_the_last_square_is_known(self):
        grads = [torch.tensor([3.0, 4.0])]
        assert sam_reference.sam_dots(grads, [], grads, [1.0], False).tolist() == [0.0, 0.0, 25.0, 0.0]

    def test_a_first_gradient_without_elements_counts_as_zeros(self):
        grads = [torch.tensor([3.0, 4.0]), torch.tensor([2.0])]
        first = [torch.empty(0), torch.tensor([5.0])]
        assert sam_reference.sam_dots(grads, first, grads, [1.0, 1.0], False).tolist() == [25.0, 10.0, 29.0, 10.0]


class TestCoefficients:
    @pytest.mark.parametrize(
        ("variant", "dots", "expected"),
        [
            ("sam", None, (0.0, 1.0)),
            ("aligned", None, (0.5, 0.5)),
            ("gsam", (4.0, 2.0, 8.0, 2.0), (-0.3, 1.0 + 0.3 / 4)),
            ("gsam", (4.0, 0.0, 0.0, 0.0), (-0.3, 1.0)),
            ("conflict", (4.0, 2.0, 8.0, 2.0), (0.5, 0.5)),
            ("conflict", (4.0, -2.0, 8.0, 2.0), (0.5, 1.25 / 2)),
        ],
    )
    def test_of_the_variants(self, variant, dots, expected):
        (c0, c1, valid, gap), _, _ = decide(variant=variant, dots=dots)
        assert (c0, c1) == pytest.approx(expected, rel=1e-15)
        assert (valid, gap) == (1.0, 0.5)

    @pytest.mark.parametrize("scale", [None, 1024.0])
    def test_clipping_bounds_the_norm_of_the_combination(self, scale):
        s = 1.0 if scale is None else scale
        dots = [s * s * value for value in (4.0, 2.0, 3.0, 2.0)]
        (c0, c1, _, _), _, _ = decide(variant="aligned", dots=dots, max_norm=0.5, grad_scale=scale)
        norm = math.sqrt(c0 * c0 * dots[0] + 2 * c0 * c1 * dots[1] + c1 * c1 * dots[2])
        assert norm == pytest.approx(0.5, rel=2e-6)
        (c0, c1, _, _), _, _ = decide(variant="aligned", dots=dots, max_norm=50.0, grad_scale=scale)
        assert (c0, c1) == (0.5 / s, 0.5 / s)

    def test_the_gap_without_losses_is_the_trapezoid(self):
        assert decide(losses=())[0][3] == 0.5 * (4.0 + 2.0) / 2
        # Products of gradients with a factor 8 are 64 times, and the step on them an eighth, of what they would be.
        assert decide(losses=(), q0=256.0, dots=[256.0, 128.0, 192.0, 128.0], step=0.0625, grad_scale=8.0)[0][3] == 1.5
        assert math.isnan(decide(losses=(), dots=None)[0][3])

    @pytest.mark.parametrize(
        "fault",
        [
            {"q0": math.inf},
            {"dots": (4.0, 2.0, math.nan, 2.0)},
            {"losses": (math.nan, 1.0)},
            {"losses": (1.0, math.inf)},
            {"losses": (math.nan,)},
            {"found_inf": 1.0},
        ],
        ids=str,
    )
    def test_a_fault_makes_the_step_invalid_and_keeps_the_radius(self, fault):
        (_, _, valid, _), rho, counts = decide(**fault)
        assert valid == 0.0
        assert rho == 0.1
        assert counts == {"updates": 0, "at_rho_min": 0, "at_rho_max": 0, "steps": 1, "skipped": 1}

    @pytest.mark.parametrize(
        ("gap", "rho", "at_min", "at_max"),
        [(0.2, math.log(1.2), 0, 0), (10.0, 0.5, 0, 1), (-0.5, 0.01, 1, 0), (-5.0, 0.01, 1, 0)],
    )
    def test_the_radius_follows_the_gap(self, gap, rho, at_min, at_max):
        _, moved, counts = decide(losses=(0.0, gap))
        assert moved == pytest.approx(rho, rel=1e-15)
        assert counts == {"updates": 1, "at_rho_min": at_min, "at_rho_max": at_max, "steps": 1, "skipped": 0}

    def test_the_radius_stays_where_it_does_not_follow_or_the_gap_is_unknown(self):
        assert decide(follow_gap=False)[1:] == (0.1, dict(zip(COUNTS, (0, 0, 0, 1, 0), strict=True)))
        assert decide(losses=(), dots=None)[1:] == (0.1, dict(zip(COUNTS, (0, 0, 0, 1, 0), strict=True)))


VALID, INVALID = (torch.tensor([0.3, 0.6, valid, 0.0], dtype=torch.float64) for valid in (1.0, 0.0))
RATES = pytest.mark.parametrize("rate", [None, scalar(0.1)], ids=["lr is a number", "lr is a tensor"])


def update(name: str, step, coefficients: Tensor, rate: Tensor | None = None, **options) -> None:
    """One of the three writing operators, in the reference."""
    lists = (step.params, step.backups, step.first_grads, step.grads)
    lr = options.get("lr", 0.1 if rate is None else math.nan)
    decay = options.get("weight_decay", 0.01)
    if name == "combine":
        sam_reference.sam_combine(*lists, coefficients)
    elif name == "sgd":
        momentum = options.get("momentum", 0.9)
        buffers = step.momentum_buffers if momentum else []
        nesterov = options.get("nesterov", False)
        sam_reference.sam_sgd(*lists, buffers, coefficients, rate, lr, momentum, decay, nesterov)
    else:
        state = (step.momentum_buffers, step.exp_avg_sqs, step.steps)
        rest = (0.9, 0.99, 1e-8, decay, options.get("decoupled", False))
        sam_reference.sam_adam(*lists, *state, coefficients, rate, lr, *rest)


class TestUpdates:
    @RATES
    @pytest.mark.parametrize(
        ("options", "name", "base"),
        [
            ({"momentum": 0.0}, "sgd", torch.optim.SGD),
            ({"momentum": 0.9}, "sgd", torch.optim.SGD),
            ({"momentum": 0.9, "nesterov": True}, "sgd", torch.optim.SGD),
            ({}, "adam", torch.optim.Adam),
            ({"decoupled": True}, "adam", torch.optim.AdamW),
        ],
        ids=["SGD", "SGD momentum", "SGD Nesterov", "Adam", "AdamW"],
    )
    def test_is_the_optimizer_of_torch_on_the_combined_gradient(self, make_step, options, name, base, rate):
        """float64: torch's kernels may contract products and sums, so that some last bits differ."""
        step = make_step(torch.float64)
        twins = [torch.nn.Parameter(backup.clone()) for backup in step.backups]
        theirs = {key: value for key, value in options.items() if key != "decoupled"}
        betas = {} if name == "sgd" else {"betas": (0.9, 0.99)}
        optimizer = base(twins, lr=0.1, weight_decay=0.01, **theirs, **betas)
        for index, twin in enumerate(twins):
            twin.grad = 0.3 * step.first_grads[index] + 0.6 * step.grads[index]
            if name == "adam":
                moments = {"exp_avg": step.momentum_buffers[index], "exp_avg_sq": step.exp_avg_sqs[index]}
                optimizer.state[twin] = {key: value.clone() for key, value in moments.items()}
                optimizer.state[twin]["step"] = step.steps[index].clone()
            elif options["momentum"]:
                optimizer.state[twin]["momentum_buffer"] = step.momentum_buffers[index].clone()
        optimizer.step()
        update(name, step, VALID, rate, **options)
        torch.testing.assert_close(step.params, [twin.detach() for twin in twins], rtol=1e-13, atol=1e-14)
        if name == "adam":
            assert [s.item() for s in step.steps] == [optimizer.state[twin]["step"].item() for twin in twins]

    @pytest.mark.parametrize("name", ["combine", "sgd", "adam"])
    @dtypes
    def test_an_invalid_step_restores_and_writes_nothing_else(self, make_step, bits_of, name, dtype):
        step = make_step(dtype)
        for grads in (step.first_grads, step.grads):
            grads[3].fill_(math.nan)
        before = bits_of(vars(step.clone()))
        update(name, step, INVALID)
        after = bits_of(vars(step))
        assert after.pop("params") == before["backups"]
        assert after == {key: value for key, value in before.items() if key != "params"}

    @pytest.mark.parametrize("name", ["sgd", "adam"])
    @dtypes
    def test_a_learning_rate_of_zero_keeps_every_bit(self, make_step, bits_of, name, dtype):
        step = make_step(dtype)
        special = torch.tensor([-0.0, 1e-42, 1e4, -1e-42, 0.0, 1.0, -0.0]).to(dtype)
        step.backups[1].copy_(special)
        before = step.clone()
        update(name, step, VALID, lr=0.0, decoupled=True)
        assert bits_of(step.params) == bits_of(before.backups)
        assert bits_of(step.momentum_buffers) != bits_of(before.momentum_buffers)

    def test_combine_writes_the_combination(self, make_step):
        step = make_step(torch.float64)
        before = step.clone()
        update("combine", step, VALID)
        expected = [0.3 * a + 0.6 * b for a, b in zip(before.first_grads, before.grads, strict=True)]
        torch.testing.assert_close(step.grads, expected, rtol=1e-15, atol=1e-15)
        assert all(map(torch.equal, step.params, before.backups))

    @pytest.mark.parametrize("name", ["combine", "sgd", "adam"])
    def test_missing_first_gradients_count_as_zeros(self, make_step, bits_of, name):
        zeros, empty, none = make_step(), make_step(), make_step()
        for g0 in zeros.first_grads:
            g0.zero_()
        empty.first_grads = [torch.empty(0)] * len(empty.grads)
        none.first_grads = []
        for step in (zeros, empty, none):
            update(name, step, VALID)
        assert bits_of(zeros.params) == bits_of(empty.params) == bits_of(none.params)


def operator_calls(step) -> dict[str, tuple]:
    """Arguments for every operator."""
    lists = (step.params, step.backups, step.first_grads, step.grads)
    rho, counts = scalar(0.1), torch.zeros(len(COUNTS), dtype=torch.int64)
    dots, losses = torch.tensor([4.0, 2, 3, 2]).double(), torch.tensor([1.0, 1.5]).double()
    return {
        "sam_norm": (step.params, step.grads, step.rho_scales, True),
        "sam_ascent_step": (scalar(4.0), scalar(0.3), None, 0.1, True),
        "sam_perturb": (*lists, scalar(0.3), step.rho_scales, True),
        "sam_dots": (step.backups, step.first_grads, step.grads, step.rho_scales, True),
        "sam_coefficients": (
            *(scalar(4.0), scalar(0.5), dots, losses, None, scalar(0.0), rho, counts),
            *(VARIANTS.index("gsam"), 0.3, 0.5, True, 0.01, 0.5),
        ),
        "sam_combine": (*lists, VALID),
        "sam_sgd": (*lists, step.momentum_buffers, VALID, None, 0.1, 0.9, 0.01, True),
        "sam_adam": (
            *(*lists, step.momentum_buffers, step.exp_avg_sqs, step.steps, VALID),
            *(scalar(0.1), 0.0, 0.9, 0.99, 1e-8, 0.01, True),
        ),
    }


class TestOperators:
    def test_every_operator_is_called_below(self, make_step):
        assert tuple(operator_calls(make_step())) == OPERATORS

    @pytest.mark.parametrize("name", OPERATORS)
    def test_is_well_defined_for_torch(self, make_step, name):
        """What is written is declared, and the fakes have the shapes of the results."""
        layouts = ("7 values", "channels_last", "a scalar", "empty")
        torch.library.opcheck(getattr(ops, name).default, operator_calls(make_step(layouts=layouts))[name])

    @pytest.mark.parametrize("name", OPERATORS)
    def test_the_reference_runs_when_it_is_chosen(self, make_step, monkeypatch, name):
        called, run = [], getattr(sam_reference, name)

        def spy(*args):
            called.append(name)
            return run(*args)

        monkeypatch.setattr(sam_reference, name, spy)
        with backend("reference"):
            getattr(ops, name).default(*operator_calls(make_step())[name])
        assert called == [name]
