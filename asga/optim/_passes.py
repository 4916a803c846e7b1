"""The sweeps of one ASGA step over lists of tensors, and the scalars between them.

One function for each sweep over the parameters (A1, A3, B1, B3) and each block of scalars (A2, B2; B4 is
`Radius.update`), so that a fused kernel can take the place of any of them. Sweeps get one list per device,
dtype and `rho_scale`; scalars are 0-dim float64 tensors on one device and are never read by the host.

The sweeps use `torch._foreach_*`, which torch.optim itself is built on: on CUDA a list of hundreds of tensors
becomes a few launches, on other devices a loop. torch offers nothing public for this.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Bucket(NamedTuple):
    """Tensors of one device, dtype and `rho_scale`; the lists are parallel."""

    params: list[Tensor]
    grads: list[Tensor]
    rho_scale: float


class GradientDots(NamedTuple):
    """Dot products of the gradients at theta (g0) and at theta' (g1).

    `ascent` is the one in the metric of the perturbation, ``<T g0, T g1>``; it equals `g0_g1` when T = 1.
    """

    g0_g0: Tensor
    g0_g1: Tensor
    g1_g1: Tensor
    ascent: Tensor


def ascent_norm(buckets: list[Bucket], adaptive: bool, device: torch.device) -> Tensor:
    """A1: ``q0 = ||T g0||^2`` over all perturbed tensors; T is `rho_scale`, times ``|theta|`` if adaptive."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for params, grads, rho_scale in buckets:
        if rho_scale > 0:
            scaled = _in_metric(params, grads, adaptive)
            total = total + rho_scale**2 * _dot(scaled, scaled, device)
    return total


def ascent_step(q0: Tensor, rho: Tensor, shift: float, relative: bool) -> Tensor:
    """A2: ``s = (1 - shift) rho / ||g0||`` or ``s = rho / ||g0|| - shift``; 0 if q0 is 0 or not finite."""
    step = rho / torch.sqrt(q0)
    step = step * (1.0 - shift) if relative else step - shift
    return torch.where(torch.isfinite(q0) & (q0 > 0), step, 0.0)


def perturb(bucket: Bucket, step: Tensor, adaptive: bool) -> None:
    """A3: ``theta <- theta + s * T^2 * g0`` in place; nothing moves where s is 0, whatever g0 holds."""
    params, grads, rho_scale = bucket
    step = step.to(params[0].device)
    direction = _widen(grads)
    if adaptive:
        wide = _widen(params)
        direction = torch._foreach_mul(torch._foreach_mul(wide, wide), direction)
    moves = torch._foreach_mul(direction, (step * rho_scale**2).to(direction[0].dtype))
    # 0 * Inf is NaN: without the select a bad pass 1 would run pass 2 on NaN weights.
    moves = [torch.where(step != 0, move, 0.0) for move in moves]
    torch._foreach_add_(params, moves)


def gradient_dots(
    buckets: list[Bucket], first_grads: list[list[Tensor]], adaptive: bool, device: torch.device
) -> GradientDots:
    """B1: the dot products over all tensors; `first_grads` holds g0 and the buckets g1."""
    g0_g0, g0_g1, g1_g1, ascent = torch.zeros(4, dtype=torch.float64, device=device).unbind()
    for (params, grads, rho_scale), first in zip(buckets, first_grads, strict=True):
        cross = _dot(first, grads, device)
        g0_g0 = g0_g0 + _dot(first, first, device)
        g0_g1 = g0_g1 + cross
        g1_g1 = g1_g1 + _dot(grads, grads, device)
        if rho_scale > 0:
            if adaptive:
                cross = _dot(_in_metric(params, first, True), _in_metric(params, grads, True), device)
            ascent = ascent + rho_scale**2 * cross
    return GradientDots(g0_g0, g0_g1, g1_g1, ascent)


def combination(variant: str, dots: GradientDots, weight: float, max_norm: float | None) -> tuple[Tensor, Tensor]:
    """B2: the pair (c0, c1) of the update ``d = c0 * g0 + c1 * g1``, clipped to ``||d|| <= max_norm``.

    `weight` is GSAM's alpha and unused otherwise.
    """
    zero, one = torch.zeros_like(dots.g0_g1), torch.ones_like(dots.g0_g1)
    # k g1 is the component of g0 along g1; a zero g1 has none.
    k = torch.where(dots.g1_g1 > 0, dots.g0_g1 / dots.g1_g1, 0.0)
    if variant == "sam":
        c0, c1 = zero, one
    elif variant == "aligned":
        c0, c1 = one / 2, one / 2
    elif variant == "gsam":
        c0, c1 = -weight * one, 1.0 + weight * k
    else:
        c0, c1 = one / 2, (1.0 - k.clamp(max=0.0)) / 2
    if max_norm is not None:
        # ||d||^2 from the dot products: no further sweep. Rounding may leave it below zero when d cancels.
        # 1e-6 as in torch.nn.utils.clip_grad_norm_, whose result this reproduces.
        squared = c0 * c0 * dots.g0_g0 + 2.0 * c0 * c1 * dots.g0_g1 + c1 * c1 * dots.g1_g1
        factor = (max_norm / (squared.clamp(min=0.0).sqrt() + 1e-6)).clamp(max=1.0)
        c0, c1 = c0 * factor, c1 * factor
    return c0, c1


def restore(params: list[Tensor], backups: list[Tensor]) -> None:
    """B3, first half: copy the old bits back. Subtracting the perturbation would not give them."""
    torch._foreach_copy_(params, backups)


def combine(bucket: Bucket, first_grads: list[Tensor], c0: Tensor, c1: Tensor) -> None:
    """B3, second half: ``g1 <- c0 * g0 + c1 * g1`` in place, so that `.grad` stays the tensor it was."""
    first, second = _widen(first_grads), _widen(bucket.grads)
    device, dtype = second[0].device, second[0].dtype
    combined = torch._foreach_mul(second, c1.to(device, dtype))
    torch._foreach_add_(combined, torch._foreach_mul(first, c0.to(device, dtype)))
    torch._foreach_copy_(bucket.grads, combined)


def _in_metric(params: list[Tensor], grads: list[Tensor], adaptive: bool) -> list[Tensor]:
    """``theta * g`` for ASAM: the sign of theta cancels in every product of two of these."""
    grads = _widen(grads)
    return torch._foreach_mul(_widen(params), grads) if adaptive else grads


def _widen(tensors: list[Tensor]) -> list[Tensor]:
    """At least float32: products of float16 overflow from 256 on, and bfloat16 keeps 8 bits of them."""
    return [t.float() if t.dtype in (torch.float16, torch.bfloat16) else t for t in tensors]


def _dot(left: list[Tensor], right: list[Tensor], device: torch.device) -> Tensor:
    """Sum of products over two lists: in the wide dtype within a tensor, in float64 across tensors."""
    products = torch._foreach_mul(_widen(left), _widen(right))
    return torch.stack([product.sum() for product in products]).to(device, torch.float64).sum()
