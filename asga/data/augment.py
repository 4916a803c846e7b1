"""Augmentation of a whole batch at once, on its device."""

import torch
from torch import Tensor


def shift_and_flip(images: Tensor, *, mirror: bool, generator: torch.Generator) -> Tensor:
    """Shift every image by up to an eighth of its size, filling with zeros, and mirror half of them.

    Args:
        images: ``[B, C, H, W]``, any dtype and device.
        mirror: Whether to mirror, left to right.
        generator: On the CPU, so that every device gets the same images.

    Returns:
        A new tensor of the same shape, dtype and device.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2: CIFAR's 32x32
        images padded by 4 pixels, cropped at random and flipped.
    """
    batch, _, height, width = images.shape
    pad_y, pad_x = max(1, height // 8), max(1, width // 8)
    top = torch.randint(2 * pad_y + 1, (batch,), generator=generator)
    left = torch.randint(2 * pad_x + 1, (batch,), generator=generator)
    padded = torch.nn.functional.pad(images, (pad_x, pad_x, pad_y, pad_y))
    # Every window as a view [B, C, 2 pad_y + 1, 2 pad_x + 1, H, W]: indexing copies whole rows, several times
    # faster than gathering single pixels.
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    device = images.device
    shifted = windows[torch.arange(batch, device=device), :, top.to(device), left.to(device)]
    if not mirror:
        return shifted
    flipped = torch.rand(batch, 1, 1, 1, generator=generator) < 0.5
    return torch.where(flipped.to(device), shifted.flip(3), shifted)
