import copy
import io
import math
import pickle
import random
import warnings

import pytest
import torch
from torch import nn

from asga.optim import ASGA


def two_passes(problem, optimizer, *, after_backward=lambda number: None, losses=True):
    """One step of the two-call protocol; `after_backward(1 or 2)` may tamper with the gradients."""
    for number, take in ((1, optimizer.first_step), (2, optimizer.second_step)):
        loss = problem.loss()
        loss.backward()
        after_backward(number)
        take(loss if losses else None)


class TestProtocols:
    def test_closure_and_two_calls_give_the_same_bits(self, make_problem, same_bits):
        one, two = make_problem(), make_problem()
        first = ASGA(one.params, lr=0.1, momentum=0.9)
        second = ASGA(two.params, lr=0.1, momentum=0.9)
        for _ in range(20):
            first.step(one.closure(first))
            two_passes(two, second)
        assert same_bits(one.params, two.params)

    def test_two_runs_give_the_same_bits(self, make_problem, same_bits):
        runs = [make_problem() for _ in range(2)]
        for run in runs:
            optimizer = ASGA(run.params, torch.optim.AdamW, lr=0.01, variant="gsam", max_norm=0.1)
            for _ in range(20):
                optimizer.step(run.closure(optimizer))
        assert same_bits(runs[0].params, runs[1].params)

    def test_step_returns_the_first_loss_and_calls_the_closure_twice_with_gradients_enabled(self, problem):
        optimizer = ASGA(problem.params, lr=0.1)
        closure, seen = problem.closure(optimizer), []

        def recording():
            assert torch.is_grad_enabled()
            seen.append(closure())
            return seen[-1]

        with torch.no_grad():
            assert optimizer.step(recording) is seen[0]
        assert len(seen) == 2
        assert seen[1] > seen[0], "the second pass must see the perturbed, worse weights"

    def test_closure_may_return_a_number(self, problem):
        optimizer = ASGA(problem.params, lr=0.1)
        closure = problem.closure(optimizer)
        start = problem.loss().item()
        assert optimizer.step(lambda: closure().item()) == start
        assert problem.loss().item() < start

    def test_gradients_are_cleared_by_default_and_kept_on_request(self, problem):
        optimizer = ASGA(problem.params, lr=0.0)
        two_passes(problem, optimizer)
        assert all(p.grad is None for p in problem.params)
        problem.loss().backward()
        optimizer.first_step(zero_grad=False)
        assert all(p.grad is not None for p in problem.params)
        optimizer.second_step(zero_grad=False)
        assert all(p.grad is not None for p in problem.params)

    def test_grad_holds_the_combined_gradient_after_a_closure_step(self, problem):
        optimizer = ASGA(problem.params, lr=0.5, fused=False)
        before = problem.weights()
        optimizer.step(problem.closure(optimizer))
        expected = [w - 0.5 * p.grad for w, p in zip(before, problem.params, strict=True)]
        torch.testing.assert_close(problem.weights(), expected)

    def test_second_backward_may_reuse_the_memory_of_the_first(self, make_problem, same_bits):
        """DDP's bucket views: the gradients of both passes are one and the same tensor."""
        problem, twin = make_problem(), make_problem()
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        one, two = ASGA(problem.params, lr=0.1), ASGA(twin.params, lr=0.1)
        pointers = [p.grad.data_ptr() for p in problem.params]
        for take in (one.first_step, one.second_step):
            one.zero_grad(set_to_none=False)
            loss = problem.loss()
            loss.backward()
            take(loss, zero_grad=False)
        two_passes(twin, two)
        assert [p.grad.data_ptr() for p in problem.params] == pointers
        assert same_bits(problem.params, twin.params)

    @pytest.mark.parametrize("protocol", ["closure", "two calls"])
    def test_one_autocast_around_both_passes_sees_the_perturbed_weights(self, make_problem, same_bits, protocol):
        """Within it, autocast keeps copies of the weights in low precision."""
        one, two = make_problem(), make_problem()
        options = {"lr": 0.1, "radius": "constant", "rho_max": 1.0, "variant": "sam"}
        around, inside = ASGA(one.params, **options), ASGA(two.params, **options)

        def cast():
            return torch.autocast("cpu", torch.bfloat16)

        def step_inside():
            inside.zero_grad()
            with cast():
                loss = two.loss()
            loss.backward()
            return loss

        for _ in range(3):
            with cast():
                if protocol == "closure":
                    around.step(one.closure(around))
                else:
                    two_passes(one, around)
                    assert torch.equal(one.loss(), one.loss())
            inside.step(step_inside)
        assert same_bits(one.params, two.params)
        assert around.diagnostics()["h"] > 0.1

    @pytest.mark.parametrize("protocol", ["closure", "two calls"])
    def test_a_compiled_training_step_is_the_same(self, make_problem, same_bits, protocol):
        """The optimizer itself is left out of the graph."""
        one, two = make_problem(), make_problem()
        compiled, plain = ASGA(one.params, lr=0.1), ASGA(two.params, lr=0.1)
        if protocol == "closure":
            step = torch.compile(lambda: compiled.step(one.closure(compiled)), backend="eager")
        else:
            step = torch.compile(lambda: two_passes(one, compiled), backend="eager")
        for _ in range(2):
            step()
            plain.step(two.closure(plain))
        assert same_bits(one.params, two.params)

    @pytest.mark.parametrize("protocol", ["closure", "two calls"])
    def test_hooks_are_called_once_a_step(self, problem, protocol):
        """Before its first part and after its second, with the weights where they belong."""
        optimizer, called = ASGA(problem.params, lr=0.1), []
        optimizer.register_step_pre_hook(lambda *args: called.append(("before", problem.weights())))
        optimizer.register_step_post_hook(lambda *args: called.append(("after", problem.weights())))
        start = problem.weights()
        if protocol == "closure":
            optimizer.step(problem.closure(optimizer))
        else:
            two_passes(problem, optimizer)
        assert [name for name, _ in called] == ["before", "after"]
        assert all(torch.equal(a, b) for a, b in zip(called[0][1], start, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(called[1][1], problem.params, strict=True))

    def test_a_graph_of_pass_1_cannot_be_used_after_the_weights_have_moved(self, problem):
        """Torch would give it gradients at a mix of old and new weights, but for their version."""
        optimizer = ASGA(problem.params, lr=0.1)
        for take in (optimizer.first_step, optimizer.second_step):
            old = problem.loss()
            problem.loss().backward()
            take()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                old.backward()
            optimizer.zero_grad()
            if take == optimizer.first_step:
                problem.loss().backward()


class TestRestore:
    def test_lr_zero_leaves_every_bit_through_missing_nan_and_inf_gradients(self, make_problem, same_bits):
        """300 steps with faults drawn at random in either pass; weights never move, and good steps happen."""
        problem, choose = make_problem(), random.Random(0)
        with torch.no_grad():
            problem.params[0][0, 0] = 1e-42  # denormal
            problem.params[0][0, 1] = 1e30  # no perturbation survives here by subtracting it
        optimizer = ASGA(problem.params, lr=0.0, momentum=0.9, rho_max=0.5)
        before = problem.weights()
        faults = ["none", "missing", math.nan, math.inf, -math.inf]

        def tamper(number):
            fault, p = choose.choice(faults), choose.choice(problem.params)
            if fault == "missing":
                p.grad = None
            elif fault != "none":
                p.grad.view(-1)[0] = fault

        for _ in range(300):
            two_passes(problem, optimizer, after_backward=tamper)
            assert same_bits(problem.params, before)
        report = optimizer.diagnostics()
        assert report["steps"] == 300
        assert 100 < report["skipped"] < 250

    @pytest.mark.parametrize("variant", ["sam", "aligned", "gsam", "conflict"])
    @pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
    @pytest.mark.parametrize("number", [1, 2], ids=["pass 1", "pass 2"])
    @pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "Inf"])
    def test_bad_gradient_moves_nothing(self, problem, same_bits, variant, base, number, value):
        options = {"momentum": 0.9} if base is torch.optim.SGD else {}
        optimizer = ASGA(problem.params, base, variant=variant, lr=0.1, weight_decay=0.1, **options)
        two_passes(problem, optimizer)
        before = problem.weights()
        state = copy.deepcopy(optimizer.state_dict())

        def tamper(current):
            if current == number:
                problem.params[1].grad[2] = value

        two_passes(problem, optimizer, after_backward=tamper)
        assert same_bits(problem.params, before)
        after = optimizer.state_dict()
        assert (after["asga"]["steps"], after["asga"]["skipped"]) == (2, 1)
        for counter in ("steps", "skipped"):
            del state["asga"][counter], after["asga"][counter]
        torch.testing.assert_close(after, state, rtol=0, atol=0)

    @pytest.mark.parametrize("variant", ["sam", "aligned", "gsam", "conflict"])
    @pytest.mark.parametrize("products", ["all", "guard", "none"])
    @pytest.mark.parametrize("number", [1, 2], ids=["pass 1", "pass 2"])
    def test_bad_gradient_of_what_is_not_perturbed_moves_nothing(self, problem, same_bits, variant, products, number):
        groups = [{"params": problem.params[:1]}, {"params": problem.params[1:], "rho_scale": 0.0}]
        optimizer = ASGA(groups, variant=variant, products=products, lr=0.1)
        before = problem.weights()

        def tamper(current):
            if current == number:
                problem.params[1].grad[2] = math.nan

        two_passes(problem, optimizer, after_backward=tamper)
        if variant != "sam":  # whose update does not use the gradient of the first pass
            assert same_bits(problem.params, before)
        elif (products, number) != ("none", 2):  # where nobody asked for a guard of the second
            assert all(torch.isfinite(p).all() for p in problem.params)

    @pytest.mark.parametrize("number", [1, 2], ids=["pass 1", "pass 2"])
    @pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "Inf"])
    def test_bad_loss_with_good_gradients_moves_nothing(self, problem, same_bits, number, value):
        optimizer = ASGA(problem.params, lr=0.1)
        before, rho, calls = problem.weights(), optimizer.rho.clone(), 0
        closure = problem.closure(optimizer)

        def tampered():
            nonlocal calls
            calls += 1
            loss = closure()
            return loss * value if calls == number else loss

        optimizer.step(tampered)
        assert same_bits(problem.params, before)
        assert torch.equal(optimizer.rho, rho)
        assert optimizer.diagnostics()["skipped"] == 1

    def test_bad_pass_1_leaves_the_weights_finite_for_pass_2(self, problem, same_bits):
        before = problem.weights()
        problem.loss().backward()
        problem.params[0].grad[0, 0] = math.inf
        optimizer = ASGA(problem.params)
        optimizer.first_step()
        assert same_bits(problem.params, before)

    @pytest.mark.parametrize("variant", ["sam", "aligned", "gsam", "conflict"])
    def test_zero_gradient_moves_nothing(self, problem, same_bits, variant):
        before = problem.weights()
        for p in problem.params:
            p.grad = torch.zeros_like(p)
        optimizer = ASGA(problem.params, variant=variant, lr=0.1)
        optimizer.first_step(zero_grad=False)
        assert same_bits(problem.params, before)
        optimizer.second_step()
        assert same_bits(problem.params, before)
        assert optimizer.diagnostics()["skipped"] == 0

    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, torch.cuda.OutOfMemoryError])
    def test_exception_in_pass_2_restores_weights_and_statistics(self, make_problem, same_bits, error):
        problem, twin = make_problem(batchnorm=True), make_problem(batchnorm=True)
        optimizer = ASGA(problem.params, lr=0.1, model=problem.model)
        before, closure, calls = problem.weights(), problem.closure(optimizer), 0
        twin.loss()

        def interrupted():
            nonlocal calls
            calls += 1
            loss = closure()
            if calls == 2:
                assert not same_bits(problem.params, before)
                raise error("stop")
            return loss

        with pytest.raises(error):
            optimizer.step(interrupted)
        assert same_bits(problem.params, before)
        torch.testing.assert_close(dict(problem.model.named_buffers()), dict(twin.model.named_buffers()))
        optimizer.step(closure)
        assert not same_bits(problem.params, before)

    @pytest.mark.parametrize("fault", ["an exception", "no loss"])
    def test_a_pass_1_that_fails_leaves_weights_and_statistics(self, make_problem, same_bits, fault):
        problem = make_problem(batchnorm=True)
        optimizer = ASGA(problem.params, lr=0.1, model=problem.model)
        before = copy.deepcopy(problem.model.state_dict())

        def closure():
            problem.loss().backward()
            if fault == "an exception":
                raise RuntimeError("no data")

        with pytest.raises((RuntimeError, TypeError)):
            optimizer.step(closure)
        torch.testing.assert_close(problem.model.state_dict(), before, rtol=0, atol=0)
        optimizer.step(problem.closure(optimizer))

    def test_exception_while_perturbing_restores_what_has_moved(self, problem, same_bits, monkeypatch):
        """Two sweeps, one for each dtype; an interrupt comes right before, or right after, the second."""
        twin = nn.Parameter(torch.ones(3, dtype=torch.float64))
        params = [*problem.params, twin]
        before = [p.detach().clone() for p in params]
        run, calls = torch.ops.asga.sam_perturb, []

        class Interrupted:
            @staticmethod
            def default(*args):
                calls.append(args)
                if len(calls) == 1 or late:
                    run.default(*args)
                if len(calls) == 2:
                    assert not same_bits(params, before)
                    raise KeyboardInterrupt

        for late in (False, True):  # noqa: B007 (read by the class above)
            calls.clear()
            optimizer = ASGA(params)
            (problem.loss() + twin.square().sum()).backward()
            with monkeypatch.context() as patch:
                patch.setattr(torch.ops.asga, "sam_perturb", Interrupted)
                with pytest.raises(KeyboardInterrupt):
                    optimizer.first_step()
            assert len(calls) == 2
            assert same_bits(params, before)

    def test_restore_abandons_a_step_of_two_calls(self, problem, same_bits):
        before = problem.weights()
        optimizer = ASGA(problem.params, lr=0.1)
        optimizer.restore()
        problem.loss().backward()
        optimizer.first_step()
        assert not same_bits(problem.params, before)
        optimizer.restore()
        assert same_bits(problem.params, before)
        two_passes(problem, optimizer)
        assert optimizer.diagnostics()["steps"] == 1

    def test_error_in_the_base_optimizer_leaves_restored_weights(self, problem, same_bits):
        class Failing(torch.optim.SGD):
            def step(self, closure=None):
                raise RuntimeError("disk full")

        before = problem.weights()
        optimizer = ASGA(problem.params, Failing)
        with pytest.raises(RuntimeError, match="disk full"):
            optimizer.step(problem.closure(optimizer))
        assert same_bits(problem.params, before)


class TestEdgeCases:
    def test_gradient_missing_in_pass_1_counts_as_zero(self, problem):
        optimizer = ASGA(problem.params, lr=1.0)
        p, before = problem.params[1], problem.params[1].detach().clone()
        g1 = []

        def tamper(number):
            if number == 1:
                p.grad = None
            else:
                assert torch.equal(p.detach(), before), "perturbed without a gradient"
                g1.append(p.grad.clone())

        two_passes(problem, optimizer, after_backward=tamper)
        torch.testing.assert_close(p.detach(), before - g1[0] / 2)

    def test_gradient_missing_in_pass_2_restores_and_skips_the_parameter(self, problem):
        optimizer = ASGA(problem.params, lr=0.1, momentum=0.9, weight_decay=0.1, max_norm=1e-3)
        p, before = problem.params[1], problem.weights()

        def tamper(number):
            if number == 2:
                assert not torch.equal(p.detach(), before[1]), "not perturbed"
                p.grad = None

        two_passes(problem, optimizer, after_backward=tamper)
        assert torch.equal(p.detach(), before[1])
        assert p not in optimizer.state
        assert not torch.equal(problem.params[0].detach(), before[0])

    def test_empty_tensors_are_skipped(self, problem):
        empty = nn.Parameter(torch.empty(0, 3))
        optimizer = ASGA([empty, *problem.params], lr=0.1)
        start = problem.loss().item()
        closure = problem.closure(optimizer)

        def with_empty():
            loss = closure()
            empty.grad = torch.empty(0, 3)
            return loss

        optimizer.step(with_empty)
        assert problem.loss().item() < start

    def test_only_empty_tensors_have_gradients(self):
        empty = nn.Parameter(torch.empty(0))
        optimizer = ASGA([empty])
        for take in (optimizer.first_step, optimizer.second_step):
            empty.grad = torch.empty(0)
            take()
        assert optimizer.diagnostics()["norm_g1"] == 0.0

    def test_several_dtypes_in_one_optimizer(self):
        """Each dtype gets the update of the same mathematics, to its own rounding."""
        dtypes = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
        params = [nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype)) for dtype in dtypes]
        with pytest.warns(UserWarning, match=r"bfloat16, torch.float16"):
            optimizer = ASGA(params, lr=0.5, alpha=0.0, radius="constant", rho_max=2.0)

        def closure():
            optimizer.zero_grad()
            loss = sum(p.double().square().sum() for p in params) / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        # g0 = theta, g1 = (1 + s) theta with s = 2 / sqrt(4 * 5), so theta <- (1 - (1 + s / 2) / 2) theta
        factor = 1 - (1 + 1 / math.sqrt(20)) / 2
        for p in params:
            expected = torch.tensor([factor, -2 * factor], dtype=torch.float64)
            # A few roundings of relative size eps of values up to 2.
            torch.testing.assert_close(p.double(), expected, rtol=0, atol=8 * torch.finfo(p.dtype).eps)

    def test_float16_products_do_not_overflow(self):
        """A gradient of 300 has a square beyond float16; it must not read as infinite."""
        with pytest.warns(UserWarning, match="float16"):
            optimizer = ASGA([nn.Parameter(torch.ones(4, dtype=torch.float16))], lr=1e-3)
        p = optimizer.param_groups[0]["params"][0]
        for take in (optimizer.first_step, optimizer.second_step):
            p.grad = torch.full_like(p, 300.0)
            take()
        report = optimizer.diagnostics()
        assert report["skipped"] == 0
        assert report["norm_g0"] == 600.0

    def test_gradient_and_weight_with_different_strides(self):
        weight = torch.arange(2.0 * 3 * 4 * 5).reshape(2, 3, 4, 5) / 60
        params = [nn.Parameter(weight.clone()), nn.Parameter(weight.to(memory_format=torch.channels_last))]
        for p in params:
            optimizer = ASGA([p], lr=0.1, adaptive=True)
            for take in (optimizer.first_step, optimizer.second_step):
                p.grad = (p.detach() - 1).contiguous()
                take()
        assert params[1].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(params[0].detach(), params[1].detach().contiguous())

    def test_unperturbed_group_is_still_trained(self, problem):
        scale = problem.params[1]
        others = [p for p in problem.params if p is not scale]
        optimizer = ASGA([{"params": others}, {"params": [scale], "rho_scale": 0.0}], lr=0.1)
        before = scale.detach().clone()

        def check(number):
            assert torch.equal(scale.detach(), before), f"moved before the end of pass {number}"

        two_passes(problem, optimizer, after_backward=check)
        assert not torch.equal(scale.detach(), before)

    def test_frozen_parameters_are_left_alone(self, problem):
        frozen = problem.params[0].requires_grad_(False)
        before = frozen.detach().clone()
        optimizer = ASGA(problem.params, lr=0.1)
        optimizer.step(problem.closure(optimizer))
        assert torch.equal(frozen, before)


class TestGroupsAndSchedulers:
    def test_scheduler_reaches_the_base_optimizer(self, make_problem, same_bits):
        problem, twin = make_problem(), make_problem()
        optimizer = ASGA(problem.params, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
        by_hand = ASGA(twin.params, lr=0.1)
        for step in range(5):
            by_hand.param_groups[0]["lr"] = 0.1 * 0.5**step
            by_hand.step(twin.closure(by_hand))
            optimizer.step(problem.closure(optimizer))
            scheduler.step()
        assert optimizer.base_optimizer.param_groups[0]["lr"] == 0.1 * 0.5**5
        assert same_bits(problem.params, twin.params)

    @pytest.mark.parametrize("protocol", ["closure", "two calls"])
    def test_scheduler_does_not_warn_about_the_order(self, problem, protocol):
        optimizer = ASGA(problem.params, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if protocol == "closure":
                optimizer.step(problem.closure(optimizer))
            else:
                two_passes(problem, optimizer)
            scheduler.step()

    def test_group_options_of_the_base_optimizer(self, problem):
        before = problem.weights()
        groups = [{"params": problem.params[:2], "lr": 0.0}, {"params": problem.params[2:]}]
        optimizer = ASGA(groups, lr=0.1)
        optimizer.step(problem.closure(optimizer))
        moved = [not torch.equal(p.detach(), w) for p, w in zip(problem.params, before, strict=True)]
        assert moved == [False, False, True, True]

    def test_added_group_is_trained_with_the_base_defaults(self, problem):
        optimizer = ASGA(problem.params[:2], lr=0.1, momentum=0.5)
        optimizer.step(problem.closure(optimizer))
        optimizer.add_param_group({"params": problem.params[2:], "rho_scale": 0.5})
        assert optimizer.base_optimizer.param_groups[1]["momentum"] == 0.5
        before = problem.weights()
        optimizer.step(problem.closure(optimizer))
        assert not torch.equal(problem.params[2].detach(), before[2])

    def test_named_parameters(self, problem):
        optimizer = ASGA(problem.model.named_parameters(), lr=0.1)
        assert optimizer.param_groups[0]["param_names"][0] == "0.weight"
        optimizer.step(problem.closure(optimizer))


class TestLastSkipped:
    @pytest.mark.parametrize("fused", [None, False])
    @pytest.mark.parametrize("number", [1, 2], ids=lambda number: f"pass {number}")
    def test_follows_the_steps(self, problem, fused, number):
        optimizer = ASGA(problem.params, lr=0.1, fused=fused)
        assert not optimizer.last_skipped
        passes = []

        def closure(factor):
            optimizer.zero_grad()
            passes.append(1)
            loss = problem.loss() * (factor if len(passes) % 2 == number % 2 else 1.0)
            loss.backward()
            return loss

        for factor, skipped in ((1.0, False), (math.nan, True), (1.0, False)):
            optimizer.step(lambda factor=factor: closure(factor))
            assert optimizer.last_skipped.item() is skipped


class TestScaleRadius:
    def test_steps_perturb_by_less(self, problem):
        optimizer = ASGA(problem.params, lr=0.1, radius="constant", rho_max=0.4)
        moved = []
        for _ in range(2):
            before = problem.weights()
            problem.loss().backward()
            optimizer.first_step()
            moved.append(torch.cat([(a - b).flatten() for a, b in zip(before, problem.weights(), strict=True)]).norm())
            optimizer.restore()
            optimizer.scale_radius(0.5)
        # Moves are differences of float32 weights of about 1.
        torch.testing.assert_close(moved[1], moved[0] / 2, rtol=1e-4, atol=0)
        assert (optimizer.rho_max, optimizer.rho.item()) == (0.1, 0.1)

    @pytest.mark.parametrize("factor", [0.0, -1.0, math.nan, math.inf])
    def test_out_of_range(self, problem, factor):
        optimizer = ASGA(problem.params, lr=0.1)
        with pytest.raises(ValueError, match=f"factor is {factor}; it must be positive and finite"):
            optimizer.scale_radius(factor)
        assert optimizer.rho_max == 0.5

    def test_between_the_passes(self, problem):
        optimizer = ASGA(problem.params, lr=0.1)
        problem.loss().backward()
        optimizer.first_step()
        with pytest.raises(RuntimeError, match=r"scale_radius\(\) between first_step"):
            optimizer.scale_radius(0.5)


class TestStateDict:
    @pytest.mark.parametrize(
        ("base", "options"),
        [
            (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
            (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1}),
            (torch.optim.Adagrad, {"lr": 0.01}),
            (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "fused": False}),
            (torch.optim.SGD, {"lr": 0.05, "radius": "proportional"}),
            (torch.optim.SGD, {"lr": 0.05, "radius": "constant", "rho_max": 0.05}),
            (torch.optim.AdamW, {"lr": 0.01, "variant": "gsam", "max_norm": 0.1}),
            (torch.optim.SGD, {"lr": 0.05, "variant": "sam", "adaptive": True}),
            (torch.optim.SGD, {"lr": 0.05, "variant": "conflict"}),
        ],
        ids=["SGD", "AdamW", "Adagrad", "not fused", "proportional", "constant", "gsam, clipped", "ASAM", "conflict"],
    )
    def test_resume_is_bit_identical(self, make_problem, same_bits, base, options):
        """With a scheduler and a GradScaler, across a step that the scaler has left out."""

        def parts(problem, **changed):
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7, growth_interval=3)
            optimizer = ASGA(problem.params, base, scaler=scaler, **{**options, **changed})
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
            return {"model": problem.model, "optimizer": optimizer, "scheduler": scheduler, "scaler": scaler}

        def train(problem, parts, steps):
            optimizer, scaler = parts["optimizer"], parts["scaler"]
            for number in steps:
                for index, take in enumerate((optimizer.first_step, optimizer.second_step)):
                    loss = problem.loss()
                    scaler.scale(loss).backward()
                    if (number, index) in ((5, 1), (9, 0)):
                        problem.params[0].grad[0, 0] = math.inf
                    take(loss)
                scaler.update()
                parts["scheduler"].step()

        whole = make_problem()
        uninterrupted = parts(whole)
        train(whole, uninterrupted, range(7))
        file = io.BytesIO()
        torch.save({name: part.state_dict() for name, part in uninterrupted.items()}, file)
        train(whole, uninterrupted, range(7, 14))

        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed = make_problem()
        continued = parts(resumed, lr=123.0)
        for name, part in continued.items():
            part.load_state_dict(saved[name])
        train(resumed, continued, range(7, 14))
        assert same_bits(resumed.params, whole.params)
        for name, part in continued.items():
            torch.testing.assert_close(part.state_dict(), uninterrupted[name].state_dict(), rtol=0, atol=0)
        assert continued["optimizer"].diagnostics()["skipped"] == 2

    def test_weights_that_move_to_another_dtype_get_room_of_that_dtype(self, make_problem, same_bits):
        """Backups and momentum of before are of no use."""
        one, two = make_problem(), make_problem()
        optimizer = ASGA(one.params, lr=0.1)
        optimizer.step(one.closure(optimizer))
        two.model.load_state_dict(one.model.state_dict())
        for problem in (one, two):
            problem.model.double()
            problem.x, problem.y = problem.x.double(), problem.y.double()
        fresh = ASGA(two.params, lr=0.1)
        fresh.rho.copy_(optimizer.rho)
        for problem, other in ((one, optimizer), (two, fresh)):
            other.step(problem.closure(other))
        assert same_bits(one.params, two.params)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"rho_min": 0.01, "rho_max": 0.02}, 0.02),
            ({"rho_min": 0.01, "rho_max": 0.4, "radius": "constant"}, 0.4),
        ],
        ids=["adaptive", "constant"],
    )
    def test_a_radius_above_the_bound_here_is_brought_within(self, problem, options, expected):
        saved = ASGA(problem.params, rho_min=0.1, rho_max=0.2).state_dict()
        optimizer = ASGA(problem.params, **options)
        optimizer.load_state_dict(saved)
        assert optimizer.rho.item() == expected

    def test_loading_keeps_groups_and_state_shared(self, problem):
        optimizer = ASGA(problem.params, lr=0.1, momentum=0.9)
        optimizer.step(problem.closure(optimizer))
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups is optimizer.base_optimizer.param_groups
        assert optimizer.state is optimizer.base_optimizer.state

    def test_holds_no_backups_and_does_not_change_afterwards(self, problem):
        optimizer = ASGA(problem.params, lr=0.1)
        optimizer.step(problem.closure(optimizer))
        saved = optimizer.state_dict()
        rho = saved["asga"]["rho"].item()
        optimizer.step(problem.closure(optimizer))
        assert saved["asga"]["rho"].item() == rho != optimizer.rho.item()
        tensors = [value for value in saved["asga"].values() if isinstance(value, torch.Tensor)]
        assert all(value.dim() == 0 for value in tensors)
        assert all(not state or "momentum_buffer" in state for state in saved["state"].values())

    @pytest.mark.parametrize(
        "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
    )
    def test_copies_continue_like_the_original(self, problem, same_bits, copied):
        optimizer = ASGA(problem.params, lr=0.1, momentum=0.9)
        two_passes(problem, optimizer)
        twin = copied(optimizer)
        two_passes(problem, optimizer)
        params = twin.param_groups[0]["params"]
        for take in (twin.first_step, twin.second_step):
            weights = dict(zip(problem.model.state_dict(), params, strict=True))
            output = torch.func.functional_call(problem.model, weights, problem.x)
            loss = (output - problem.y).square().mean()
            loss.backward()
            take(loss)
        assert same_bits(params, problem.params)


class TestDiagnostics:
    def test_of_a_quadratic_are_known_exactly(self):
        """L = a ||x||^2 / 2: g1 = (1 + a s) g0, kappa = a, h and sigma in closed form."""
        a, rho = 3.0, 0.25
        x = nn.Parameter(torch.tensor([0.6, -0.8], dtype=torch.float64))
        optimizer = ASGA([x], alpha=0.2, radius="constant", rho_max=rho, lr=0.1)

        def closure():
            optimizer.zero_grad()
            loss = a * x.square().sum() / 2
            loss.backward()
            return loss

        optimizer.step(closure)
        s = 0.8 * rho / a
        h = a * ((1 + a * s) ** 2 - 1) / 2
        expected = {
            "h": h,
            "rho": rho,
            "norm_g0": a,
            "norm_g1": a * (1 + a * s),
            "cosine": 1.0,
            "sigma": 2 * h / rho**2,
            "kappa": a,
            "share_at_rho_min": 0.0,
            "share_at_rho_max": 0.0,
            "steps": 1.0,
            "skipped": 0.0,
        }
        assert optimizer.diagnostics() == pytest.approx(expected, rel=1e-12)

    def test_adaptive_kappa_is_the_curvature_in_the_scaled_coordinates(self):
        """L = a x^2 / 2 in one dimension with T = |x|: kappa = a x^2."""
        a, start = 3.0, 0.5
        x = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        optimizer = ASGA([x], adaptive=True, lr=0.0)
        for take in (optimizer.first_step, optimizer.second_step):
            (a * x.square().sum() / 2).backward()
            take()
        report = optimizer.diagnostics()
        assert report["kappa"] == pytest.approx(a * start**2, rel=1e-12)
        # The gap of a quadratic is the trapezoid between the two gradients, without any loss given.
        moved = start * (1 + 0.9 * report["rho"])  # epsilon = s x^2 g = (1 - alpha) rho x
        assert report["h"] == pytest.approx(a * (moved**2 - start**2) / 2, rel=1e-12)

    def test_are_nan_before_the_first_step(self, problem):
        report = ASGA(problem.params).diagnostics()
        assert math.isnan(report["h"])
        assert report["steps"] == 0

    @pytest.mark.parametrize(
        ("options", "bound"),
        [
            # The gap is about 3 rho: far below 1 where rho starts, so log(1 + h) lies above rho_max ...
            ({"rho_min": 1e-3, "rho_max": 2e-3}, "rho_max = 0.002"),
            # ... and below a rho_min that exceeds the largest gap of this problem.
            ({"rho_min": 20.0, "rho_max": 40.0}, "rho_min = 20"),
        ],
        ids=["stuck at rho_max", "collapsed to rho_min"],
    )
    def test_stuck_radius_is_reported_when_read(self, problem, options, bound):
        optimizer = ASGA(problem.params, lr=0.0, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(100):
                two_passes(problem, optimizer)
                if step == 98:
                    optimizer.diagnostics()
        with pytest.warns(UserWarning, match=f"clamped at {bound} in 100% of the steps"):
            optimizer.diagnostics()

    def test_moving_radius_is_not_reported(self, problem):
        optimizer = ASGA(problem.params, lr=0.0, rho_min=1e-6, rho_max=40.0)
        for _ in range(100):
            two_passes(problem, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = optimizer.diagnostics()
        assert 1e-6 < report["rho"] < 40.0
