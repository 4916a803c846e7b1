"""What all quantizers have in common."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from asga.nn.scales import FLOOR_RATIO, INITS, effective_scale, quant_range
from asga.policy import WeightBits


class Quantizer(nn.Module):
    """What all quantizers share: candidate grids and their scales.

    A scale in use is at least `floor`, 0.02 of its initial value, and its gradient has LSQ's factor
    ``1 / sqrt(n * quant_max)`` with n values per scale (`asga.nn.scales.effective_scale`). Scales are float32
    whatever the input's dtype; the output has the dtype and layout of the input.

    Attributes:
        quant_mins: Smallest value of each grid.
        quant_maxs: Largest value of each grid.
        floor: Smallest scale in use, like the scales.
    """

    _scale_name: str

    def __init__(
        self, candidates: Sequence[WeightBits], channels: tuple[int, ...], init: str, device: torch.device | None
    ) -> None:
        super().__init__()
        if init not in INITS:
            raise ValueError(f"init is {init!r}; it must be one of {', '.join(map(repr, INITS))}")
        self.init = init
        self._candidates = tuple(candidates)
        self._integers = tuple(bits for bits in candidates if isinstance(bits, int))
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
        ranges = [quant_range(bits, signed=signed) for bits in self._integers]
        self.quant_mins, self.quant_maxs = [low for low, _ in ranges], [high for _, high in ranges]
        self._fill_grad_factor()

    def _fill_grad_factor(self) -> None:
        factors = torch.tensor([high**-0.5 for high in self.quant_maxs], device="cpu")
        self.grad_factor.copy_(factors.reshape(self.grad_factor.shape))

    def _apply(self, *args, **kwargs) -> "Quantizer":
        super()._apply(*args, **kwargs)
        self._fill_grad_factor()  # `to_empty` leaves memory as it finds it, and no state dict has this
        return self

    @torch.no_grad()
    def _set_scales(self, initial: Callable[[float, float], Tensor]) -> None:
        scale = self.scale_parameter
        candidates = [initial(low, high) for low, high in zip(self.quant_mins, self.quant_maxs, strict=True)]
        if candidates:
            scale.copy_(torch.stack(candidates).reshape(scale.shape))
            self.floor.copy_(scale * FLOOR_RATIO)

    def _effective_scale(self, elements: int) -> Tensor:
        return effective_scale(self.scale_parameter, self.floor, self.grad_factor, elements)
