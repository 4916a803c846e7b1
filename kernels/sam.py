"""The fused ASGA step: sums, perturbation and updates over lists of tensors, and the scalars in between.

One function for each operator of `asga.ops.sam_library`, with its arguments; `asga.ops.sam_reference` defines the
arithmetic and says what each computes. Every sweep is one launch for all tensors, sums have a second one that adds up a
partial sum of each chunk in float64, always in the same order. `asga.kernels.tensor_lists` says how kernels find their
tensors, and what that costs.
"""

from collections.abc import Mapping, Sequence

import torch
import triton
from torch import Tensor

from asga.kernels.sam_scalars import adam_sizes_kernel, ascent_step_kernel, coefficients_kernel
from asga.kernels.sam_sums import dots_kernel, norm_kernel, sam_finish_kernel
from asga.kernels.sam_sweeps import adam_kernel, combine_kernel, perturb_kernel, sgd_kernel
from asga.kernels.tensor_lists import TILE, Operand, TensorLists, bits_of, pointer_table

# What `coefficients_kernel` counts: updates, at either bound of the radius, steps, steps left out.
_COUNTERS = 5
# Steps that one program counts.
_STEPS = 128


def sam_norm(params: Sequence[Tensor], grads: Sequence[Tensor], rho_scales: Sequence[float], adaptive: bool) -> Tensor:
    """A1: ``q0 = ||T g||^2``, 0-dim float64."""
    _check_scales(rho_scales, params)
    operands = [
        Operand("grads", grads, is_gradient=True),
        Operand("params", params if adaptive else (), optional=True),
    ]
    lists = TensorLists(params, operands, [scale or None for scale in rho_scales])
    return _add_up(lists, 1, grads[0], norm_kernel, ADAPTIVE=adaptive).reshape(())


def sam_ascent_step(q0: Tensor, rho: Tensor, grad_scale: Tensor | None, shift: float, relative: bool) -> Tensor:
    """A2: the length of the ascent step, 0-dim float64."""
    _check_scalars({"q0": q0, "rho": rho, "grad_scale": grad_scale}, q0)
    result = torch.empty_like(q0)
    _launch(ascent_step_kernel, 1, result, q0, rho, grad_scale, bits_of(shift), RELATIVE=relative)
    return result


def sam_perturb(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    step: Tensor,
    rho_scales: Sequence[float],
    adaptive: bool,
) -> None:
    """A3: ``backup <- theta; theta <- theta + s T^2 g; first_grad <- g``."""
    _check_scales(rho_scales, params)
    _check_scalars({"step": step}, params[0])
    operands = _up_to_backups(params, backups, first_grads, grads, ("params", "backups", "first_grads"))
    scales = rho_scales if first_grads else [scale or None for scale in rho_scales]
    TensorLists(params, operands, scales).launch(perturb_kernel, step, ADAPTIVE=adaptive, KEEPS=len(first_grads) > 0)


def sam_dots(
    params: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    rho_scales: Sequence[float],
    adaptive: bool,
) -> Tensor:
    """B1: ``[<g0, g0>, <g0, g1>, <g1, g1>, <T g0, T g1>]``, float64."""
    _check_scales(rho_scales, params)
    in_metric = adaptive and len(first_grads) > 0
    operands = [
        Operand("grads", grads, is_gradient=True),
        Operand("params", params if in_metric else (), optional=True),
        Operand("first_grads", first_grads, optional=True, is_gradient=True),
    ]
    lists = TensorLists(params, operands, rho_scales)
    return _add_up(lists, 4, grads[0], dots_kernel, ADAPTIVE=in_metric, FIRST=len(first_grads) > 0)


def sam_coefficients(
    q0: Tensor,
    step: Tensor,
    dots: Tensor | None,
    losses: Tensor,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    rho: Tensor,
    counts: Tensor,
    variant: int,
    weight: float,
    max_norm: float | None,
    follow_gap: bool,
    rho_min: float,
    rho_max: float,
) -> Tensor:
    """B2 and B4: ``[c0, c1, valid, h]`` float64; moves `rho` and `counts`."""
    if dots is None and (variant > 1 or max_norm is not None):
        raise RuntimeError("dots is None, but the variant or max_norm needs the dot products")
    if losses.numel() > 2:
        raise RuntimeError(f"losses has {losses.numel()} elements; at most two are used")
    scalars = {"q0": q0, "step": step, "grad_scale": grad_scale, "found_inf": found_inf, "rho": rho}
    _check_scalars(scalars, q0)
    _check_scalars({"dots": dots}, q0, 4)
    _check_scalars({"losses": losses}, q0, losses.numel())
    _check_scalars({"counts": counts}, q0, _COUNTERS, torch.int64)
    result = q0.new_empty(4)
    numbers = (weight, max_norm or 0.0, rho_min, rho_max)
    _launch(
        *(coefficients_kernel, 1),
        *(result, q0, step, dots, losses, grad_scale, found_inf, rho, counts),
        *map(bits_of, numbers),
        LOSSES=losses.numel(),
        VARIANT=variant,
        CLIPS=max_norm is not None,
        FOLLOW_GAP=follow_gap,
    )
    return result


def sam_combine(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    coefficients: Tensor,
) -> None:
    """B3 for any base optimizer: ``theta <- backup; g1 <- c0 g0 + c1 g1``, the latter only if valid."""
    _check_scalars({"coefficients": coefficients}, params[0], 4)
    operands = _up_to_backups(params, backups, first_grads, grads, ("params", "grads"))
    TensorLists(params, operands).launch(combine_kernel, coefficients, FIRST=len(first_grads) > 0)


def sam_sgd(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    coefficients: Tensor,
    lr_tensor: Tensor | None,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """B3 with `torch.optim.SGD`."""
    _check_scalars({"coefficients": coefficients}, params[0], 4)
    _check_scalars({"lr_tensor": lr_tensor}, params[0])
    operands = _up_to_backups(params, backups, first_grads, grads, ("params",))
    operands.append(Operand("momentum_buffers", momentum_buffers, written=True, optional=True))
    TensorLists(params, operands).launch(
        sgd_kernel,
        *(coefficients, lr_tensor, bits_of(lr), bits_of(momentum), bits_of(weight_decay)),
        FIRST=len(first_grads) > 0,
        MOMENTUM=len(momentum_buffers) > 0,
        NESTEROV=nesterov,
        DECAYS=weight_decay != 0,
    )


def sam_adam(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    coefficients: Tensor,
    lr_tensor: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """B3 with `torch.optim.Adam`, or AdamW if `decoupled`."""
    _check_scalars({"coefficients": coefficients}, params[0], 4)
    _check_scalars({"lr_tensor": lr_tensor}, params[0])
    if len(steps) != len(params):
        raise RuntimeError(f"steps has {len(steps)} tensors, but params {len(params)}")
    if any(step.dtype != torch.float32 or step.numel() != 1 or step.device != coefficients.device for step in steps):
        raise RuntimeError("steps must hold float32 tensors on the device of params with one element")
    operands = _up_to_backups(params, backups, first_grads, grads, ("params",))
    operands.append(Operand("exp_avgs", exp_avgs, written=True))
    operands.append(Operand("exp_avg_sqs", exp_avg_sqs, written=True))
    lists = TensorLists(params, operands)
    # Before the sweep: there, one program would count while others still read. Those that take part come first.
    part = set(lists.entries)
    ordered = [steps[i] for i in lists.entries] + [step for i, step in enumerate(steps) if i not in part]
    sizes = coefficients.new_empty(2, len(steps))
    rate = (lr_tensor, bits_of(lr))
    _launch(
        *(adam_sizes_kernel, triton.cdiv(len(steps), _STEPS)),
        *(sizes, pointer_table(ordered), coefficients, *rate, bits_of(beta1), bits_of(beta2), len(steps)),
        STEPS=_STEPS,
    )
    lists.launch(
        adam_kernel,
        *(sizes, len(steps), coefficients, *rate),
        *map(bits_of, (beta1, beta2, eps, weight_decay)),
        FIRST=len(first_grads) > 0,
        DECAYS=weight_decay != 0,
        DECOUPLED=decoupled,
    )


def _up_to_backups(
    params: Sequence[Tensor],
    backups: Sequence[Tensor],
    first_grads: Sequence[Tensor],
    grads: Sequence[Tensor],
    written: Sequence[str],
) -> list[Operand]:
    """The first four operands, in the order of their rows."""
    return [
        Operand("grads", grads, "grads" in written, is_gradient=True),
        Operand("params", params, "params" in written),
        Operand("first_grads", first_grads, "first_grads" in written, optional=True, is_gradient=True),
        Operand("backups", backups, "backups" in written),
    ]


def _add_up(lists: TensorLists, terms: int, like: Tensor, kernel: object, **options: object) -> Tensor:
    """Sums over all chunks, float64 ``[terms]``."""
    partials = like.new_empty(terms, lists.programs, dtype=torch.float64)
    totals = like.new_empty(terms, dtype=torch.float64)
    lists.launch(kernel, partials, lists.programs, **options)
    _launch(sam_finish_kernel, terms, totals, partials, lists.programs, BLOCK=TILE, num_warps=4)
    return totals


def _launch(
    kernel: object, programs: int, result: Tensor, *args: object, num_warps: int = 1, **options: object
) -> None:
    """Run a kernel of a few programs that writes to `result`, its first argument."""
    with torch.cuda.device_of(result):
        kernel[(programs,)](result, *args, num_warps=num_warps, enable_fp_fusion=False, **options)


def _check_scales(rho_scales: Sequence[float], params: Sequence[Tensor]) -> None:
    if len(rho_scales) != len(params):
        raise RuntimeError(f"rho_scales has {len(rho_scales)} entries, but params {len(params)}")


def _check_scalars(
    tensors: Mapping[str, Tensor | None], like: Tensor, count: int = 1, dtype: torch.dtype = torch.float64
) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        fits = tensor.dtype == dtype and tensor.numel() == count and tensor.is_contiguous()
        if not fits or tensor.device != like.device:
            raise RuntimeError(
                f"{name} must be a contiguous {dtype} tensor with {count} element(s) on {like.device}, got "
                f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
