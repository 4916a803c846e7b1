"""Quantizers as modules: learned scales on fixed bits, and mixtures over candidate bits.

`_Weight` and `_Act` know where scales come from, `_Fixed` and `_Mixed` which operator uses them; each public
class joins one of the first with one of the second.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from asga.nn.float_quantizer import FloatWeightQuantizer
from asga.nn.observer import ActStatistics
from asga.nn.quantizer import Quantizer
from asga.nn.scales import lsq_scale, mse_scale
from asga.ops import fake_quant, mixed_fake_quant
from asga.policy import WeightBits, check_bits, check_weight_bits


class _Weight(Quantizer):
    """Symmetric, signed, a scale per output channel (axis 0)."""

    def __init__(self, weight: Tensor, candidates: Sequence[WeightBits], init: str) -> None:
        super().__init__(candidates, (weight.shape[0],), init, weight.device)
        self._set_signed(True)
        self.initialize(weight)

    def initialize(self, weight: Tensor) -> None:
        """Set scales and floors anew from a weight, for example after a float checkpoint was loaded."""
        if self.init == "lsq":
            mean_abs = weight.detach().to(torch.float32).abs().flatten(1).mean(1)
            self._set_scales(lambda low, high: lsq_scale(mean_abs, high))
        else:
            self._set_scales(lambda low, high: mse_scale(weight, low, high, axis=0))

    def _quantize(self, weight: Tensor) -> Tensor:
        return self._fake_quant(weight, elements=weight.numel() // weight.shape[0], axis=0)


class _Act(Quantizer):
    """A scale per tensor; unsigned when no negative value was seen during calibration.

    With `always_signed` it is signed whatever was seen: for targets that have no unsigned integers.
    """

    def __init__(self, candidates: Sequence[int], init: str, device: torch.device | None) -> None:
        super().__init__(candidates, (), init, device)
        self.always_signed = False
        # Flags as integers: averages of models (torch.optim.swa_utils) subtract buffers, and bools have no difference.
        self.register_buffer("signed", torch.zeros((), dtype=torch.uint8, device=device))
        self.register_buffer("calibrated", torch.zeros((), dtype=torch.uint8, device=device))
        self._cache_state(signed=False, calibrated=False)

    def initialize(self, statistics: ActStatistics) -> None:
        """Set sign, scales and floors from what was observed.

        Raises:
            ValueError: Nothing or something that is not finite was observed.
        """
        signed = statistics.signed() or self.always_signed
        self.signed.fill_(signed)
        self.calibrated.fill_(True)
        self._cache_state(signed=signed, calibrated=True)
        self._set_scales(lambda low, high: statistics.initial_scale(low, high, self.init))

    def extra_repr(self) -> str:
        if not self._calibrated:
            return f"{super().extra_repr()}, not calibrated"
        return f"{super().extra_repr()}, {'signed' if self._signed else 'unsigned'}"

    def _quantize(self, input: Tensor) -> Tensor:
        if not self._calibrated:
            self._initialize_from(input)
        return self._fake_quant(input, elements=input.numel(), axis=None)

    def _initialize_from(self, input: Tensor) -> None:
        """LSQ's practice: the first training batch sets the scale."""
        if not self.training or torch.compiler.is_exporting():  # an exported graph could not keep the scale
            raise RuntimeError(
                "the model has an activation quantizer that is not calibrated: run "
                "asga.nn.calibrate(model, batches), load a state dict, or train a first batch"
            )
        statistics = ActStatistics(keep_sample=self.init == "mse")
        statistics.update(input)
        self.initialize(statistics)

    def _cache_state(self, *, signed: bool, calibrated: bool) -> None:
        """Keep the two flags as Python values beside the buffers: reading a buffer would stall a GPU."""
        self._signed, self._calibrated = signed, calibrated
        self._set_signed(signed)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._cache_state(signed=bool(self.signed), calibrated=bool(self.calibrated))


class _Fixed(Quantizer):
    """One grid."""

    _scale_name = "scale"

    @property
    def bits(self) -> int:
        """The bit-width."""
        return self._candidates[0]

    @property
    def quant_min(self) -> int:
        """Smallest integer of the grid."""
        return self.quant_mins[0]

    @property
    def quant_max(self) -> int:
        """Largest integer of the grid."""
        return self.quant_maxs[0]

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    def _candidate_shape(self) -> tuple[int, ...]:
        return ()

    def _fake_quant(self, input: Tensor, elements: int, axis: int | None) -> Tensor:
        scale = self._effective_scale(elements)
        return fake_quant(input, scale, quant_min=self.quant_min, quant_max=self.quant_max, axis=axis)


class _Mixed(Quantizer):
    """Several grids, weighted by ``softmax(logits / temperature)``."""

    _scale_name = "scales"

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._given_probs: Tensor | None = None
        self.logits = nn.Parameter(torch.zeros(len(self._candidates), device=self.floor.device))
        self.register_buffer("temperature", torch.ones((), device=self.floor.device))

    @property
    def bits(self) -> tuple[WeightBits, ...]:
        """The candidates, in the order of the logits."""
        return self._candidates

    def probs(self) -> Tensor:
        """Probabilities of the candidates, ``[K]`` float32, differentiable in the logits unless others are given."""
        if self._given_probs is not None:
            return self._given_probs
        return torch.softmax(self.logits.to(torch.float32) / self.temperature, dim=0)

    def use_probs(self, probs: Tensor | None) -> None:
        """Weigh the candidates by `probs`, ``[K]`` float32, instead of the softmax; None: by the softmax again.

        For probabilities that are computed elsewhere: of many mixtures at once, or with noise. They are no part of
        the state.
        """
        self._given_probs = probs

    def candidate(self, input: Tensor, index: int) -> Tensor:
        """`input` quantized by one candidate alone, as `forward` does it when that has probability one."""
        given = self._given_probs
        self._given_probs = torch.zeros_like(self.logits, requires_grad=False)
        self._given_probs[index] = 1
        try:
            return self._quantize(input)
        finally:
            self._given_probs = given

    def extra_repr(self) -> str:
        return f"bits={self.bits}"

    def _candidate_shape(self) -> tuple[int, ...]:
        return (len(self._integers),)

    def _fake_quant(self, input: Tensor, elements: int, axis: int | None) -> Tensor:
        return self._mix(input, self.probs(), elements, axis)

    def _mix(self, input: Tensor, probs: Tensor, elements: int, axis: int | None) -> Tensor:
        """The sum over the integer grids, in one sweep."""
        return mixed_fake_quant(
            input,
            self._effective_scale(elements),
            probs,
            quant_mins=self.quant_mins,
            quant_maxs=self.quant_maxs,
            axis=axis,
        )


class WeightQuantizer(_Weight, _Fixed):
    """Quantizes a weight symmetrically with a learned scale per output channel.

    Args:
        weight: The weight that sets the initial scales, ``[C, ...]``, floating point. It is not kept.
        bits: 2 to 8; the range is ``-2**(bits-1) .. 2**(bits-1) - 1``.
        init: Initial scales: "mse" (least squared error) or "lsq" (``2 * mean|w| / sqrt(quant_max)``).

    Attributes:
        scale: Parameter ``[C]``, float32.

    Raises:
        TypeError: `bits` is not an integer.
        ValueError: `bits` or `init` is not supported.
    """

    def __init__(self, weight: Tensor, bits: int, *, init: str = "mse") -> None:
        super().__init__(weight, (check_bits("bits", bits),), init)


class ActQuantizer(_Act, _Fixed):
    """Quantizes an activation with one learned scale.

    The range is ``0 .. 2**bits - 1`` if calibration saw no negative value, else that of signed integers.
    Without calibration, the first batch in training mode sets sign and scale, in each process for itself; in
    eval mode that is an error.

    Args:
        bits: 2 to 8.
        init: Initial scale: "mse" (least squared error) or "lsq" (``2 * mean|x| / sqrt(quant_max)``).
        device: Where the scale lives.

    Attributes:
        scale: Parameter ``[1]``, float32.
        always_signed: Set it before calibration where the target has no unsigned integers.
        signed: Buffer ``[]``, uint8: 0 or 1.
        calibrated: Buffer ``[]``, uint8: 0 or 1.

    Raises:
        TypeError: `bits` is not an integer.
        ValueError: `bits` or `init` is not supported.
    """

    def __init__(self, bits: int, *, init: str = "mse", device: torch.device | None = None) -> None:
        super().__init__((check_bits("bits", bits),), init, device)

    def _candidate_shape(self) -> tuple[int, ...]:
        return (1,)  # FSDP2 takes no parameters without a dimension


class MixedWeightQuantizer(_Weight, _Mixed):
    """A mixture of K weight quantizers.

    All integer grids are computed in one sweep, whatever their number; small floats are added to it one by one.

    Args:
        weight: The weight that sets the initial scales, ``[C, ...]``, floating point. It is not kept.
        bits: K different formats: integers of 2 to 8 bits, ``"fp4"``, ``"fp8"``.
        init: Initial scales, "mse" or "lsq".

    Attributes:
        scales: Parameter ``[integers among the K, C]``, float32.
        fp4, fp8: A `FloatWeightQuantizer`, with its own scales, for each of these among the K.
        logits: Parameter ``[K]``, float32, zero at first.
        temperature: Buffer ``[]``, one at first; see `set_temperature`.

    Raises:
        TypeError: A format is neither an integer nor a string.
        ValueError: `bits` or `init` is not supported.

    Source:
        Cai and Vasconcelos, "Rethinking Differentiable Search for Mixed-Precision Neural Networks" (EdMIPS),
        CVPR 2020.
    """

    def __init__(self, weight: Tensor, bits: Sequence[WeightBits], *, init: str = "mse") -> None:
        candidates = _distinct(check_weight_bits(f"bits[{k}]", b) for k, b in enumerate(bits))
        super().__init__(weight, candidates, init)
        self.scales.requires_grad_(bool(self._integers))  # without integers it is empty, and nothing for an optimizer
        for name in candidates:
            if isinstance(name, str):
                self.add_module(name, FloatWeightQuantizer(weight, name, init=init))
        self.register_buffer("_integers_first", self._order().to(weight.device), persistent=False)

    @property
    def floats(self) -> dict[str, FloatWeightQuantizer]:
        """The quantizer of each small float among the candidates, by its name."""
        return dict(self.named_children())

    def initialize(self, weight: Tensor) -> None:
        """Set scales and floors anew from a weight, for example after a float checkpoint was loaded."""
        super().initialize(weight)
        for quantizer in self.floats.values():
            quantizer.initialize(weight)

    def _fake_quant(self, weight: Tensor, elements: int, axis: int | None) -> Tensor:
        floats = self.floats
        if not floats:
            return super()._fake_quant(weight, elements, axis)
        # A copy: torch.compile (2.13) keeps views of the softmax for backward beside the softmax itself, and writes the
        # gradient of the logits into its memory before the views are read. What it knows to be the whole softmax again,
        # as a stack of all its values, it takes for that.
        probs = self.probs().index_select(0, self._integers_first)
        of_integers, of_floats = probs[: -len(floats)], probs[-len(floats) :]
        # Wide, so that a weight in half precision is rounded once, at the end.
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        mixture = sum(prob * quantizer(wide) for prob, quantizer in zip(of_floats, floats.values(), strict=True))
        if self._integers:
            mixture = mixture + self._mix(wide, of_integers, elements, axis)
        return mixture.to(weight.dtype)

    def _order(self) -> Tensor:
        return torch.tensor([self._candidates.index(name) for name in (*self._integers, *self.floats)], device="cpu")

    def _apply(self, *args, **kwargs) -> "MixedWeightQuantizer":
        super()._apply(*args, **kwargs)
        self._integers_first.copy_(self._order())  # as the factor of gradients
        return self


class MixedActQuantizer(_Act, _Mixed):
    """A mixture of K `ActQuantizer`, computed in one sweep. All candidates share the sign.

    Args:
        bits: K different bit-widths, each 2 to 8.
        init: Initial scales, "mse" or "lsq".
        device: Where scales and logits live.

    Attributes:
        scales: Parameter ``[K]``, float32.
        logits: Parameter ``[K]``, float32, zero at first.
        temperature: Buffer ``[]``, one at first; see `set_temperature`.
        always_signed: Set it before calibration where the target has no unsigned integers.
        signed: Buffer ``[]``, uint8: 0 or 1.
        calibrated: Buffer ``[]``, uint8: 0 or 1.

    Raises:
        TypeError: A bit-width is not an integer.
        ValueError: `bits` or `init` is not supported.
    """

    def __init__(self, bits: Sequence[int], *, init: str = "mse", device: torch.device | None = None) -> None:
        super().__init__(_distinct(check_bits(f"bits[{k}]", b) for k, b in enumerate(bits)), init, device)


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Set the temperature of every mixture in `model`, in place: ``p = softmax(logits / temperature)``.

    Raises:
        ValueError: `temperature` is not positive and finite, or the model has no mixture.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; a positive finite number is needed")
    mixtures = [m for m in model.modules() if isinstance(m, MixedWeightQuantizer | MixedActQuantizer)]
    if not mixtures:
        raise ValueError("the model has no mixed quantizer: convert it with asga.prepare first")
    for mixture in mixtures:
        mixture.temperature.fill_(temperature)


def _distinct(bits: Iterable[WeightBits]) -> tuple[WeightBits, ...]:
    candidates = tuple(bits)
    if not candidates or len(set(candidates)) < len(candidates):
        raise ValueError(f"bits is {candidates}; at least one bit-width is needed, and none twice")
    return candidates
