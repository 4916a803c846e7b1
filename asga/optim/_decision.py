"""What a step decides, all on the device: how far to climb, how to combine the gradients, and the next radius."""

import torch
from torch import Tensor

from asga.optim import _sweeps as sweeps
from asga.optim._lists import Lists
from asga.optim._options import Options
from asga.optim._pending import Pending
from asga.optim._quantized import QuantizedWeights
from asga.optim._ranks import Ranks, verdict
from asga.optim._scaling import grad_scale
from asga.optim.radius import Radius


def climb(
    lists: list[Lists],
    losses: Tensor,
    scaler: torch.amp.GradScaler | None,
    options: Options,
    radius: Radius,
    ranks: Ranks,
    quantized: QuantizedWeights | None,
) -> Pending:
    """A1 and A2: the norm of the gradient and the length of the ascent step.

    Args:
        lists: Parameters with the gradients of the first pass.
        losses: Its loss if it is known, and room for that of the second.
        scaler: Whose factor the gradients carry.
        options: Of the step.
        radius: How far.
        ranks: Which gradients of quantized weights are averaged over.
        quantized: The quantized weights, where they are perturbed.
    """
    rho, scale = radius.rho.clone(), grad_scale(scaler, radius.rho.device)
    q0 = sweeps.ascent_norm(lists, options.adaptive, rho.device)
    if quantized is not None:
        q0 = q0 + quantized.norm(ranks).to(q0.device)
    relative = options.alpha_mode == "relative"
    step = torch.ops.asga.sam_ascent_step.default(q0, rho, scale, options.shift, relative)
    # Without a use for g0 in pass 2, neither is it kept.
    wanted = options.combines or options.needs_products or options.products == "all" or losses.numel() < 2
    return Pending(losses, rho, scale, q0, step, {} if wanted else None)


def decide(
    pending: Pending,
    lists: list[Lists],
    backups: dict[Tensor, Tensor],
    options: Options,
    radius: Radius,
    ranks: Ranks,
    quantized: QuantizedWeights | None,
) -> tuple[Tensor | None, Tensor]:
    """B1, B2 and B4: whether and how to step, the same on every process; moves the radius.

    Args:
        pending: The first pass, and the losses that are known.
        lists: Parameters with the gradients of the second.
        backups: The old weights, by parameter.
        options: Of the step.
        radius: Moves if it follows the gap.
        ranks: Which losses are averaged over.
        quantized: The quantized weights, where they are perturbed.

    Returns:
        The dot products, or None where nobody asked for them, and what `sam_coefficients` makes of them.
    """
    q0, step, losses = pending.q0, pending.step, pending.losses
    # The norm leaves out what is not perturbed; where g0 is used, only the products see that it is not finite.
    blind = options.combines and any(one.group["rho_scale"] == 0 for one in lists)
    needed = options.needs_products or blind or losses.numel() < 2
    dots = None
    if needed or options.products != "none":
        full = pending.first_grads is not None and (needed or options.products == "all")
        dots = sweeps.gradient_dots(lists, pending, backups, full=full, adaptive=options.adaptive)
        if quantized is not None and full:
            dots[3] += quantized.product(q0.device)
    if ranks.several:
        bad = verdict([q0] if dots is None else [q0, dots])
        shared = ranks.mean_(torch.stack([*losses.unbind(), q0, step, bad]))
        losses, bad = shared[: losses.numel()], shared[-1]
        if options.local_ascent:
            q0, step = shared[-3], shared[-2]
        # Not finite on any rank: not valid on all of them.
        q0 = q0 + bad
    coefficients = torch.ops.asga.sam_coefficients.default(
        q0,
        step,
        dots,
        losses,
        pending.scale,
        None,
        radius.rho,
        radius.counts,
        options.variant_number,
        options.alpha,
        options.max_norm,
        radius.follows_gap,
        radius.rho_min,
        radius.rho_max,
    )
    return dots, coefficients
