"""What calibration needs to know about an activation."""

import torch
from torch import Tensor

from asga.nn.scales import lsq_scale, mse_scale

# Values kept per batch for the least-squares scale. Its grid search resolves 2 %; ten batches of this size
# estimate a mean square to about 1 %.
_SAMPLES_PER_BATCH = 2**14


class ActStatistics:
    """Mean absolute value, smallest value and, on request, a random sample of the tensors seen.

    Nothing is read back from the device before `signed` or `initial_scale` is called.

    Args:
        keep_sample: Keep up to 16384 values of each tensor, which the "mse" scale needs.
    """

    def __init__(self, *, keep_sample: bool) -> None:
        self._keep_sample = keep_sample
        self._elements = 0
        self._sum_abs: Tensor | None = None
        self._smallest: Tensor | None = None
        self._samples: list[Tensor] = []

    @property
    def empty(self) -> bool:
        """Whether no value has been seen."""
        return self._elements == 0

    @torch.no_grad()
    def update(self, input: Tensor) -> None:
        """Take in one tensor; any floating dtype, read as float32."""
        if input.numel() == 0:
            return
        smallest = input.amin().to(torch.float32)
        sum_abs = input.abs().sum(dtype=torch.float32)
        self._sum_abs = sum_abs if self.empty else self._sum_abs + sum_abs
        self._smallest = smallest if self.empty else torch.minimum(self._smallest, smallest)
        self._elements += input.numel()
        if self._keep_sample:
            self._samples.append(_sample(input))

    def signed(self) -> bool:
        """Whether a negative value was seen.

        Raises:
            ValueError: No value was seen, or one that is not finite.
        """
        if self.empty:
            raise ValueError("no value has been observed: nothing to calibrate from")
        if not torch.isfinite(self._sum_abs + self._smallest):
            raise ValueError("the activations observed are not finite: the model or its input has NaN or Inf")
        return bool(self._smallest < 0)

    def initial_scale(self, quant_min: int, quant_max: int, init: str) -> Tensor:
        """The scale for one grid, ``[]`` float32; `init` is "lsq" or "mse" (with `keep_sample` only)."""
        if init == "lsq":
            return lsq_scale(self._sum_abs / self._elements, quant_max)
        return mse_scale(torch.cat(self._samples), quant_min, quant_max)


def _sample(input: Tensor) -> Tensor:
    """Random values (evenly spaced ones could all fall on one channel), without touching the global seed."""
    flat = input.detach().flatten()
    if flat.numel() > _SAMPLES_PER_BATCH:
        generator = torch.Generator(device=input.device).manual_seed(0)
        index = torch.randint(flat.numel(), (_SAMPLES_PER_BATCH,), generator=generator, device=input.device)
        flat = flat[index]
    return flat.to(torch.float32, copy=True)
