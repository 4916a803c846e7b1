"""What docs/optimizer.md says of Lightning and Accelerate beside the loops themselves."""

import pytest
import torch
from torch import nn

from asga.optim import ASGA


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


@pytest.fixture
def accelerate():
    module = pytest.importorskip("accelerate")
    # What it knows of the process is global, precision included.
    module.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield module
    module.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def fit(lightning, labeled_batches, tiny_net):
    """A function that trains on a few batches; returns module and optimizer."""

    class Classifier(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = tiny_net()
            self.model.dropout.p = 0.0
            self.norms, self.passes = [], 0

        def training_step(self, batch, batch_idx):
            self.passes += 1
            loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def on_before_optimizer_step(self, optimizer):
            self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()]).item())

        def configure_optimizers(self):
            return ASGA(self.parameters(), lr=0.1, momentum=0.9, model=self)

    def run(tmp_path, resume=None, **trainer):
        module = Classifier()
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet, **trainer)
        trainer.fit(module, torch.utils.data.DataLoader(labeled_batches(), batch_size=None), ckpt_path=resume)
        return module, trainer.optimizers[0], trainer

    return run


class TestLightning:
    def test_bfloat16_autocast(self, fit, tmp_path):
        _, optimizer, trainer = fit(tmp_path, max_epochs=1, precision="bf16-mixed", enable_checkpointing=False)
        assert trainer.global_step == optimizer.diagnostics()["steps"] == 6
        assert optimizer.diagnostics()["skipped"] == 0

    def test_float16_with_its_own_scaler_is_an_error(self, fit, tmp_path, lightning):
        plugin = lightning.pytorch.plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
        with pytest.raises(TypeError, match=r"step\(\) needs a closure"):
            fit(tmp_path, max_epochs=1, plugins=[plugin], enable_checkpointing=False)

    def test_gradient_clip_val_clips_each_pass(self, fit, tmp_path):
        module, optimizer, _ = fit(tmp_path, max_epochs=1, gradient_clip_val=0.01, enable_checkpointing=False)
        assert len(module.norms) == 12
        assert min(module.norms) > 0.01, "or nothing was clipped"
        report = optimizer.diagnostics()
        assert [report["norm_g0"], report["norm_g1"]] == pytest.approx([0.01, 0.01], rel=1e-3)

    def test_accumulated_batches_are_not_replayed(self, fit, tmp_path):
        """Why the page says to leave accumulate_grad_batches alone: of three batches, pass 2 sees the last one."""
        module, optimizer, _ = fit(tmp_path, max_epochs=1, accumulate_grad_batches=3, enable_checkpointing=False)
        assert optimizer.diagnostics()["steps"] == 2
        assert module.passes == 6 + 2

    def test_a_checkpoint_resumes_bit_for_bit(self, fit, tmp_path, bits_of):
        whole, optimizer, _ = fit(tmp_path, max_epochs=2, enable_checkpointing=False)
        _, _, trainer = fit(tmp_path, max_epochs=1)
        file = tmp_path / "half.ckpt"
        trainer.save_checkpoint(file)
        resumed, continued, _ = fit(tmp_path, max_epochs=2, resume=file, enable_checkpointing=False)
        assert bits_of(resumed.state_dict()) == bits_of(whole.state_dict())
        assert continued.diagnostics() == optimizer.diagnostics()


class TestAccelerate:
    def train(self, accelerator, optimizer, model, batches):
        for x, y in batches:

            def closure(x=x, y=y):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                return loss

            optimizer.step(closure)

    def test_bfloat16_autocast(self, accelerate, tiny_net, labeled_batches):
        accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
        model = tiny_net()
        model, optimizer = accelerator.prepare(model, ASGA(model.parameters(), lr=0.1, model=model))
        self.train(accelerator, optimizer, model, labeled_batches())
        report = optimizer.optimizer.diagnostics()
        assert (report["steps"], report["skipped"]) == (6, 0)

    def test_saved_state_resumes_bit_for_bit(self, accelerate, tiny_net, labeled_batches, bits_of, tmp_path):
        accelerator = accelerate.Accelerator(cpu=True)
        model = tiny_net().eval()
        model, optimizer = accelerator.prepare(model, ASGA(model.parameters(), lr=0.1, momentum=0.9))
        self.train(accelerator, optimizer, model, labeled_batches())
        accelerator.save_state(tmp_path)
        self.train(accelerator, optimizer, model, labeled_batches())
        after = bits_of(model.state_dict()), bits_of(optimizer.state_dict())
        accelerator.load_state(tmp_path)
        self.train(accelerator, optimizer, model, labeled_batches())
        assert (bits_of(model.state_dict()), bits_of(optimizer.state_dict())) == after

    def test_float16_with_its_own_scaler_is_an_error_before_anything_moves(self, accelerate, tiny_net, labeled_batches):
        accelerator = accelerate.Accelerator(cpu=True)
        model = tiny_net().eval()
        before = [p.detach().clone() for p in model.parameters()]
        scaler = torch.amp.GradScaler("cpu")
        optimizer = accelerate.optimizer.AcceleratedOptimizer(ASGA(model.parameters(), lr=0.1), scaler=scaler)
        with pytest.raises(AssertionError, match="Attempted step"):
            self.train(accelerator, optimizer, model, labeled_batches())
        assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
