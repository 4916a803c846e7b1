"""The ASGA optimizer: two passes over a batch, one step of any base optimizer with an aligned gradient."""

import math
import warnings
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from asga.ops.sam_library import VARIANTS
from asga.optim import _sweeps as sweeps
from asga.optim._checks import (
    Shapes,
    check_alpha,
    check_base,
    check_choice,
    check_group,
    check_loss,
    check_maximize,
    check_radius,
    check_same_shapes,
)
from asga.optim._fused import reason_not_to_fuse, update
from asga.optim._lists import Lists, collect
from asga.optim._quantized import QuantizedWeights
from asga.optim._ranks import Ranks, verdict
from asga.optim._scaling import Scaling, Witness
from asga.optim.batchnorm import restore_running_statistics, save_running_statistics
from asga.optim.radius import RULES, Radius

# Where `alpha` is not given. Aligned and conflict: a tenth of the ascent step, so that the shift is felt (an
# absolute 0.001 was 1.4 % of the step and changed nothing). GSAM: the default of its authors' code.
_DEFAULT_ALPHA = {"sam": 0.0, "aligned": 0.1, "conflict": 0.1, "gsam": 0.4}

# A radius on one bound for more than this share of the steps is in effect constant; before 100 steps a share
# says little.
_STUCK_SHARE, _STUCK_AFTER = 0.9, 100


class ASGA(Optimizer):
    """Adaptive sharpness-aware gradient aligning around any base optimizer.

    A step makes two passes over the same batch: g0 = grad L at theta, g1 = grad L at theta' = theta + s g0.
    Every weight then returns to its exact old bits, and `base_optimizer` steps with ``d = c0 g0 + c1 g1``::

        variant     s                          c0       c1
        sam         rho / ||g0||               0        1
        aligned     (1 - alpha) rho / ||g0||   1/2      1/2
        conflict    (1 - alpha) rho / ||g0||   1/2      (1 - min(k, 0)) / 2
        gsam        rho / ||g0||               -alpha   1 + alpha k            k = <g0, g1> / ||g1||^2

    The shift by alpha aligns the two gradients: to first order, minimizing ``L(theta) +
    L'(theta - alpha g0)`` with L' the perturbed loss maximizes ``<grad L, grad L'>``. The radius follows the
    gap ``h = L(theta') - L(theta)`` of the step before: ``rho <- clamp(log(1 + max(h, 0)), rho_min,
    rho_max)``.

    Either give `step` a closure, which it calls twice::

        def closure():
            optimizer.zero_grad()
            loss = loss_fn(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)

    or write the passes out::

        loss = loss_fn(model(x), y); loss.backward(); optimizer.first_step(loss)
        loss = loss_fn(model(x), y); loss.backward(); optimizer.second_step(loss)

    Random numbers are the caller's: for the same dropout masks in both passes, restore the state of the
    generator at the start of the closure. To accumulate over micro-batches, run all of them in each pass.

    A step with a NaN or an infinity in a gradient or loss of either pass restores the weights and changes
    nothing but the counters: no parameter, no value of the base optimizer's state, no radius. `step` also undoes
    what pass 1 did to the running statistics of `model`; a loop of `first_step` and `second_step`, whose pass 1 is
    over before the optimizer hears of it, is left with them.

    With SGD, Adam or AdamW of torch.optim as the base, its update is part of the sweep that restores and combines
    (`fused`): the host waits for nothing, and pointers stay the same from step to step, so that a step can be
    captured in a CUDA graph. Any other base optimizer gets d in `.grad` and its own `step`; since only the host can
    leave that out, this costs one synchronization.

    Mixed precision in float16: give the `torch.amp.GradScaler` as `scaler`, and call backward on
    ``scaler.scale(loss)`` in both passes, while the loss that is returned or given stays unscaled; after the step,
    ``scaler.update()``. The factor is divided out on the way, without ``scaler.unscale_`` and ``scaler.step``.

    Data-parallel training: losses are averaged over `process_group`, so that every rank takes the same decision and
    the same radius; sums over sharded parameters (FSDP2, DTensor) are added up over their mesh. `.grad` of pass 1
    is that of DDP, averaged; with `local_ascent`, pass 1 runs under ``model.no_sync()`` and each worker climbs along
    the gradient of its own batch.

    Parameter groups and `state` are shared with `base_optimizer`, so learning-rate schedulers work as usual.
    A group may set `rho_scale` (default 1): with ``T = rho_scale`` (times ``|theta|`` if `adaptive`), its
    tensors move by ``s T^2 g0``, and ||g0|| in s is ``||T g0||`` over all groups; a group on its own would
    move by ``rho_scale * rho``. 0 leaves a group where it is, which is right for quantizer scales and the
    logits of a search.

    A parameter without gradient in pass 1 counts as g0 = 0; one without gradient in pass 2 is not updated.

    Args:
        params: Parameters or groups of them, as for any torch optimizer; dense, real, any dtypes and devices.
            Scalars are combined on the device of the first one.
        base_optimizer: The class to build, such as `torch.optim.SGD`; one that steps without a closure.
        rho_max: Largest radius; the radius itself when ``radius="constant"``. It must stand well above
            log(1 + h) or the radius cannot move: at 0.1, h was about 0.2 on a ResNet-20 and the radius sat on
            its bound in 97-100 % of the steps. 0.5 leaves room up to h = 0.65.
        rho_min: Smallest radius, positive; without effect when constant. 0.01 is a fifth of SAM's usual 0.05:
            small, but not a step without perturbation.
        alpha: Aligned and conflict: the shift of the ascent step. GSAM: the weight of the orthogonal part.
            Not used by sam. None: 0.1 for aligned and conflict, 0.4 for gsam.
        variant: "sam", "aligned", "gsam" or "conflict" (the component of g0 against g1 is removed if they
            conflict).
        adaptive: ASAM: scale the perturbation by theta^2 and measure g0 as ||theta g0||.
        perturb: "latent": the weights that are trained. "quantized": for the quantized layers of `model`, which is
            then needed, the weights behind their quantizers, along the gradient there; everything else as with
            "latent". Eager mode only, without `adaptive`.
        radius: "adaptive", "constant", or "proportional" to the learning rate of the first group; see
            `asga.optim.radius.Radius`.
        alpha_mode: For aligned and conflict: "relative" as in the table, in [0, 1), or "absolute" as
            published, ``s = rho / ||g0|| - alpha``, any alpha >= 0.
        max_norm: Clip d to this norm, as `torch.nn.utils.clip_grad_norm_`. None: no clipping.
        fused: True: the update is part of the last sweep, or an error says why it cannot be. False: never. None: where
            it can be; `reason_not_fused` says why not.
        products: Which dot products of g0 and g1 are computed where the step itself does not need them: "all", for
            `diagnostics`; "guard", only <g1, g1>, which reads g1 once more; "none": a NaN in g1 goes unnoticed where
            the losses are finite. Variants gsam and conflict, `max_norm`, and steps without losses need them all.
        scaler: The GradScaler, if there is one.
        process_group: Over which losses are averaged: a process group, None for never, or "auto" for the default one
            where `torch.distributed` is initialized.
        local_ascent: Whether gradients of pass 1 differ between workers; those of pass 2 must not. Not for sharded
            parameters.
        model: A module whose normalization layers keep the running statistics of pass 1; those of pass 2 are
            undone. Without it, running statistics move twice a step.
        **base_kwargs: For `base_optimizer`: lr, momentum, weight_decay ...

    Raises:
        TypeError: `base_optimizer` or `model` is of the wrong kind, or a parameter is sparse, complex or of a dtype
            without kernels.
        ValueError: An option or parameter group is out of range, there is no parameter, or the update cannot be fused.

    Source:
        "Learning from Loss Landscape: Generalizable Mixed-Precision Quantization via Adaptive Sharpness-Aware
        Gradient Aligning", ICML 2025 (arXiv 2505.04877). SAM: Foret et al., ICLR 2021. ASAM: Kwon et al.,
        ICML 2021. GSAM: Zhuang et al., ICLR 2022. The shift: SAGM, Wang et al., CVPR 2023. Conflict: PCGrad,
        Yu et al., NeurIPS 2020, applied to g0 alone.
    """

    _pending: "_Pending | None" = None

    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer] = torch.optim.SGD,
        *,
        rho_max: float = 0.5,
        rho_min: float = 0.01,
        alpha: float | None = None,
        variant: str = "aligned",
        adaptive: bool = False,
        perturb: str = "latent",
        radius: str = "adaptive",
        alpha_mode: str = "relative",
        max_norm: float | None = None,
        fused: bool | None = None,
        products: str = "all",
        scaler: torch.amp.GradScaler | None = None,
        process_group: object | None = "auto",
        local_ascent: bool = False,
        model: nn.Module | None = None,
        **base_kwargs: object,
    ) -> None:
        check_base(base_optimizer)
        check_choice("variant", variant, tuple(_DEFAULT_ALPHA))
        check_choice("radius", radius, RULES)
        check_choice("perturb", perturb, ("latent", "quantized"))
        check_choice("alpha_mode", alpha_mode, ("relative", "absolute"))
        check_choice("products", products, ("all", "guard", "none"))
        check_radius(rho_min, rho_max, radius)
        alpha = _DEFAULT_ALPHA[variant] if alpha is None else alpha
        check_alpha(alpha, variant, alpha_mode)
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"max_norm is {max_norm}; it must be positive and finite, or None")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module or None is needed")
        if perturb == "quantized" and (model is None or adaptive):
            raise ValueError("perturb is 'quantized'; that needs the model, and adaptive=False")

        super().__init__(params, {"rho_scale": 1.0})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self.defaults.update(self.base_optimizer.defaults)
        self._share_with_base()
        for group in self.param_groups:
            check_maximize(group)
        self.variant, self.alpha, self.alpha_mode = variant, alpha, alpha_mode
        self.adaptive, self.max_norm, self.model = adaptive, max_norm, model
        self.fused, self.products, self.local_ascent = fused, products, local_ascent
        self._check_fused()
        self.scaler, self._ranks = scaler, Ranks(process_group)

        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        if device is None:
            raise ValueError("params holds no parameter: every group is empty")
        lr = self.param_groups[0].get("lr", 1.0)
        self._radius = Radius(rho_min, rho_max, rule=radius, device=device, lr=lr)
        unknown = torch.full((), math.nan, dtype=torch.float64, device=device)
        self._last = _LastStep(unknown, unknown, unknown, unknown, unknown.expand(4), unknown, unknown)
        self._witness = Witness(device)
        self._quantized = None
        if perturb == "quantized":
            scales = {p: group["rho_scale"] for group in self.param_groups for p in group["params"]}
            self._quantized = QuantizedWeights(model, scales)
        self._buffers: dict[str, dict[Tensor, Tensor]] = {"backups": {}, "first_grads": {}}

    @property
    def rho(self) -> Tensor:
        """The radius of the next step: 0-dim float64 on the device, not to be written to."""
        return self._radius.rho

    @property
    def rho_max(self) -> float:
        """The largest radius; the radius itself when it is constant."""
        return self._radius.rho_max

    @property
    def last_skipped(self) -> Tensor:
        """Whether the last step was left out, because a gradient or loss was not finite: 0-dim bool on the device."""
        return self._last.valid == 0

    @property
    def reason_not_fused(self) -> str | None:
        """Why the base optimizer makes its step by itself; None if its update is part of the last sweep."""
        return "fused is False" if self.fused is False else reason_not_to_fuse(self.base_optimizer)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor | float:
        """Make one step from a closure that is called twice.

        Whatever is raised between the passes, KeyboardInterrupt included, leaves the weights (and the running
        statistics of `model`) restored.

        Args:
            closure: Clears the gradients, computes the loss of a batch, calls backward and returns the loss. To
                accumulate gradients, it does so for several micro-batches and returns the sum of what it called
                backward on.

        Returns:
            What the closure returned first: the loss at the weights before the step.

        Raises:
            TypeError: No closure, or one that does not return its loss.
            RuntimeError: The closure left no gradient, or a step is already under way.
        """
        if closure is None:
            raise TypeError("step() needs a closure that computes the loss and its gradients; it is called twice")
        self._refuse_between_passes("step()")
        closure = torch.enable_grad()(closure)
        before = None if self.model is None else save_running_statistics(self.model)
        first_loss = _call(closure)
        try:
            self.first_step(first_loss)
            self._pending = self._pending._replace(statistics_before=before)
            self.second_step(_call(closure), zero_grad=False)
        except BaseException:
            self.restore()
            raise
        return first_loss

    @torch.no_grad()
    def first_step(self, loss: Tensor | float | None = None, *, zero_grad: bool = True) -> None:
        """Keep the gradients as g0, back the weights up and perturb them; call it after the first backward.

        Args:
            loss: The loss at theta, one value. With the losses of both passes h is their difference, without
                them ``s (||g0||^2 + <g0, g1>) / 2``.
            zero_grad: Clear the gradients for the second pass. A gradient that nothing else can write into is then
                kept as g0 without a copy.

        Raises:
            RuntimeError: No parameter has a gradient, or `second_step` is due.
            TypeError: A gradient is sparse, or the loss is not a number. Nothing has been perturbed then.
            ValueError: The loss has more than one value, or `local_ascent` meets sharded parameters.
        """
        self._refuse_between_passes("first_step()")
        loss = self._as_scalar(loss)
        may_keep = zero_grad and not self.local_ascent
        lists = collect(self.param_groups, apart=False, may_keep=may_keep, still=self._not_moved())
        if self.local_ascent and any(one.shards for one in lists):
            raise ValueError("local_ascent is True, but parameters are sharded: no process has a gradient of its own")
        self._radius.before_step(self.param_groups[0])
        rho, scaling = self.rho.clone(), Scaling.of(self.scaler, self.rho.device)
        q0 = sweeps.ascent_norm(lists, self.adaptive, rho.device)
        behind = None if self._quantized is None else self._quantized.norm(self._ranks)
        q0 = q0 if behind is None else q0 + behind.to(q0.device)
        shift = 0.0 if self.variant == "gsam" else self.alpha
        step = torch.ops.asga.sam_ascent_step.default(q0, rho, scaling.scale, shift, self.alpha_mode == "relative")
        # Without a use for g0 in pass 2, neither is it kept.
        wanted = self.variant != "sam" or self.max_norm is not None or self.products == "all" or loss is None
        self._pending = _Pending(
            first_grads={} if wanted else None,
            backups=[],
            statistics=None if self.model is None else save_running_statistics(self.model),
            statistics_before=None,
            loss=loss,
            rho=rho,
            q0=q0,
            step=step,
            scaling=scaling,
        )
        try:
            for one in lists:
                self._perturb(one, self._pending)
            if self._quantized is not None:
                self._quantized.perturb(step)
            if zero_grad:
                self.zero_grad()
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def second_step(self, loss: Tensor | float | None = None, *, zero_grad: bool = True) -> None:
        """Restore the weights and step the base optimizer; call it after the second backward.

        Args:
            loss: The loss at theta', one value; see `first_step`.
            zero_grad: Clear the gradients. If False, `.grad` holds d afterwards, or g1 where the update is fused.

        Raises:
            RuntimeError: `first_step` has not been called, or no parameter has a gradient.
            TypeError: A gradient is sparse, or the loss is not a number. The weights are restored first.
            ValueError: The loss has more than one value. The weights are restored first.
        """
        pending = self._pending
        if pending is None:
            raise RuntimeError("second_step() without first_step(): there is nothing to restore")
        try:
            loss = self._as_scalar(loss)
            lists = collect(self.param_groups, apart=True, still=self._not_moved())
            backups_of = sweeps.by_owner(pending.backups)
            dots, coefficients = self._decide(pending, backups_of, loss, lists)
            fused = self.reason_not_fused is None
            for one in lists:
                backups = one.parallel(backups_of, one.params)
                first = self._first_grads(pending, one)
                if fused:
                    update(self.base_optimizer, one, backups, first, coefficients)
                else:
                    sweeps.combine(one, backups, first, coefficients)
            seen = {owner for one in lists for owner in one.owners}
            sweeps.restore({owner: kept for owner, kept in backups_of.items() if owner not in seen})
            if pending.statistics is not None:
                restore_running_statistics(self.model, pending.statistics)
        except BaseException:
            self.restore()
            raise
        self._finish()
        valid = coefficients[2] != 0
        factor = pending.scaling.factor
        self._last = _LastStep(coefficients[3], pending.rho, pending.q0, pending.step, dots, factor, coefficients[2])
        if pending.statistics_before is not None:
            restore_running_statistics(self.model, pending.statistics_before, unless=valid)
        if pending.scaling.scale is not None:
            self._witness.report(self.scaler, valid)
        # The one synchronization: the step of an arbitrary optimizer can only be left out by the host.
        if not fused and valid.item():
            self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()
        # What a scheduler looks at to tell that steps come before it; it only wraps `step` itself.
        self._opt_called = True

    def restore(self) -> None:
        """Abandon a step between its passes: the weights get their old bits back. Otherwise does nothing.

        `step` calls it by itself; loops of `first_step` and `second_step` that catch exceptions call it.
        """
        if self._pending is None:
            return
        with torch.no_grad():
            sweeps.restore(sweeps.by_owner(self._pending.backups, only_done=True))
            if self._pending.statistics is not None:
                restore_running_statistics(self.model, self._pending.statistics)
        self._finish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as any torch optimizer."""
        super().zero_grad(set_to_none)
        if self._quantized is not None:
            self._quantized.clear()

    def scale_radius(self, factor: float) -> None:
        """Multiply the radius and `rho_max`, and `rho_min` where it would lie above, for when steps go too far.

        The bounds are no part of `state_dict`: whoever scales them does so again after building the optimizer anew. A
        step captured in a CUDA graph keeps the bounds of its capture.

        Raises:
            ValueError: `factor` is not positive and finite.
            RuntimeError: Called between `first_step` and `second_step`.
        """
        self._refuse_between_passes("scale_radius()")
        if not 0 < factor < math.inf:
            raise ValueError(f"factor is {factor}; it must be positive and finite")
        self._radius.scale(factor)

    def diagnostics(self) -> dict[str, float]:
        """What the last step saw. Reading it synchronizes with the device; not reading it costs nothing.

        Warns when an adaptive radius has been on one of its bounds in more than 90 % of at least 100 steps.

        Returns:
            `h`, the surrogate gap; `rho`; `norm_g0` and `norm_g1`, Euclidean; `cosine` of g0 and g1; `sigma`
            = 2 h / rho^2, the published sharpness, dominated by ||g0|| / rho at small rho; `kappa` =
            (<g0, g1> - ||g0||^2) / (s ||g0||^2), the curvature along the perturbation (products in its metric
            T). NaN before the first step, where undefined, and where `products` leaves a value unknown. Over all steps:
            `share_at_rho_min` and `share_at_rho_max` of the updates of the radius (0 when constant), and the counts
            `steps` and `skipped`.
        """
        h, rho, q0, step, dots, scale, _ = self._last
        g0_g0, g0_g1, g1_g1, ascent = dots.unbind()
        norm_g0, norm_g1 = g0_g0.sqrt() / scale, g1_g1.sqrt() / scale
        count = self._radius.count
        updates = count("updates").clamp(min=1)
        values = {
            "h": h,
            "rho": rho,
            "norm_g0": norm_g0,
            "norm_g1": norm_g1,
            "cosine": g0_g1 / (g0_g0.sqrt() * g1_g1.sqrt()),
            "sigma": 2.0 * h / rho**2,
            "kappa": (ascent - q0) / (q0 * step * scale),
            "share_at_rho_min": count("at_rho_min").double() / updates,
            "share_at_rho_max": count("at_rho_max").double() / updates,
            "steps": count("steps"),
            "skipped": count("skipped"),
        }
        report = dict(zip(values, torch.stack([v.double() for v in values.values()]).tolist(), strict=True))
        if report["steps"] - report["skipped"] >= _STUCK_AFTER:
            self._warn_if_stuck(report)
        return report

    def state_dict(self) -> dict[str, object]:
        """The base optimizer's state dict (`state`, `param_groups`) and, under `asga`, radius and counters.

        Backups are no part of it: a step is never saved halfway.

        Raises:
            RuntimeError: Called between `first_step` and `second_step`, when the weights are perturbed.
        """
        self._refuse_between_passes("state_dict()")
        own: dict[str, object] = {name: value.clone() for name, value in self._radius.state().items()}
        return {**self.base_optimizer.state_dict(), "asga": {**own, "shapes": self._shapes()}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        """Resume, bit for bit, from what `state_dict` returned.

        Raises:
            ValueError: The state is not of an ASGA optimizer, or of other parameters. Nothing changes.
            RuntimeError: Called between `first_step` and `second_step`.
        """
        self._refuse_between_passes("load_state_dict()")
        state_dict = dict(state_dict)
        own = state_dict.pop("asga", None)
        missing = {"shapes", *self._radius.state()} - set(own or ())
        if missing:
            raise ValueError(f"state_dict is not from an ASGA optimizer: its entry 'asga' lacks {sorted(missing)}")
        check_same_shapes([tuple(map(tuple, group)) for group in own["shapes"]], self._shapes())
        self.base_optimizer.load_state_dict(state_dict)
        self._share_with_base()
        for name, value in self._radius.state().items():
            value.copy_(own[name])

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """Add a parameter group, here and in the base optimizer; see the class for `rho_scale`.

        Raises:
            RuntimeError: Called between `first_step` and `second_step`.
            TypeError: A parameter is sparse or complex.
            ValueError: `rho_scale` is negative or not finite, or the group sets `maximize`.
        """
        self._refuse_between_passes("add_param_group()")
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            if "base_optimizer" in vars(self):
                self._check_fused()
        except Exception:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, object]:
        self._refuse_between_passes("copying or pickling")
        if self._quantized is not None:
            raise TypeError("an optimizer that perturbs quantized weights is tied to its model and cannot be copied")
        kept = ("base_optimizer", "variant", "alpha", "alpha_mode", "adaptive", "max_norm", "model")
        options = ("fused", "products", "local_ascent", "scaler")
        internal = ("_radius", "_ranks", "_witness", "_last", "_quantized")
        own = {name: getattr(self, name) for name in (*kept, *options, *internal)}
        return {**super().__getstate__(), **own, "_buffers": {name: {} for name in self._buffers}}

    def _share_with_base(self) -> None:
        """One list of groups and one state for both, so that schedulers reach the base optimizer."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def _finish(self) -> None:
        """The step is over."""
        self._pending = None
        if self._quantized is not None:
            self._quantized.restore()

    def _not_moved(self) -> Collection[Tensor]:
        """Parameters that stay where they are whatever their `rho_scale`."""
        return () if self._quantized is None else self._quantized.latent

    def _check_fused(self) -> None:
        if self.fused and (reason := reason_not_to_fuse(self.base_optimizer)) is not None:
            raise ValueError(f"fused is True, but {reason}")

    def _perturb(self, lists: Lists, pending: "_Pending") -> None:
        """A3 over some tensors; notes what is kept of them."""
        kept = [
            param if scale == 0 else self._buffer("backups", owner, param)
            for owner, param, scale in zip(lists.owners, lists.params, lists.rho_scales, strict=True)
        ]
        copies: list[Tensor] = []
        if pending.first_grads is not None:
            if not lists.owned:
                pairs = zip(lists.owners, lists.grads, strict=True)
                copies = [self._buffer("first_grads", owner, grad) for owner, grad in pairs]
            pending.first_grads.update(zip(lists.owners, copies or lists.grads, strict=True))
        sweeps.perturb(lists, kept, copies, pending.step, self.adaptive, pending.backups)

    def _buffer(self, kind: str, owner: Tensor, like: Tensor) -> Tensor:
        """Memory that is kept from step to step: new pages cost more than the sweep, and graphs need the same ones."""
        found = self._buffers[kind].get(owner)
        if found is None or (found.shape, found.dtype, found.device) != (like.shape, like.dtype, like.device):
            found = self._buffers[kind][owner] = torch.empty_like(like, requires_grad=False)
        return found

    def _first_grads(self, pending: "_Pending", lists: Lists) -> list[Tensor]:
        """g0 of some tensors, as the operators take it; none at all where its coefficient is zero."""
        if self.variant == "sam" or pending.first_grads is None:
            return []
        return lists.parallel(pending.first_grads, [lists.params[0].new_empty(0)] * len(lists.params))

    def _decide(
        self, pending: "_Pending", backups: dict[Tensor, Tensor], loss: Tensor | None, lists: list[Lists]
    ) -> tuple[Tensor, Tensor]:
        """B1, B2 and B4: the dot products and what `sam_coefficients` makes of them."""
        losses = [value for value in (pending.loss, loss) if value is not None]
        q0, step, device = pending.q0, pending.step, pending.q0.device
        projects = self.variant in ("gsam", "conflict")
        needed = projects or self.max_norm is not None or (self._radius.follows_gap and len(losses) < 2)
        if self.local_ascent and pending.first_grads is not None:
            self._ranks.average_(list(pending.first_grads.values()))
        dots = None
        if needed or self.products != "none":
            full = pending.first_grads is not None and (needed or self.products == "all")
            first_grads = pending.first_grads if full else None
            dots = sweeps.gradient_dots(lists, first_grads, backups, adaptive=self.adaptive, device=device)
            if self._quantized is not None and full:
                dots[3] += self._quantized.product(device)
        if self._ranks.several:
            bad = verdict([q0] if dots is None else [q0, dots])
            shared = self._ranks.mean(torch.stack([*losses, q0, step, bad]))
            losses, bad = list(shared[: len(losses)].unbind()), shared[-1]
            if self.local_ascent:
                q0, step = shared[-3], shared[-2]
            # Not finite on any rank: not valid on all of them.
            q0 = q0 + bad
        known = torch.stack(losses) if losses else q0.new_empty(0)
        coefficients = torch.ops.asga.sam_coefficients.default(
            q0,
            step,
            dots,
            known,
            pending.scaling.scale,
            None,
            self._radius.rho,
            self._radius.counts,
            VARIANTS.index(self.variant),
            self.alpha,
            self.max_norm,
            self._radius.follows_gap,
            self._radius.rho_min,
            self._radius.rho_max,
        )
        return q0.new_full((4,), math.nan) if dots is None else dots, coefficients

    def _as_scalar(self, loss: Tensor | float | None) -> Tensor | None:
        if loss is None:
            return None
        check_loss("loss", loss)
        return torch.as_tensor(loss).detach().to(self.rho.device, torch.float64).reshape(())

    def _shapes(self) -> Shapes:
        return [tuple(tuple(p.shape) for p in group["params"]) for group in self.param_groups]

    def _refuse_between_passes(self, what: str) -> None:
        if self._pending is not None:
            raise RuntimeError(
                f"{what} between first_step() and second_step(), while the weights are perturbed: finish the "
                "step with second_step() or abandon it with restore()"
            )

    def _warn_if_stuck(self, report: dict[str, float]) -> None:
        for bound in ("rho_min", "rho_max"):
            share = report[f"share_at_{bound}"]
            if share > _STUCK_SHARE:
                warnings.warn(
                    f"the radius was clamped at {bound} = {getattr(self._radius, bound):g} in {share:.0%} of "
                    f'the steps, so it is in effect constant. Raise {bound}, or choose a radius="constant"',
                    stacklevel=3,
                )


class _Pending(NamedTuple):
    """What has to survive from the first pass to the second; by parameter what the sweeps wrote."""

    first_grads: dict[Tensor, Tensor] | None
    backups: list[sweeps.Backup]
    statistics: dict[str, Tensor] | None
    statistics_before: dict[str, Tensor] | None
    loss: Tensor | None
    rho: Tensor
    q0: Tensor
    step: Tensor
    scaling: Scaling


class _LastStep(NamedTuple):
    """Scalars of the last step, on the device; q0, step and dots with the factor of a scaler, valid 0 if left out."""

    h: Tensor
    rho: Tensor
    q0: Tensor
    step: Tensor
    dots: Tensor
    scale: Tensor
    valid: Tensor


def _call(closure: Callable[[], Tensor | float]) -> Tensor | float:
    loss = closure()
    check_loss("the value the closure returned", loss)
    return loss
