"""Quantizers as modules: learned scales on fixed bits, and mixtures over candidate bits.

`_Weight` and `_Act` know where scales come from, `_Fixed` and `_Mixed` which operator uses them; each public
class joins one of the first with one of the second.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from asga.nn.observer import ActStatistics
from asga.nn.scales import FLOOR_RATIO, INITS, effective_scale, lsq_scale, mse_scale, quant_range
from asga.ops import fake_quant, mixed_fake_quant
from asga.policy import check_bits


class Quantizer(nn.Module):
    """What all quantizers share: candidate grids and their scales.

    A scale in use is at least `floor`, 0.02 of its initial value, and its gradient has LSQ's factor
    ``1 / sqrt(n * quant_max)`` with n values per scale (`asga.nn.scales.effective_scale`). Scales are float32
    whatever the input's dtype; the output has the dtype and layout of the input.

    Attributes:
        quant_mins: Smallest integer of each candidate.
        quant_maxs: Largest integer of each candidate.
        floor: Smallest scale in use, like the scales.
    """

    _scale_name: str

    def __init__(
        self, candidates: Sequence[int], channels: tuple[int, ...], init: str, device: torch.device | None
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init is {init!r}; it must be one of {', '.join(map(repr, INITS))}")
        self.init = init
        self._candidates = tuple(candidates)
        self._observe: Callable[[Tensor], None] | None = None
        shape = (*self._candidate_shape(), *channels)
        self.register_parameter(self._scale_name, nn.Parameter(torch.ones(shape, device=device)))
        self.register_buffer("floor", torch.full(shape, FLOOR_RATIO, device=device))
        factor_shape = (*self._candidate_shape(), *(1 for _ in channels))
        self.register_buffer("grad_factor", torch.ones(factor_shape, device=device), persistent=False)

    @property
    def scale_parameter(self) -> nn.Parameter:
        """The learned scales: `scale`, or `scales` of a mixture."""
        return getattr(self, self._scale_name)

    def forward(self, input: Tensor) -> Tensor:
        """Quantize `input` to the grid and back; while the model is being calibrated, return it as it is."""
        if self._observe is not None:
            self._observe(input)
            return input
        return self._quantize(input)

    def _set_signed(self, signed: bool) -> None:
        ranges = [quant_range(bits, signed=signed) for bits in self._candidates]
        self.quant_mins, self.quant_maxs = (list(bounds) for bounds in zip(*ranges, strict=True))
        factors = torch.tensor([high**-0.5 for high in self.quant_maxs])
        self.grad_factor.copy_(factors.reshape(self.grad_factor.shape))

    @torch.no_grad()
    def _set_scales(self, initial: Callable[[int, int], Tensor]) -> None:
        scale = self.scale_parameter
        candidates = [initial(low, high) for low, high in zip(self.quant_mins, self.quant_maxs, strict=True)]
        scale.copy_(torch.stack(candidates).reshape(scale.shape))
        self.floor.copy_(scale * FLOOR_RATIO)

    def _effective_scale(self, elements: int) -> Tensor:
        return effective_scale(self.scale_parameter, self.floor, self.grad_factor, elements)


class _Weight(Quantizer):
    """Symmetric, signed, a scale per output channel (axis 0)."""

    def __init__(self, weight: Tensor, candidates: Sequence[int], init: str) -> None:
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
    """A scale per tensor; unsigned when no negative value was seen during calibration."""

    def __init__(self, candidates: Sequence[int], init: str, device: torch.device | None) -> None:
        super().__init__(candidates, (), init, device)
        self.register_buffer("signed", torch.tensor(False, device=device))
        self.register_buffer("calibrated", torch.tensor(False, device=device))
        self._cache_state(signed=False, calibrated=False)

    def initialize(self, statistics: ActStatistics) -> None:
        """Set sign, scales and floors from what was observed.

        Raises:
            ValueError: Nothing or something that is not finite was observed.
        """
        signed = statistics.signed()
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
        if not self.training:
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
    def bits(self) -> tuple[int, ...]:
        """The candidate bit-widths, in the order of the logits."""
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
        return (len(self._candidates),)

    def _fake_quant(self, input: Tensor, elements: int, axis: int | None) -> Tensor:
        return mixed_fake_quant(
            input,
            self._effective_scale(elements),
            self.probs(),
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
        scale: Parameter ``[]``, float32.
        signed: Buffer ``[]``, bool.
        calibrated: Buffer ``[]``, bool.

    Raises:
        TypeError: `bits` is not an integer.
        ValueError: `bits` or `init` is not supported.
    """

    def __init__(self, bits: int, *, init: str = "mse", device: torch.device | None = None) -> None:
        super().__init__((check_bits("bits", bits),), init, device)


class MixedWeightQuantizer(_Weight, _Mixed):
    """A mixture of K `WeightQuantizer`, computed in one sweep.

    Args:
        weight: The weight that sets the initial scales, ``[C, ...]``, floating point. It is not kept.
        bits: K different bit-widths, each 2 to 8.
        init: Initial scales, "mse" or "lsq".

    Attributes:
        scales: Parameter ``[K, C]``, float32.
        logits: Parameter ``[K]``, float32, zero at first.
        temperature: Buffer ``[]``, one at first; see `set_temperature`.

    Raises:
        TypeError: A bit-width is not an integer.
        ValueError: `bits` or `init` is not supported.

    Source:
        Cai and Vasconcelos, "Rethinking Differentiable Search for Mixed-Precision Neural Networks" (EdMIPS),
        CVPR 2020.
    """

    def __init__(self, weight: Tensor, bits: Sequence[int], *, init: str = "mse") -> None:
        super().__init__(weight, _check_candidates(bits), init)


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
        signed: Buffer ``[]``, bool.
        calibrated: Buffer ``[]``, bool.

    Raises:
        TypeError: A bit-width is not an integer.
        ValueError: `bits` or `init` is not supported.
    """

    def __init__(self, bits: Sequence[int], *, init: str = "mse", device: torch.device | None = None) -> None:
        super().__init__(_check_candidates(bits), init, device)


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


def _check_candidates(bits: Sequence[int]) -> tuple[int, ...]:
    candidates = tuple(check_bits(f"bits[{k}]", b) for k, b in enumerate(bits))
    if not candidates or len(set(candidates)) < len(candidates):
        raise ValueError(f"bits is {candidates}; at least one bit-width is needed, and none twice")
    return candidates
