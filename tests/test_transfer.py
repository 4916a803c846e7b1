import copy
import json
import math
import signal
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import asga
from asga.convert import find_quantizable
from asga.policy import LayerPolicy, Policy
from asga.runs import RunExistsError, RunFolder
from asga.search.costs import policy_costs
from asga.search.profiles import profile_layers
from asga.steps import TrainingError, evaluate
from asga.transfer import TransferTrainer

METHODS = pytest.mark.parametrize("method", ["asga", "sgd"])


def uniform(model: nn.Module, bits: int = 4) -> Policy:
    return Policy(dict.fromkeys(find_quantizable(model)[0], LayerPolicy(bits, bits)))


def quantized(model: nn.Module) -> nn.Module:
    return asga.quantize(model, uniform(model))


def is_finite(model: nn.Module) -> bool:
    return all(torch.isfinite(value).all() for value in model.state_dict().values() if value.is_floating_point())


def metrics_of(folder: RunFolder) -> list[dict]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


class TestFit:
    @METHODS
    def test_learns(self, tiny_net, labeled_batches, method):
        model, batches = quantized(tiny_net()), labeled_batches(12)
        result = TransferTrainer(model, epochs=8, lr=0.1, method=method).fit(batches, labeled_batches(4))
        losses = [record["loss"] for record in result.history]
        assert [record["epoch"] for record in result.history] == list(range(1, 9))
        assert losses[-1] < 0.7 * losses[0]
        assert result.evaluation.top1 > 0.7  # chance: 1/3
        assert result.evaluation == evaluate(model, labeled_batches(4))
        assert result.history[-1]["val_top1"] == result.evaluation.top1
        assert ("rho" in result.history[-1]) is (method == "asga")

    def test_trains_scales_and_keeps_the_bits(self, tiny_net, labeled_batches):
        model = quantized(tiny_net())
        before = {name: p.detach().clone() for name, p in model.named_parameters() if "scale" in name}
        TransferTrainer(model, epochs=1).fit(labeled_batches())
        after = dict(model.named_parameters())
        assert len(before) == 8
        weights = [name for name in before if "weight_quantizer" in name]
        assert all(not torch.equal(before[name], after[name]) for name in weights)
        assert {(row.weight_bits, row.act_bits) for row in asga.quantization_summary(model)} == {(4, 4)}

    @METHODS
    def test_a_float_model(self, tiny_net, labeled_batches, method):
        result = TransferTrainer(tiny_net(), epochs=4, lr=0.1, method=method).fit(labeled_batches(12))
        assert result.evaluation is None
        assert result.history[-1]["loss"] < result.history[0]["loss"]

    def test_the_mode_of_training_is_left(self, tiny_net, labeled_batches):
        model = quantized(tiny_net()).eval()
        TransferTrainer(model, epochs=1).fit(labeled_batches(2), labeled_batches(1))
        assert model.training

    def test_validates_every_so_many_epochs_and_at_the_end(self, tiny_net, labeled_batches):
        trainer = TransferTrainer(quantized(tiny_net()), epochs=5, validate_every=2)
        history = trainer.fit(labeled_batches(1), labeled_batches(1)).history
        assert [record["epoch"] for record in history if "val_top1" in record] == [2, 4, 5]

    def test_bfloat16(self, tiny_net, labeled_batches):
        model = quantized(tiny_net())
        result = TransferTrainer(model, epochs=2, autocast=torch.bfloat16).fit(labeled_batches(), labeled_batches(1))
        assert math.isfinite(result.evaluation.loss)
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs is 0; it must be at least 1"),
            ({"epochs": 1, "method": "adam"}, "method is 'adam'; it must be 'asga' or 'sgd'"),
            ({"epochs": 1, "calibration_batches": 0}, "calibration_batches is 0"),
            ({"epochs": 1, "validate_every": 0}, "validate_every is 0"),
        ],
    )
    def test_options_out_of_range(self, tiny_net, options, message):
        with pytest.raises(ValueError, match=message):
            TransferTrainer(tiny_net(), **options)


class TestFormats:
    @METHODS
    def test_a_policy_with_small_floats_from_the_proxy_to_the_target(self, tiny_net, labeled_batches, tmp_path, method):
        space = asga.SearchSpace(formats=("fp4", "int8", "fp8"), first_last=("fp8", 8))
        budget = asga.Budget(size="1.0*w8")
        searched = asga.PolicySearcher(tiny_net(), space, budget=budget, epochs=1, method=method).fit(labeled_batches())
        searched.policy.save(tmp_path / "policy.json")
        policy = Policy.load(tmp_path / "policy.json")
        assert policy == searched.policy
        assert policy["fc"] == policy["conv1"] == LayerPolicy("fp8", 8)

        model = asga.quantize(tiny_net(num_classes=5), policy)
        batches = labeled_batches(12, classes=5)
        before = model.fc.weight_quantizer.scale.detach().clone()
        result = TransferTrainer(model, epochs=6, lr=0.1, method=method).fit(batches, batches)
        assert result.history[-1]["loss"] < 0.8 * result.history[0]["loss"]
        assert not torch.equal(model.fc.weight_quantizer.scale, before)
        assert is_finite(model)
        again = asga.quantize(tiny_net(num_classes=5), policy)
        again.load_state_dict(model.state_dict())
        assert evaluate(again, batches) == result.evaluation


class TestBatchNorm:
    def test_is_measured_anew_with_the_final_weights(self, tiny_net, labeled_batches):
        model, batches = quantized(tiny_net()), labeled_batches()
        TransferTrainer(model, epochs=2).fit(batches)
        with torch.no_grad():
            outputs = [model.conv1(x) for x, _ in batches]
        means = torch.stack([y.mean((0, 2, 3)) for y in outputs]).mean(0)
        variances = torch.stack([y.var((0, 2, 3)) for y in outputs]).mean(0)
        # The same float32 sums in another order.
        torch.testing.assert_close(model.bn1.running_mean, means, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.bn1.running_var, variances, rtol=1e-5, atol=1e-6)
        assert model.bn1.momentum == 0.1

    def test_zero_batches_leave_what_training_gave(self, tiny_net, labeled_batches):
        model = quantized(tiny_net())
        TransferTrainer(model, epochs=2, batchnorm_batches=0).fit(labeled_batches(6))
        # Once per step, not once per pass.
        assert model.bn1.num_batches_tracked == 12

    def test_measuring_leaves_out_nan(self, tiny_net, labeled_batches):
        """The second epoch order is that of a list: the batch with NaN is among those measured."""
        batches = labeled_batches()
        batches[5][0][:] = math.nan
        model = quantized(tiny_net())
        result = TransferTrainer(model, epochs=1).fit(batches, labeled_batches(1))
        assert is_finite(model)
        assert math.isfinite(result.evaluation.loss)


class TestNotFinite:
    @METHODS
    @pytest.mark.parametrize(("kind", "poison"), [("float", math.nan), ("float", math.inf), ("quantized", math.nan)])
    @pytest.mark.parametrize("bad", [0, 3], ids=["first batch", "a later batch"])
    def test_one_batch_is_skipped(self, tiny_net, labeled_batches, tmp_path, method, kind, poison, bad):
        batches = labeled_batches()
        batches[bad][0][0, 0, 0, 0] = poison
        model, states = tiny_net() if kind == "float" else quantized(tiny_net()), []

        def keep(progress) -> None:
            states.append(copy.deepcopy(model.state_dict()))

        folder = RunFolder(tmp_path, "test", {})
        trainer = TransferTrainer(model, epochs=2, method=method, folder=folder, progress=keep, batchnorm_batches=0)
        result = trainer.fit(batches, labeled_batches(1))
        assert is_finite(model)
        for step in (bad, 6 + bad):
            if step > 0:
                changed = [k for k, v in states[step].items() if not torch.equal(v, states[step - 1][k])]
                assert changed == []
        weights = [state["conv2.weight"] for state in states]
        assert not torch.equal(weights[bad], weights[bad + 1])
        assert all(math.isfinite(record["loss"]) for record in result.history)
        assert [record["skipped_steps"] for record in result.history] == [1, 1]
        lines = [(record["event"], record["epoch"], record.get("step")) for record in metrics_of(folder)]
        assert lines == [("skipped", 1, bad + 1), ("epoch", 1, None), ("skipped", 2, bad + 1), ("epoch", 2, None)]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs is 0; it must be at least 1"),
            ({"method": "hawq"}, "method is 'hawq'; it must be 'asga' or 'sgd'"),
            ({"lr": -1}, "lr is -1; it must be finite and not negative"),
            ({"weight_decay": math.nan}, "weight_decay is nan"),
            ({"momentum": 1.0}, "momentum is 1.0; it must be below 1"),
            ({"warmup": -1}, "warmup is -1; it must be at least 0"),
            ({"batchnorm_batches": -1}, "batchnorm_batches is -1; it must be at least 0"),
            ({"autocast": torch.int8}, r"autocast is torch.int8"),
            ({"optimizer_options": {"rho_mx": 0.2}}, "'rho_mx', which is no option of method 'asga'; did you mean "),
            ({"optimizer_options": {"rho_max": 0.2}, "method": "sgd"}, "which is no option of method 'sgd'"),
            ({"optimizer_options": {"lr": 0.2}}, "optimizer_options has 'lr', an argument of its own: lr=0.2"),
            ({"optimizer_options": {"rho_max": -0.2}}, "rho_max is -0.2; it must be finite and not negative"),
            ({"optimizer_options": {"variant": "gsan"}}, "variant is 'gsan'; it must be one of"),
            ({"optimizer_options": {"dampening": 0.1}, "method": "sgd"}, "Nesterov"),
        ],
        ids=str,
    )
    def test_options_out_of_range(self, tiny_net, options, message):
        with pytest.raises(ValueError, match=message):
            TransferTrainer(tiny_net(), **{"epochs": 1, **options})

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 1.5}, "epochs is 1.5; an integer is needed"),
            ({"batchnorm_batches": None}, "batchnorm_batches is None; an integer is needed"),
            ({"lr": "0.1"}, "lr is '0.1'; a number is needed"),
            ({"optimizer_options": [0.2]}, r"optimizer_options is \[0.2\]; a mapping such as"),
            ({"optimizer_options": []}, r"optimizer_options is \[\]; a mapping"),
            ({"autocast": "bfloat16"}, "autocast is 'bfloat16'; a dtype"),
            ({"loss_fn": None}, "loss_fn is None; a function is needed"),
            ({"progress": "bar"}, "progress is 'bar'; a function, or None, is needed"),
            ({"folder": 3}, "folder is 3; a path or a RunFolder"),
            ({"stage": None}, "stage is None; a name is needed"),
            ({"model": "resnet20"}, "model is 'resnet20'; a torch.nn.Module is needed"),
        ],
        ids=str,
    )
    def test_options_of_another_type(self, tiny_net, options, message):
        with pytest.raises(TypeError, match=message):
            TransferTrainer(**{"model": tiny_net(), "epochs": 1, **options})

    def test_quantized_weights_can_be_perturbed(self, tiny_net, labeled_batches):
        model = quantized(tiny_net())
        trainer = TransferTrainer(model, epochs=1, optimizer_options={"perturb": "quantized"})
        trainer.fit(labeled_batches())
        assert is_finite(model)

    @pytest.mark.parametrize(
        "changed",
        [
            {"lr": 0.05},
            {"optimizer_options": {"rho_max": 0.1}},
            {"method": "sgd"},
            {"loss_fn": nn.CrossEntropyLoss()},
            {"loss_fn": partial(functional.nll_loss, reduction="sum")},
        ],
        ids=["lr", "rho_max", "method", "module as loss", "partial as loss"],
    )
    def test_goes_on_with_the_same_options_only(self, tiny_net, labeled_batches, tmp_path, changed):
        options = {"epochs": 2, "folder": tmp_path / "run", "checkpoint_every": 2}

        def stop(state) -> None:
            if state.step == 4:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            TransferTrainer(tiny_net(), **options, progress=stop).fit(labeled_batches())
        with pytest.raises(
            ValueError, match=rf"was made with {next(iter(changed.get('optimizer_options', changed)))} "
        ):
            TransferTrainer(tiny_net(), **{**options, **changed}).fit(labeled_batches())
        TransferTrainer(tiny_net(), **options).fit(labeled_batches())

    @pytest.mark.parametrize("changed", [{"lr": 0.05}, {"epochs": 3}], ids=str)
    def test_a_refused_resume_changes_nothing(self, tiny_net, labeled_batches, tmp_path, bits_of, changed):
        options = {"epochs": 2, "folder": tmp_path / "run"}

        def stop(state) -> None:
            if state.epoch == 2 and state.step == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            TransferTrainer(quantized(tiny_net()), **options, progress=stop).fit(labeled_batches())
        RunFolder(tmp_path / "run", "transfer", {}, resume=True).log(event="later", stage="transfer")
        model = quantized(tiny_net()).eval()
        before = bits_of(model.state_dict())
        files = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        with pytest.raises(ValueError, match="the checkpoint of stage 'transfer' was made with"):
            TransferTrainer(model, **{**options, **changed}).fit(labeled_batches())
        assert bits_of(model.state_dict()) == before
        assert not model.training
        assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files

    @pytest.mark.parametrize(
        ("val", "error", "message"),
        [
            ([], ValueError, "val is empty: there is nothing to evaluate"),
            (iter(()), ValueError, "val is a tuple_iterator, which can be run through only once"),
            (5, TypeError, "val is 5; a loader of batches, or None, is needed"),
        ],
        ids=["empty", "iterator", "no loader"],
    )
    def test_what_cannot_be_evaluated_on_changes_nothing(
        self, tiny_net, labeled_batches, tmp_path, bits_of, val, error, message
    ):
        model = quantized(tiny_net()).eval()
        before = bits_of(model.state_dict())
        with pytest.raises(error, match=message):
            TransferTrainer(model, epochs=1, folder=tmp_path / "run").fit(labeled_batches(), val)
        assert bits_of(model.state_dict()) == before
        assert not model.training
        assert not (tmp_path / "run").exists()

    def test_what_is_left_of_a_run_changes_nothing(self, tiny_net, labeled_batches, tmp_path, bits_of):
        (tmp_path / "checkpoint.pt").write_bytes(b"")
        model = quantized(tiny_net())
        before = bits_of(model.state_dict())
        with pytest.raises(RunExistsError, match=r"a run whose config\.json is missing"):
            TransferTrainer(model, epochs=1, folder=tmp_path).fit(labeled_batches())
        assert bits_of(model.state_dict()) == before

    def test_a_float_model_has_no_quantized_weights_to_perturb(self, tiny_net, labeled_batches):
        model = tiny_net().eval()
        with pytest.raises(ValueError, match="perturb 'quantized', but the model has no quantized weight"):
            TransferTrainer(model, epochs=1, optimizer_options={"perturb": "quantized"}).fit(labeled_batches())
        assert not model.training

    def test_scales_that_are_set_are_kept(self, tiny_net, labeled_batches):
        """What was trained is trained on."""
        model = quantized(tiny_net())
        asga.calibrate(model, labeled_batches(1))
        with torch.no_grad():
            model.conv2.act_quantizer.scale.mul_(1.5)
        before = model.conv2.act_quantizer.scale.item()
        TransferTrainer(model, epochs=1, lr=0.0).fit(labeled_batches())
        assert model.conv2.act_quantizer.scale.item() == before

    def test_data_that_do_not_fit_leave_no_folder(self, tiny_net, labeled_batches, tmp_path):
        trainer = TransferTrainer(quantized(tiny_net()), epochs=1, folder=tmp_path / "run")
        with pytest.raises(RuntimeError, match="channels"):
            trainer.fit(labeled_batches(channels=2))
        assert not (tmp_path / "run").exists()

    def test_folder_by_its_path(self, tiny_net, labeled_batches, tmp_path):
        TransferTrainer(tiny_net(), epochs=1, folder=tmp_path / "run").fit(labeled_batches())
        trainer = TransferTrainer(tiny_net(), epochs=1, folder=tmp_path / "run", progress=pytest.fail)
        trainer.fit(labeled_batches())

    @METHODS
    def test_infinity_is_clamped_by_the_quantizer(self, tiny_net, labeled_batches, method):
        batches = labeled_batches()
        batches[0][0][0, 0, 0, 0] = math.inf
        model = quantized(tiny_net())
        result = TransferTrainer(model, epochs=2, method=method).fit(batches, labeled_batches(1))
        assert is_finite(model)
        assert math.isfinite(result.evaluation.loss)

    @METHODS
    def test_every_batch(self, tiny_net, labeled_batches, bits_of, method):
        model = tiny_net()
        batches = [(x * math.nan, y) for x, y in labeled_batches()]
        before = bits_of(model.state_dict())
        with pytest.raises(TrainingError, match="every batch of the loader holds NaN"):
            TransferTrainer(model, epochs=1, method=method).fit(batches)
        assert bits_of(model.state_dict()) == before

    @METHODS
    @pytest.mark.parametrize(("epochs", "steps"), [(1, 6), (4, 10)], ids=["fewer than ten steps", "more"])
    def test_loss(self, tiny_net, labeled_batches, bits_of, method, epochs, steps):
        model, seen = tiny_net(), []
        before = bits_of(model.state_dict())
        trainer = TransferTrainer(
            model,
            epochs=epochs,
            method=method,
            loss_fn=lambda logits, labels: logits.sum() * math.nan,
            progress=seen.append,
        )
        with pytest.raises(TrainingError, match=f"the loss is nan for {steps} steps in a row"):
            trainer.fit(labeled_batches())
        assert len(seen) == steps - 1
        assert bits_of(model.state_dict()) == before

    @METHODS
    def test_gradient(self, tiny_net, labeled_batches, bits_of, method):
        """A finite loss whose gradient is not: the square root at zero."""
        model = quantized(tiny_net())
        trainer = TransferTrainer(
            model,
            epochs=1,
            method=method,
            batchnorm_batches=0,
            loss_fn=lambda logits, labels: (logits - logits.detach()).abs().sum().sqrt() + 1,
        )
        asga.calibrate(model, labeled_batches(4))
        before = bits_of(model.state_dict())
        with pytest.raises(TrainingError, match="the gradients are not finite for 6 steps in a row"):
            trainer.fit(labeled_batches())
        assert bits_of(model.state_dict()) == before


@METHODS
class TestRecovery:
    """The weights blow up in step 16, as in one far too long: from then on every loss is NaN."""

    @pytest.fixture(autouse=True, params=[50, 3], ids=["checkpoints", "memory"])
    def keep_every(self, request, monkeypatch):
        """Steps between states in memory: too many for an epoch of six, or between two checkpoints."""
        monkeypatch.setattr("asga.training.KEEP_EVERY", request.param)
        return request.param

    def _fit(self, path, model, batches, method, *, epochs, stop_at=None, resume=False):
        told = []

        def progress(state) -> None:
            done = 6 * (state.epoch - 1) + state.step
            if done == 16:
                with torch.no_grad():
                    model.fc.bias.fill_(math.inf)
            if state.note is not None:
                told.append((state.epoch, state.step, state.note))
            if done == stop_at:
                _interrupt()

        torch.manual_seed(1)
        folder = RunFolder(path, "test", {}, resume=resume)
        options = {"method": method, "lr": 0.1, "checkpoint_every": 4, "folder": folder, "progress": progress}
        return TransferTrainer(model, epochs=epochs, **options).fit(batches, batches), told

    def test_goes_back_and_learns_on(self, tiny_net, labeled_batches, tmp_path, method, keep_every):
        model = quantized(tiny_net())
        result, told = self._fit(tmp_path, model, labeled_batches(), method, epochs=12)
        # A checkpoint is made after step 16, too, that is step 4 of epoch 3; the next step shows that it is not good.
        said = {"asga": "half the radius (rho_max is now 0.25)", "sgd": "half the learning rate"}[method]
        good = {50: 0, 3: 3}[keep_every]
        returned = f"the loss is nan for 10 steps in a row: back to epoch 3, step {good}, {said}"
        assert told[-1] == (5, 2, returned)
        events = metrics_of(RunFolder(tmp_path, "test", {}, resume=True))
        assert [record["what"] for record in events if record["event"] == "recovery"] == [returned]
        assert is_finite(model)
        assert [record["skipped_steps"] for record in result.history] == [0, 0, 2, 6, 2, *[0] * 7]
        assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]

    def test_resumes_exactly(self, tiny_net, labeled_batches, tmp_path, run_contents, bits_of, method):
        """Stopped before, at and after the blow, among the steps left out, and at and after going back."""
        whole = quantized(tiny_net())
        self._fit(tmp_path / "whole", whole, labeled_batches(), method, epochs=6)
        for at in (15, 16, 17, 20, 25, 26, 27, 30):
            options = {"stop_at": at, "resume": at > 15, "epochs": 6}
            with pytest.raises(KeyboardInterrupt):
                self._fit(tmp_path / "parts", quantized(tiny_net()), labeled_batches(), method, **options)
        model = quantized(tiny_net())
        self._fit(tmp_path / "parts", model, labeled_batches(), method, resume=True, epochs=6)
        assert bits_of(model.state_dict()) == bits_of(whole.state_dict())
        assert run_contents(tmp_path / "parts") == run_contents(tmp_path / "whole")

    def test_gives_up(self, tiny_net, labeled_batches, bits_of, method):
        """After three returns; the model is left as it was last well: at the end of an epoch."""
        model, steps, good = quantized(tiny_net()), [], []

        def progress(state) -> None:
            steps.append(state)
            if len(steps) == 6:
                good.append(copy.deepcopy(model.state_dict()))

        def loss_fn(logits, labels):
            return nn.functional.cross_entropy(logits, labels) * (math.nan if len(steps) >= 7 else 1.0)

        with pytest.raises(TrainingError, match="and again after each of 3 returns to epoch 2, step 0"):
            TransferTrainer(model, epochs=20, method=method, loss_fn=loss_fn, progress=progress).fit(labeled_batches())
        assert len(steps) == 7 + 39
        assert bits_of(model.state_dict()) == bits_of(good[0])


class TestBadData:
    @METHODS
    @pytest.mark.parametrize("model", ["float", "quantized"])
    def test_labels_exceed_the_classes(self, tiny_net, labeled_batches, method, model):
        net = tiny_net(num_classes=2) if model == "float" else quantized(tiny_net(num_classes=2))
        before = copy.deepcopy(dict(net.named_parameters()))
        with pytest.raises(TrainingError, match="the label 2, but the model has 2 classes"):
            TransferTrainer(net, epochs=1, method=method).fit(labeled_batches())
        assert all(torch.equal(p, before[n]) for n, p in net.named_parameters() if "scale" not in n)

    @pytest.mark.parametrize(("loader", "message"), [([], "loader is empty"), (iter([]), "without a length")])
    def test_loader(self, tiny_net, loader, message):
        with pytest.raises(ValueError, match=message):
            TransferTrainer(tiny_net(), epochs=1).fit(loader)

    def test_odd_batches(self, tiny_net):
        with pytest.raises(TypeError, match="a batch is a dict of 'x': Tensor, 'y': Tensor"):
            TransferTrainer(tiny_net(), epochs=1).fit([{"x": torch.zeros(2, 1, 8, 8), "y": torch.zeros(2)}])


@METHODS
def test_batches_of_any_form(tiny_net, labeled_batches, bits_of, batch_form, method):
    """Calibration, training, running statistics and evaluation do the same as with pairs of tensors."""
    wrapper, form = batch_form
    batches = labeled_batches()
    batches[2][0][0] = math.nan
    plain, wrapped = quantized(tiny_net()), wrapper(quantized(tiny_net()))
    torch.manual_seed(0)
    expected = TransferTrainer(plain, epochs=2, method=method).fit(batches, batches[:2])
    torch.manual_seed(0)
    batches = [form(*batch) for batch in batches]
    found = TransferTrainer(wrapped, epochs=2, method=method).fit(batches, batches[:2])
    assert found.evaluation == expected.evaluation
    assert bits_of(found.history) == bits_of(expected.history)
    assert bits_of(wrapped.net.state_dict()) == bits_of(plain.state_dict())


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def _kill() -> None:
    raise Killed


def _interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("method", ["asga", "sgd"])
@pytest.mark.parametrize("kind", ["float", "quantized"])
class TestResume:
    """Bit for bit on a CPU: weights, scales, statistics, momenta, radius, schedule and metrics."""

    def _fit(self, model, batches, path, method, *, at=None, end=None, resume=False):
        steps = []

        def progress(state) -> None:
            steps.append(state)
            if end is not None and 6 * (state.epoch - 1) + state.step == at:
                end()

        torch.manual_seed(1)
        inputs, labels = (torch.cat(parts) for parts in zip(*batches(6), strict=True))
        # Draws its order from torch's random numbers, like dropout.
        train = DataLoader(TensorDataset(inputs, labels), batch_size=8, shuffle=True)
        folder = RunFolder(path, "test", {"method": method}, resume=resume)
        trainer = TransferTrainer(model, epochs=3, lr=0.1, method=method, folder=folder, progress=progress)
        return trainer.fit(train, batches(1)), len(steps)

    def _model(self, tiny_net, kind):
        return tiny_net() if kind == "float" else quantized(tiny_net())

    @pytest.mark.parametrize(
        ("at", "end", "left"),
        [(2, _interrupt, 16), (9, _interrupt, 9), (18, _interrupt, 0), (5, _kill, 18), (14, _kill, 6)],
        ids=["stopped early", "stopped", "stopped at the last step", "killed early", "killed"],
    )
    def test_same_as_never_interrupted(
        self, tiny_net, labeled_batches, tmp_path, run_contents, bits_of, kind, method, at, end, left
    ):
        whole = self._model(tiny_net, kind)
        expected, _ = self._fit(whole, labeled_batches, tmp_path / "whole", method)
        with pytest.raises((KeyboardInterrupt, Killed)):
            self._fit(self._model(tiny_net, kind), labeled_batches, tmp_path / "parts", method, at=at, end=end)
        model = self._model(tiny_net, kind)
        result, steps = self._fit(model, labeled_batches, tmp_path / "parts", method, resume=True)
        assert steps == left
        assert bits_of(model.state_dict()) == bits_of(whole.state_dict())
        assert result.evaluation == expected.evaluation
        assert bits_of(result.history) == bits_of(expected.history)
        assert run_contents(tmp_path / "parts") == run_contents(tmp_path / "whole")


class TestPolicyOfAnotherModel:
    """A policy belongs to an architecture, not to its head, input channels, classes or resolution."""

    @pytest.fixture
    def policy(self, tiny_net, labeled_batches, tmp_path):
        searcher = asga.PolicySearcher(tiny_net(num_classes=3), budget=asga.Budget(bitops="w4a4"), epochs=1)
        searcher.fit(labeled_batches(side=8)).policy.save(tmp_path / "policy.json")
        return Policy.load(tmp_path / "policy.json")

    def test_other_classes_channels_and_resolution(self, policy, tiny_net, labeled_batches):
        target = tiny_net(num_classes=5, in_channels=3)
        model = asga.quantize(target, policy)
        batches = labeled_batches(side=16, channels=3, classes=5)
        result = TransferTrainer(model, epochs=1).fit(batches, batches)
        assert result.evaluation.images == 48
        rows = {row.name: (row.weight_bits, row.act_bits) for row in asga.quantization_summary(model)}
        assert rows == {name: (layer.weight_bits, layer.act_bits) for name, layer in policy.items()}

    def test_bitops_are_those_of_the_target(self, policy, tiny_net):
        target = tiny_net(num_classes=5, in_channels=3)
        profiles = profile_layers(target, torch.zeros(1, 3, 16, 16), list(policy))
        macs = {
            "conv1": 16 * 16 * 4 * 3 * 9,
            "conv2": 8 * 8 * 8 * 4 * 9,
            "conv3": 8 * 8 * 8 * 8 * 9,
            "fc": 8 * 5,
        }
        expected = sum(macs[name] * layer.weight_bits * layer.act_bits for name, layer in policy.items())
        assert policy_costs(profiles, policy).bitops == expected
        assert expected > policy.meta["costs"]["bitops"]

    def test_another_head(self, policy, tiny_net, labeled_batches):
        """The head of the proxy is a layer of the policy: one with more layers needs bits for them."""
        target = tiny_net()
        target.fc = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        with pytest.raises(ValueError, match="'fc'; did you mean"):
            asga.quantize(target, policy)
        layers = {name: layer for name, layer in policy.items() if name != "fc"}
        head = dict.fromkeys(("fc.0", "fc.2"), LayerPolicy(8, 8))
        model = asga.quantize(target, Policy({**layers, **head}))
        assert TransferTrainer(model, epochs=1).fit(labeled_batches(2)).history
