"""ASGA with what training loops use: autocast, compiled models, accumulation, learning-rate schedulers."""

import pytest
import torch

from asga.optim import ASGA


def two_calls(optimizer, loss_of, steps=1):
    for _ in range(steps):
        for take in (optimizer.first_step, optimizer.second_step):
            loss = loss_of()
            loss.backward()
            take(loss)


class TestAutocast:
    def test_bfloat16_trains_float32_weights(self, make_problem):
        low, full = make_problem(), make_problem()
        optimizers = [ASGA(p.params, lr=0.05, momentum=0.9) for p in (low, full)]
        start = low.loss().item()

        def loss():
            with torch.autocast("cpu", torch.bfloat16):
                output = low.model(low.x)
            assert output.dtype == torch.bfloat16
            return (output.float() - low.y).square().mean()

        two_calls(optimizers[0], loss, 30)
        two_calls(optimizers[1], full.loss, 30)
        assert all(p.dtype == torch.float32 for p in low.params)
        assert optimizers[0].diagnostics()["skipped"] == 0
        gain = start - full.loss().item()
        assert gain > 0.1
        assert start - low.loss().item() == pytest.approx(gain, rel=0.05)

    @pytest.mark.parametrize("protocol", ["closure", "two calls"])
    def test_float16_overflow_lowers_the_scale_until_steps_are_made(self, problem, same_bits, protocol):
        """The largest factor: gradients of float16 activations overflow at first, as in every real run."""
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=1000)
        optimizer = ASGA(problem.params, lr=0.05, scaler=scaler)
        before = problem.weights()

        def closure():
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                output = problem.model(problem.x)
            assert output.dtype == torch.float16
            loss = (output.float() - problem.y).square().mean()
            scaler.scale(loss).backward()
            return loss

        scales = []
        for _ in range(20):
            if protocol == "closure":
                optimizer.step(closure)
            else:
                optimizer.first_step(closure())
                optimizer.second_step(closure())
            scaler.update()
            scales.append(scaler.get_scale())
            skipped = optimizer.diagnostics()["skipped"]
            assert scales[-1] == 2.0 ** (24 - skipped)
            assert same_bits(problem.params, before) == (skipped == len(scales))
        assert 0 < skipped < 20


class TestAccumulation:
    def test_micro_batches_in_each_pass_are_the_step_of_the_whole_batch(self, make_problem):
        """BatchNorm left out: its statistics are those of a micro-batch, with any optimizer."""
        whole, parts = make_problem(torch.float64), make_problem(torch.float64)
        options = {"lr": 0.1, "momentum": 0.9, "variant": "conflict", "max_norm": 0.5}
        one, two = ASGA(whole.params, **options), ASGA(parts.params, **options)
        at = []

        for _ in range(5):
            two_calls(one, whole.loss)
            for take in (two.first_step, two.second_step):
                total = 0.0
                for x, y in zip(parts.x.chunk(4), parts.y.chunk(4), strict=True):
                    at.append(parts.params[0].detach().clone())
                    loss = (parts.model(x) - y).square().mean() / 4
                    loss.backward()
                    total += loss.detach()
                take(total)
        torch.testing.assert_close(whole.weights(), parts.weights(), rtol=1e-10, atol=1e-12)
        assert one.diagnostics() == pytest.approx(two.diagnostics(), rel=1e-8)
        assert all(torch.equal(at[4], later) for later in at[5:8]), "all of pass 2 at the same perturbed weights"
        assert not torch.equal(at[0], at[4])

    def test_batchnorm_statistics_move_once_for_every_micro_batch(self, make_problem):
        problem, single = make_problem(batchnorm=True), make_problem(batchnorm=True)
        optimizer = ASGA(problem.params, lr=0.1, model=problem.model)

        def closure():
            optimizer.zero_grad()
            halves = zip(problem.x.chunk(2), problem.y.chunk(2), strict=True)
            losses = [(problem.model(x) - y).square().mean() / 2 for x, y in halves]
            sum(losses).backward()
            return sum(losses)

        optimizer.step(closure)
        for x in single.x.chunk(2):
            single.model(x)
        for ours, theirs in zip(problem.model.buffers(), single.model.buffers(), strict=True):
            assert torch.equal(ours, theirs)


class TestCompiled:
    @pytest.mark.parametrize("batchnorm", [False, True])
    def test_a_compiled_model_is_compiled_once_and_sees_the_perturbation(self, make_problem, same_bits, batchnorm):
        """The graph is run by eager kernels here, so that bits can be compared."""
        compiled, eager = make_problem(batchnorm=batchnorm), make_problem(batchnorm=batchnorm)
        torch._dynamo.reset()
        graphs = []

        def backend(graph, inputs):
            graphs.append(graph)
            return graph.forward

        fast = torch.compile(compiled.model, backend=backend)
        one = ASGA(fast.parameters(), lr=0.1, momentum=0.9, model=fast)
        two = ASGA(eager.params, lr=0.1, momentum=0.9, model=eager.model)
        two_calls(one, lambda: (fast(compiled.x) - compiled.y).square().mean(), 5)
        two_calls(two, eager.loss, 5)
        assert same_bits(compiled.params, eager.params)
        assert all(torch.equal(a, b) for a, b in zip(compiled.model.buffers(), eager.model.buffers(), strict=True))
        assert len(graphs) == 1
        assert one.diagnostics()["h"] == two.diagnostics()["h"] != 0


class TestSchedulers:
    @pytest.mark.parametrize(
        "make",
        [
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=6),
            lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.2, total_steps=6),
            lambda o: torch.optim.lr_scheduler.SequentialLR(
                o,
                [
                    torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=3),
                    torch.optim.lr_scheduler.ExponentialLR(o, 0.5),
                ],
                [3],
            ),
        ],
        ids=["cosine", "one cycle", "warm-up, then decay"],
    )
    def test_a_schedule_is_the_learning_rates_set_by_hand(self, make_problem, same_bits, make):
        one, two = make_problem(), make_problem()
        scheduled, by_hand = (ASGA(p.params, lr=0.1, momentum=0.9) for p in (one, two))
        scheduler = make(scheduled)
        rates = set()
        for _ in range(5):
            for name in ("lr", "momentum"):
                by_hand.param_groups[0][name] = scheduled.param_groups[0][name]
            rates.add(scheduled.param_groups[0]["lr"])
            two_calls(scheduled, one.loss)
            two_calls(by_hand, two.loss)
            scheduler.step()
        assert len(rates) >= 4
        assert same_bits(one.params, two.params)

    def test_reduce_on_plateau(self, problem):
        optimizer = ASGA(problem.params, lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        for value in (1.0, 2.0):
            loss = optimizer.step(problem.closure(optimizer))
            scheduler.step(value)
        assert torch.isfinite(loss)
        assert optimizer.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"] == 0.05
