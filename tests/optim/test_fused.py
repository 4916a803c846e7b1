"""The update as part of the last sweep: against the unfused step, against torch, and its promises."""

import copy
import math
import random
import sys

import pytest
import torch
from torch import nn

from asga.ops import backend
from asga.optim import ASGA
from asga.optim._lists import may_be_of_a_graph

BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.1}),
    "SGD momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2}),
    "SGD Nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "Adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 1e-2}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}),
}
bases = pytest.mark.parametrize("base", BASES)
variants = pytest.mark.parametrize("variant", ["sam", "aligned", "gsam", "conflict"])


def optimizer_of(problem, base, **options):
    kind, base_options = BASES[base]
    return ASGA(problem.params, kind, **{**base_options, **options})


class TestParity:
    @bases
    @variants
    @pytest.mark.parametrize("max_norm", [None, 0.05], ids=["not clipped", "clipped"])
    def test_50_steps_are_those_of_the_unfused_optimizer(self, make_problem, base, variant, max_norm):
        """float64; torch contracts products and sums into one rounding, and Adam amplifies small differences."""
        runs = []
        for fused in (True, False):
            problem = make_problem(torch.float64)
            optimizer = optimizer_of(problem, base, variant=variant, max_norm=max_norm, fused=fused)
            for _ in range(50):
                optimizer.step(problem.closure(optimizer))
            runs.append((problem.weights(), optimizer.state_dict()))
        torch.testing.assert_close(runs[0][0], runs[1][0], rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(runs[0][1], runs[1][1], rtol=1e-6, atol=1e-9)

    @bases
    @pytest.mark.parametrize("adaptive", [False, True], ids=["SAM", "ASAM"])
    def test_kernels_and_reference_agree_within_rounding(self, make_problem, base, adaptive):
        runs = []
        for name in (None, "reference"):
            problem = make_problem()
            optimizer = optimizer_of(problem, base, variant="gsam", adaptive=adaptive)
            with backend(name):
                for _ in range(10):
                    optimizer.step(problem.closure(optimizer))
            runs.append(problem.weights())
        torch.testing.assert_close(runs[0], runs[1], rtol=1e-4, atol=1e-5)

    @bases
    def test_a_tensor_as_the_learning_rate_gives_the_same_bits(self, make_problem, same_bits, base):
        one, two = make_problem(), make_problem()
        lr = torch.tensor(BASES[base][1]["lr"], dtype=torch.float64)
        first, second = optimizer_of(one, base), optimizer_of(two, base, lr=lr)
        for _ in range(5):
            first.step(one.closure(first))
            second.step(two.closure(second))
        assert same_bits(one.params, two.params)


class TestState:
    @bases
    def test_is_interchangeable_with_that_of_torch(self, make_problem, base):
        """A fused run goes on with torch's optimizer, and back."""
        problem = make_problem()
        optimizer = optimizer_of(problem, base, fused=True)
        for _ in range(3):
            optimizer.step(problem.closure(optimizer))
        saved = optimizer.state_dict()
        saved.pop("asga")
        kind, options = BASES[base]
        plain = kind([p.detach().clone().requires_grad_() for p in problem.params], **options)
        plain.load_state_dict({**saved, "param_groups": [dict(saved["param_groups"][0])]})
        for p in plain.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        plain.step()
        back = {**plain.state_dict(), "asga": optimizer.state_dict()["asga"]}
        optimizer.load_state_dict(back)
        optimizer.step(problem.closure(optimizer))
        expected = {"momentum_buffer"} if "momentum" in base or "Nesterov" in base else set()
        expected = {"step", "exp_avg", "exp_avg_sq"} if "Adam" in base else expected
        assert all(set(state) == expected for state in optimizer.state_dict()["state"].values())
        if "Adam" in base:
            assert {state["step"].item() for state in optimizer.state.values()} == {5.0}

    @bases
    def test_a_skipped_first_step_leaves_it_as_new(self, make_problem, same_bits, base):
        problem, twin = make_problem(), make_problem()
        optimizer, clean = optimizer_of(problem, base, radius="constant"), optimizer_of(twin, base, radius="constant")
        for take in (optimizer.first_step, optimizer.second_step):
            problem.loss().backward()
            problem.params[0].grad[0, 0] = math.nan
            take()
        for run, own in ((problem, optimizer), (twin, clean)):
            for _ in range(3):
                own.step(run.closure(own))
        assert same_bits(problem.params, twin.params)


class TestNothingMoves:
    @pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
    @pytest.mark.parametrize("base", ["SGD momentum", "AdamW"])
    def test_lr_zero_for_1000_steps_through_missing_nan_and_inf_gradients(self, make_problem, same_bits, fused, base):
        problem, choose = make_problem(), random.Random(0)
        with torch.no_grad():
            problem.params[0][0, :3] = torch.tensor([1e-42, 1e30, 0.0])
            if fused:
                problem.params[0][0, 3] = -0.0  # torch's own update turns it into 0.0
        optimizer = optimizer_of(problem, base, lr=0.0, weight_decay=0.0, fused=fused, rho_max=50.0)
        before = problem.weights()
        kinds = ["none", "none", "missing", math.nan, math.inf, -math.inf]
        for _ in range(1000):
            for take in (optimizer.first_step, optimizer.second_step):
                loss = problem.loss()
                loss.backward()
                fault, p = choose.choice(kinds), choose.choice(problem.params)
                if fault == "missing":
                    p.grad = None
                elif fault != "none":
                    p.grad.view(-1)[0] = fault
                take(loss)
            assert same_bits(problem.params, before)
        report = optimizer.diagnostics()
        assert report["steps"] == 1000
        assert 300 < report["skipped"] < 900

    @bases
    @pytest.mark.parametrize("number", [1, 2], ids=["pass 1", "pass 2"])
    @pytest.mark.parametrize("value", [math.nan, math.inf], ids=["NaN", "Inf"])
    @pytest.mark.parametrize("products", ["all", "guard"])
    def test_bad_gradient(self, problem, same_bits, base, number, value, products):
        optimizer = optimizer_of(problem, base, products=products, fused=True)
        optimizer.step(problem.closure(optimizer))
        before, state = problem.weights(), copy.deepcopy(optimizer.state_dict()["state"])
        closure, calls = problem.closure(optimizer), []

        def bad():
            calls.append(closure())
            if len(calls) == number:
                problem.params[1].grad[2] = value
            return calls[-1]

        optimizer.step(bad)
        assert same_bits(problem.params, before)
        torch.testing.assert_close(optimizer.state_dict()["state"], state, rtol=0, atol=0)
        assert optimizer.diagnostics()["skipped"] == 1


class TestChoice:
    @pytest.mark.parametrize(
        ("base", "options", "reason"),
        [
            (torch.optim.RMSprop, {}, "the base optimizer is RMSprop"),
            (type("Mine", (torch.optim.SGD,), {}), {}, "the base optimizer is Mine"),
            (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.1}, "dampening is not zero"),
            (torch.optim.Adam, {"amsgrad": True}, "amsgrad is True"),
            (torch.optim.Adam, {"differentiable": True}, "differentiable is True"),
        ],
    )
    def test_what_cannot_be_fused_is_not_and_says_why(self, problem, base, options, reason):
        optimizer = ASGA(problem.params, base, lr=0.01, **options)
        assert reason in optimizer.reason_not_fused
        with pytest.raises(ValueError, match=f"fused is True, but {reason}"):
            ASGA(problem.params, base, lr=0.01, fused=True, **options)

    def test_on_request_it_is_not_fused(self, problem):
        assert ASGA(problem.params).reason_not_fused is None
        assert ASGA(problem.params, fused=False).reason_not_fused == "fused is False"

    def test_an_added_group_that_cannot_be_fused_is_refused(self, problem):
        optimizer = ASGA(problem.params[:2], lr=0.1, momentum=0.9, fused=True)
        with pytest.raises(ValueError, match="dampening"):
            optimizer.add_param_group({"params": problem.params[2:], "dampening": 0.5})
        assert len(optimizer.base_optimizer.param_groups) == 1

    def test_what_cannot_be_fused_any_more_is_refused_before_the_step(self, problem, same_bits):
        optimizer, before = ASGA(problem.params, lr=0.1, fused=True), problem.weights()
        handle = optimizer.base_optimizer.register_step_post_hook(lambda *args: None)
        with pytest.raises(ValueError, match="fused is True, but the base optimizer has hooks"):
            optimizer.step(problem.closure(optimizer))
        assert same_bits(problem.params, before)
        handle.remove()
        optimizer.step(problem.closure(optimizer))
        assert not same_bits(problem.params, before)

    def test_hooks_of_the_base_optimizer_are_called(self, problem):
        optimizer, called = ASGA(problem.params, lr=0.1), []
        optimizer.base_optimizer.register_step_post_hook(lambda *args: called.append(args))
        optimizer.step(problem.closure(optimizer))
        assert "hooks" in optimizer.reason_not_fused
        assert len(called) == 1


class TestMemory:
    def test_backups_and_copies_keep_their_places(self, problem):
        optimizer = ASGA(problem.params, lr=0.1, momentum=0.9)

        def places():
            for take in (optimizer.first_step, optimizer.second_step):
                problem.loss().backward()
                take(zero_grad=False)
            optimizer.zero_grad()
            kept = [t for rooms in (optimizer._memory.backups, optimizer._memory.first_grads) for t in rooms.values()]
            return [t.data_ptr() for t in kept] + [s["momentum_buffer"].data_ptr() for s in optimizer.state.values()]

        first = places()
        assert len(first) == 3 * len(problem.params)
        assert places() == first

    def test_a_gradient_of_its_own_is_kept_without_a_copy(self, problem):
        optimizer = ASGA(problem.params, lr=0.1)
        problem.loss().backward()
        grads = [p.grad.data_ptr() for p in problem.params]
        optimizer.first_step()
        assert [kept.data_ptr() for kept in optimizer._pending.first_grads.values()] == grads
        assert not optimizer._memory.first_grads

    def test_a_gradient_that_is_written_again_in_pass_2_is_that_of_pass_1_no_more(self, make_problem, same_bits):
        """Gradients in static memory, as graphs and flat buffers have them."""
        one, two = make_problem(), make_problem()
        optimizer, plain = ASGA(one.params, lr=0.1), ASGA(two.params, lr=0.1)
        static = [torch.zeros_like(p) for p in one.params]
        for _ in range(3):
            for take in (optimizer.first_step, optimizer.second_step):
                loss = one.loss()
                for p, place, grad in zip(one.params, static, torch.autograd.grad(loss, one.params), strict=True):
                    p.grad = place.copy_(grad)
                take(loss)
            plain.step(two.closure(plain))
        assert same_bits(one.params, two.params)
        assert optimizer.diagnostics() == plain.diagnostics()

    def test_what_a_graph_of_torch_compile_may_own_is_copied(self, problem, monkeypatch):
        """Its memory is written again when the graph runs for pass 2, and torch refuses to read it afterwards."""

        class OnGpu:
            is_cuda = True

        monkeypatch.delitem(sys.modules, "torch._inductor.cudagraph_trees", raising=False)
        assert not may_be_of_a_graph(OnGpu())
        monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", None)
        assert may_be_of_a_graph(OnGpu())
        assert not may_be_of_a_graph(problem.params[0])
        monkeypatch.setattr("asga.optim._lists.may_be_of_a_graph", lambda grad: True)
        monkeypatch.setattr("asga.optim.asga.may_be_of_a_graph", lambda loss: True)
        optimizer = ASGA(problem.params, lr=0.1)
        losses, grads = [], []

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = problem.loss()
            loss.backward()
            losses.append(loss)
            grads.append([p.grad.data_ptr() for p in problem.params])
            return loss

        found = optimizer.step(closure)
        assert found.equal(losses[0].detach())
        assert found.data_ptr() != losses[0].data_ptr()
        kept = [t.data_ptr() for t in optimizer._memory.first_grads.values()]
        assert len(kept) == len(problem.params)
        assert not set(kept) & set(grads[0])

    @pytest.mark.parametrize("kind", ["a view of a bucket", "a bucket of one", "kept on request", "held by its owner"])
    def test_a_gradient_that_something_else_can_write_is_copied(self, problem, kind):
        optimizer = ASGA(problem.params, lr=0.1)
        problem.loss().backward()
        sizes = [p.numel() for p in problem.params]
        buckets = [torch.zeros(sum(sizes))] if kind == "a view of a bucket" else [torch.zeros(n) for n in sizes]
        if kind == "held by its owner":
            # The very tensor, that somebody writes the next gradient into.
            buckets = [p.grad for p in problem.params]
        elif kind != "kept on request":
            places = buckets[0].split(sizes) if len(buckets) == 1 else buckets
            for p, place in zip(problem.params, places, strict=True):
                # As DDP does it: without autograd's knowledge of the view.
                alias = torch.empty(0).set_(place.untyped_storage(), place.storage_offset(), p.shape)
                alias.copy_(p.grad)
                p.grad = alias
        expected = [p.grad.clone() for p in problem.params]
        optimizer.first_step(zero_grad=kind != "kept on request")
        for bucket in buckets:
            bucket.fill_(math.nan)
        kept = optimizer._pending.first_grads
        assert all(torch.equal(kept[p], grad) for p, grad in zip(problem.params, expected, strict=True))
        assert len(optimizer._memory.first_grads) == len(problem.params)

    def test_no_gradient_is_kept_where_none_is_needed(self, problem):
        optimizer = ASGA(problem.params, lr=0.1, variant="sam", products="guard")
        loss = problem.loss()
        loss.backward()
        optimizer.first_step(loss)
        assert optimizer._pending.first_grads is None


class TestProducts:
    @pytest.mark.parametrize("products", ["guard", "none"])
    @pytest.mark.parametrize("variant", ["sam", "aligned"])
    def test_fewer_of_them_change_no_step(self, make_problem, same_bits, products, variant):
        one, two = make_problem(), make_problem()
        optimizer, other = ASGA(one.params, variant=variant), ASGA(two.params, variant=variant, products=products)
        for _ in range(5):
            optimizer.step(one.closure(optimizer))
            other.step(two.closure(other))
        assert same_bits(one.params, two.params)
        full, less = optimizer.diagnostics(), other.diagnostics()
        assert math.isnan(less["cosine"])
        known = ["h", "rho", "steps", "sigma"]
        assert {name: less[name] for name in known} == {name: full[name] for name in known}

    def test_they_are_computed_where_the_step_needs_them(self, make_problem, same_bits):
        for options in ({"variant": "gsam"}, {"variant": "conflict"}, {"max_norm": 0.05}):
            one, two = make_problem(), make_problem()
            optimizer, other = ASGA(one.params, **options), ASGA(two.params, products="none", **options)
            for _ in range(3):
                optimizer.step(one.closure(optimizer))
                other.step(two.closure(other))
            assert same_bits(one.params, two.params)
            assert optimizer.diagnostics() == other.diagnostics()

    @pytest.mark.parametrize("radius", ["adaptive", "constant", "proportional"])
    def test_a_step_without_losses_computes_them_for_its_guard(self, problem, same_bits, radius):
        optimizer, before = ASGA(problem.params, lr=0.1, products="none", radius=radius), problem.weights()
        for number, take in enumerate((optimizer.first_step, optimizer.second_step)):
            problem.loss().backward()
            if number == 1:
                problem.params[0].grad[0, 0] = math.nan
            take()
        assert same_bits(problem.params, before)
        assert optimizer.last_skipped

    def test_a_step_without_losses_has_its_gap_from_them(self, make_problem):
        problem = make_problem()
        optimizer = ASGA(problem.params, lr=0.0, variant="sam", products="none")
        for take in (optimizer.first_step, optimizer.second_step):
            problem.loss().backward()
            take()
        assert optimizer.diagnostics()["h"] > 0
        assert optimizer.diagnostics()["share_at_rho_max"] < 1


def test_several_dtypes_groups_and_layouts_at_once(make_problem, same_bits):
    """One step of a mixture equals the steps of its parts, where no scalar couples them."""

    def parameters():
        generator = torch.Generator().manual_seed(0)
        values = [torch.randn(4, 3, 5, 5, generator=generator), torch.randn(7, generator=generator).double()]
        values[0] = values[0].contiguous(memory_format=torch.channels_last)
        values.append(torch.randn(6, 4, generator=generator).to(torch.bfloat16).t())
        return [nn.Parameter(v) for v in values]

    together, apart = parameters(), parameters()
    groups = [{"params": [p], "rho_scale": 0.0, "lr": 0.1 * (i + 1)} for i, p in enumerate(together)]
    whole = ASGA(groups, momentum=0.9, max_norm=None)
    parts = [ASGA([{"params": [p], "rho_scale": 0.0}], lr=0.1 * (i + 1), momentum=0.9) for i, p in enumerate(apart)]
    for optimizers, params in (([whole], together), (parts, apart)):
        for _ in range(3):
            for call in ("first_step", "second_step"):
                for p in params:
                    p.grad = (p.detach() * 0.5).contiguous()
                for optimizer in optimizers:
                    getattr(optimizer, call)()
    assert same_bits(together, apart)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_an_expanded_gradient_has_one_value_in_several_places(fused):
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    optimizer = ASGA([p], lr=1.0, fused=fused)
    for take in (optimizer.first_step, optimizer.second_step):
        p.grad = torch.tensor([0.5]).expand(3)
        take()
    assert p.tolist() == [0.5, 1.5, 2.5]


def test_no_value_is_read_by_the_host(problem, monkeypatch):
    """What a synchronization would need: item, a truth value, tolist, or a number made from a tensor."""
    optimizer = ASGA(problem.params, torch.optim.AdamW, variant="gsam", max_norm=0.1, model=problem.model)
    optimizer.step(problem.closure(optimizer))

    def refuse(*args, **kwargs):
        raise AssertionError("the host reads a tensor")

    closure = problem.closure(optimizer)
    losses = [closure() for _ in range(2)]
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    optimizer.first_step(losses[0], zero_grad=False)
    optimizer.second_step(losses[1])
