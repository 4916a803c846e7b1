import copy
import math

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from asga.nn import (
    ActQuantizer,
    FloatWeightQuantizer,
    MixedActQuantizer,
    MixedWeightQuantizer,
    WeightQuantizer,
    set_temperature,
)
from asga.ops import fake_quant

BITS = (2, 3, 4, 6, 8)


@pytest.fixture
def weight():
    return torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def activation():
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))


class TestWeightQuantizer:
    @pytest.mark.parametrize("bits", BITS)
    def test_is_symmetric_per_channel_fake_quant(self, weight, bits):
        quantizer = WeightQuantizer(weight, bits, init="lsq")
        high = 2 ** (bits - 1) - 1
        scale = 2 * weight.abs().mean((1, 2, 3)) / math.sqrt(high)
        assert quantizer.scale.shape == (6,)
        torch.testing.assert_close(quantizer.scale.detach(), scale)
        expected = fake_quant(weight, quantizer.scale, quant_min=-high - 1, quant_max=high, axis=0)
        assert torch.equal(quantizer(weight), expected)

    def test_scale_gradient_is_the_operators_times_the_factor_of_lsq(self, weight):
        quantizer = WeightQuantizer(weight, 4)
        quantizer(weight).square().sum().backward()
        plain = quantizer.scale.detach().requires_grad_()
        fake_quant(weight, plain, quant_min=-8, quant_max=7, axis=0).square().sum().backward()
        torch.testing.assert_close(quantizer.scale.grad, plain.grad / math.sqrt(36 * 7))  # 4 * 3 * 3 values

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan], ids=str)
    def test_collapsed_scale_is_used_at_its_floor(self, weight, value):
        quantizer = WeightQuantizer(weight, 4)
        floor = 0.02 * quantizer.scale.detach()
        with torch.no_grad():
            quantizer.scale.fill_(value)
        expected = fake_quant(weight, floor, quant_min=-8, quant_max=7, axis=0)
        assert torch.equal(quantizer(weight), expected)

    @pytest.mark.parametrize("init", ["lsq", "mse"])
    def test_zero_weight_stays_zero_with_positive_scales(self, init):
        quantizer = WeightQuantizer(torch.zeros(3, 5), 4, init=init)
        assert (quantizer.scale > 0).all()
        assert torch.equal(quantizer(torch.zeros(3, 5)), torch.zeros(3, 5))

    def test_mse_error_is_no_larger_than_that_of_lsq(self, weight):
        errors = {init: (WeightQuantizer(weight, 8, init=init)(weight) - weight).norm() for init in ("lsq", "mse")}
        assert errors["mse"] < errors["lsq"]

    def test_initialize_sets_scales_and_floors_anew(self, weight):
        quantizer = WeightQuantizer(weight, 4, init="lsq")
        before = quantizer.scale.detach().clone()
        quantizer.initialize(3 * weight)
        torch.testing.assert_close(quantizer.scale.detach(), 3 * before)
        torch.testing.assert_close(quantizer.floor, 0.06 * before)

    def test_bfloat16_weight_keeps_its_dtype_and_float32_scales(self, weight):
        quantizer = WeightQuantizer(weight.bfloat16(), 4)
        assert quantizer.scale.dtype == torch.float32
        assert quantizer(weight.bfloat16()).dtype == torch.bfloat16


class TestActQuantizer:
    def test_always_signed(self, activation):
        """For targets without unsigned integers."""
        quantizer = ActQuantizer(4)
        quantizer.always_signed = True
        quantizer(activation.relu())
        assert quantizer.signed
        assert (quantizer.quant_min, quantizer.quant_max) == (-8, 7)

    @pytest.mark.parametrize("init", ["lsq", "mse"])
    def test_first_training_batch_sets_sign_and_scale(self, activation, init):
        quantizer = ActQuantizer(4, init=init)
        quantizer(activation)
        assert quantizer.calibrated
        assert quantizer.signed
        assert (quantizer.quant_min, quantizer.quant_max) == (-8, 7)
        unsigned = ActQuantizer(4, init=init)
        unsigned(activation.relu())
        assert not unsigned.signed
        assert (unsigned.quant_min, unsigned.quant_max) == (0, 15)

    def test_self_initialization_is_that_of_lsq(self, activation):
        quantizer = ActQuantizer(4, init="lsq")
        quantizer(activation)
        torch.testing.assert_close(quantizer.scale.detach(), 2 * activation.abs().mean().reshape(1) / math.sqrt(7))

    def test_later_batches_leave_the_scale_alone(self, activation):
        quantizer = ActQuantizer(4)
        quantizer(activation.relu())
        before = quantizer.scale.detach().clone()
        quantizer(-10 * activation)
        assert quantizer.scale == before
        assert not quantizer.signed

    def test_eval_before_calibration_is_an_error(self, activation):
        with pytest.raises(RuntimeError, match=r"not calibrated.*calibrate\(model, batches\)"):
            ActQuantizer(4).eval()(activation)

    @pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
    def test_first_batch_that_is_not_finite_is_an_error(self, activation, value):
        quantizer = ActQuantizer(4)
        activation[0, 0, 0, 0] = value
        with pytest.raises(ValueError, match="not finite"):
            quantizer(activation)
        assert not quantizer.calibrated

    def test_constant_zero_gives_a_positive_scale(self):
        quantizer = ActQuantizer(4)
        assert torch.equal(quantizer(torch.zeros(2, 3)), torch.zeros(2, 3))
        assert quantizer.scale > 0

    def test_scale_gradient_has_the_factor_of_lsq(self, activation):
        quantizer = ActQuantizer(4)
        quantizer(activation).square().sum().backward()
        plain = quantizer.scale.detach().requires_grad_()
        fake_quant(activation, plain, quant_min=-8, quant_max=7).square().sum().backward()
        torch.testing.assert_close(quantizer.scale.grad, plain.grad / math.sqrt(200 * 7))  # 2 * 4 * 5 * 5 values

    @pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
    @pytest.mark.parametrize("assign", [True, False], ids=["assign", "copy"])
    def test_loaded_state_computes_the_same(self, activation, signed, assign, tmp_path):
        activation = activation if signed else activation.relu()
        quantizer = ActQuantizer(4)
        expected = quantizer(activation)
        torch.save(quantizer.state_dict(), tmp_path / "state.pt")
        other = ActQuantizer(4)
        other(-activation)  # the other sign, to be overwritten
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), assign=assign)
        other.eval()
        assert torch.equal(other(activation), expected)
        grads = []
        for q in (quantizer, other):
            q.zero_grad()
            q(activation).sum().backward()
            grads.append(q.scale.grad)
        assert torch.equal(*grads)

    def test_deepcopy_is_independent(self, activation):
        quantizer = ActQuantizer(4)
        clone = copy.deepcopy(quantizer)
        quantizer(activation)
        assert quantizer.calibrated
        assert not clone.calibrated

    @pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.5)], ids=["mean", "moving average"])
    def test_is_averaged_with_its_buffers(self, activation, multi_avg_fn):
        quantizer = ActQuantizer(4)
        quantizer(activation)
        average = AveragedModel(quantizer, multi_avg_fn=multi_avg_fn, use_buffers=True).eval()
        scales = []
        for factor in (1.0, 1.5):
            with torch.no_grad():
                quantizer.scale *= factor
            scales.append(quantizer.scale.item())
            average.update_parameters(quantizer)
        assert average.module.scale.item() == pytest.approx(sum(scales) / 2)
        assert average.module.signed
        assert average.module.calibrated
        quantizer.scale.data.copy_(average.module.scale)
        assert torch.equal(average(activation), quantizer(activation))


class TestMixture:
    def test_weights_equal_the_sum_of_fixed_quantizers(self, weight):
        mixed = MixedWeightQuantizer(weight, BITS)
        with torch.no_grad():
            mixed.logits.copy_(torch.tensor([0.3, -1.0, 0.8, 0.1, 0.0]))
        fixed = [WeightQuantizer(weight, bits) for bits in BITS]
        for k, quantizer in enumerate(fixed):
            torch.testing.assert_close(mixed.scales[k], quantizer.scale, rtol=0, atol=0)
        expected = sum(p * quantizer(weight) for p, quantizer in zip(mixed.probs(), fixed, strict=True))
        # x * (1/s) in place of x / s may move a value on a tie by a step; with this seed none is that close.
        torch.testing.assert_close(mixed(weight), expected)

    @pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
    def test_activations_equal_the_sum_of_fixed_quantizers(self, activation, signed):
        activation = activation if signed else activation.relu()
        mixed = MixedActQuantizer(BITS)
        fixed = [ActQuantizer(bits) for bits in BITS]
        expected = sum(quantizer(activation) / 5 for quantizer in fixed)
        torch.testing.assert_close(mixed(activation), expected)
        assert bool(mixed.signed) is signed

    def test_scale_gradients_are_those_of_fixed_quantizers_times_their_probability(self, weight):
        mixed = MixedWeightQuantizer(weight, BITS)
        upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        mixed(weight).backward(upstream)
        for k, bits in enumerate(BITS):
            fixed = WeightQuantizer(weight, bits)
            fixed(weight).backward(upstream)
            torch.testing.assert_close(mixed.scales.grad[k], fixed.scale.grad / 5, rtol=1e-4, atol=1e-6)

    def test_logits_get_the_gradient_of_the_softmax(self, activation):
        mixed = MixedActQuantizer((2, 8))
        mixed(activation).sum().backward()
        with torch.no_grad():
            sums = torch.stack([ActQuantizer(bits)(activation).sum() for bits in (2, 8)])
            expected = 0.25 * torch.stack([sums[0] - sums[1], sums[1] - sums[0]])
        torch.testing.assert_close(mixed.logits.grad, expected, rtol=1e-4, atol=1e-5)

    def test_given_probabilities_take_the_place_of_the_softmax(self, weight, activation):
        for quantizer, tensor in (
            (MixedWeightQuantizer(weight, BITS), weight),
            (MixedActQuantizer(BITS), activation),
        ):
            even = quantizer(tensor)
            given = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], requires_grad=True)
            quantizer.use_probs(given)
            assert quantizer.probs() is given
            quantizer(tensor).sum().backward()
            assert given.grad is not None
            assert quantizer.logits.grad is None
            quantizer.use_probs(None)
            assert torch.equal(quantizer(tensor), even)

    def test_a_candidate_alone_is_the_fixed_quantizer(self, weight, activation):
        quantizer = MixedWeightQuantizer(weight, BITS, init="lsq")
        for index, bits in enumerate(BITS):
            fixed = WeightQuantizer(weight, bits, init="lsq")(weight)
            torch.testing.assert_close(quantizer.candidate(weight, index), fixed, rtol=1e-6, atol=1e-6)
        quantizer = MixedActQuantizer(BITS)
        quantizer(activation)
        assert [len(quantizer.candidate(activation, index).unique()) for index in range(2)] == [4, 8]
        assert quantizer.probs().tolist() == pytest.approx([0.2] * 5)

    def test_one_candidate_has_probability_one(self, weight):
        assert MixedWeightQuantizer(weight, [4]).probs().tolist() == [1.0]

    @pytest.mark.parametrize("bits", [[], [4, 4]], ids=["none", "twice"])
    def test_candidates_are_checked(self, weight, bits):
        with pytest.raises(ValueError, match="at least one bit-width is needed, and none twice"):
            MixedWeightQuantizer(weight, bits)
        with pytest.raises(ValueError, match="at least one bit-width is needed, and none twice"):
            MixedActQuantizer(bits)


class TestMixtureWithSmallFloats:
    CANDIDATES = (2, "fp4", 4, "fp8", 8)

    def mixed(self, weight, candidates=CANDIDATES):
        quantizer = MixedWeightQuantizer(weight, candidates)
        with torch.no_grad():
            quantizer.logits.copy_(torch.linspace(-1, 1, len(candidates)))
        return quantizer

    @pytest.mark.parametrize("candidates", [CANDIDATES, ("fp8", "fp4"), ("fp4",), ("int3", "fp8")], ids=str)
    def test_is_the_sum_of_fixed_quantizers_with_its_gradients(self, weight, candidates):
        mixed = self.mixed(weight, candidates)
        parts = [
            FloatWeightQuantizer(weight, b) if isinstance(b, str) else WeightQuantizer(weight, b) for b in mixed.bits
        ]
        upstream = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
        given, other = weight.clone().requires_grad_(), weight.clone().requires_grad_()
        mixed(given).backward(upstream)
        logits = mixed.logits.detach().clone().requires_grad_()
        expected = sum(p * part(other) for p, part in zip(logits.softmax(0), parts, strict=True))
        expected.backward(upstream)
        torch.testing.assert_close(mixed(weight), expected)
        torch.testing.assert_close(given.grad, other.grad)
        torch.testing.assert_close(mixed.logits.grad, logits.grad, rtol=1e-4, atol=1e-5)
        integers = [part.scale.grad for part in parts if isinstance(part, WeightQuantizer)]
        for actual, reference in zip(mixed.scales.grad if integers else [], integers, strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-5)
        for part in parts:
            if isinstance(part, FloatWeightQuantizer):
                torch.testing.assert_close(mixed.floats[part.bits].scale.grad, part.scale.grad, rtol=1e-4, atol=1e-5)

    def test_one_candidate_alone(self, weight):
        mixed = self.mixed(weight)
        for index, bits in enumerate(self.CANDIDATES):
            alone = MixedWeightQuantizer(weight, [bits])
            assert torch.equal(mixed.candidate(weight, index), alone(weight))

    def test_half_precision_is_rounded_once(self, weight):
        weight = weight.bfloat16()
        mixed = self.mixed(weight)
        assert torch.equal(mixed(weight), mixed(weight.float()).bfloat16())

    def test_initialize_reaches_every_candidate(self, weight):
        mixed, twice = self.mixed(weight), self.mixed(2 * weight)
        mixed.initialize(2 * weight)
        assert torch.equal(mixed(weight), twice(weight))

    def test_state_of_integers_alone_is_what_it_was(self, weight):
        names = {"scales", "logits", "floor", "temperature"}
        assert MixedWeightQuantizer(weight, BITS).state_dict().keys() == names
        floats = {f"{name}.{part}" for name in ("fp4", "fp8") for part in ("scale", "floor")}
        mixed, other = self.mixed(weight), self.mixed(3 * weight)
        assert mixed.state_dict().keys() == names | floats
        other.load_state_dict(mixed.state_dict())
        assert torch.equal(other(weight), mixed(weight))

    def test_compiles_to_one_graph(self, weight):
        mixed = self.mixed(weight)
        torch._dynamo.reset()
        compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(weight), mixed(weight))

    def test_inputs_have_none(self):
        with pytest.raises(TypeError, match=r"bits\[1\] is 'fp8'; an integer"):
            MixedActQuantizer([4, "fp8"])


class TestTemperature:
    def test_set_for_a_whole_model_and_kept_in_the_state(self, weight):
        model = torch.nn.ModuleList([MixedWeightQuantizer(weight, BITS), MixedActQuantizer((2, 4))])
        with torch.no_grad():
            model[1].logits.copy_(torch.tensor([0.0, 1.0]))
        set_temperature(model, 0.25)
        torch.testing.assert_close(model[1].probs(), torch.softmax(torch.tensor([0.0, 4.0]), 0))
        assert {k: v.item() for k, v in model.state_dict().items() if "temperature" in k} == {
            "0.temperature": 0.25,
            "1.temperature": 0.25,
        }

    @pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf], ids=str)
    def test_must_be_positive_and_finite(self, weight, value):
        mixed = MixedWeightQuantizer(weight, BITS)
        with pytest.raises(ValueError, match="a positive finite number is needed"):
            set_temperature(mixed, value)
        assert mixed.temperature == 1

    def test_a_model_without_mixtures_is_an_error(self):
        with pytest.raises(ValueError, match="no mixed quantizer"):
            set_temperature(torch.nn.Linear(2, 2), 1.0)


@pytest.mark.parametrize(("bits", "error"), [(1, ValueError), (9, ValueError), (4.0, TypeError), (True, TypeError)])
def test_bits_are_checked(weight, bits, error):
    for make in (
        lambda: WeightQuantizer(weight, bits),
        lambda: ActQuantizer(bits),
        lambda: MixedWeightQuantizer(weight, [8, bits]),
        lambda: MixedActQuantizer([8, bits]),
    ):
        with pytest.raises(error, match="bits"):
            make()


def test_unknown_init_is_an_error(weight):
    with pytest.raises(ValueError, match="init is 'minmax'; it must be one of 'lsq', 'mse'"):
        WeightQuantizer(weight, 4, init="minmax")
