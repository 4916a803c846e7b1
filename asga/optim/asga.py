"""The ASGA optimizer: two passes over a batch, one step of any base optimizer with an aligned gradient."""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from asga.optim import _passes as passes
from asga.optim._checks import (
    Shapes,
    check_alpha,
    check_base,
    check_choice,
    check_dense,
    check_group,
    check_loss,
    check_maximize,
    check_radius,
    check_same_shapes,
    describe,
)
from asga.optim.batchnorm import restore_running_statistics, save_running_statistics
from asga.optim.radius import Radius

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
    nothing but the counters: no parameter, no state of the base optimizer, no radius. `step` also undoes what
    pass 1 did to the running statistics of `model`; a loop of `first_step` and `second_step`, whose pass 1 is
    over before the optimizer hears of it, is left with them. Since only the host can leave out the step of an
    arbitrary optimizer, this costs the one host synchronization of a step.

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
        radius: "adaptive" or "constant".
        alpha_mode: For aligned and conflict: "relative" as in the table, in [0, 1), or "absolute" as
            published, ``s = rho / ||g0|| - alpha``, any alpha >= 0.
        max_norm: Clip d to this norm, as `torch.nn.utils.clip_grad_norm_`. None: no clipping.
        model: A module whose normalization layers keep the running statistics of pass 1; those of pass 2 are
            undone. Without it, running statistics move twice a step.
        **base_kwargs: For `base_optimizer`: lr, momentum, weight_decay ...

    Raises:
        TypeError: `base_optimizer` or `model` is of the wrong kind, or a parameter is sparse or complex.
        ValueError: An option or parameter group is out of range, or there is no parameter.

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
        radius: str = "adaptive",
        alpha_mode: str = "relative",
        max_norm: float | None = None,
        model: nn.Module | None = None,
        **base_kwargs: object,
    ) -> None:
        check_base(base_optimizer)
        check_choice("variant", variant, tuple(_DEFAULT_ALPHA))
        check_choice("radius", radius, ("adaptive", "constant"))
        check_choice("alpha_mode", alpha_mode, ("relative", "absolute"))
        check_radius(rho_min, rho_max, radius)
        alpha = _DEFAULT_ALPHA[variant] if alpha is None else alpha
        check_alpha(alpha, variant, alpha_mode)
        if max_norm is not None and not 0 < max_norm < math.inf:
            raise ValueError(f"max_norm is {max_norm}; it must be positive and finite, or None")
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module or None is needed")

        super().__init__(params, {"rho_scale": 1.0})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self.defaults.update(self.base_optimizer.defaults)
        self._share_with_base()
        for group in self.param_groups:
            check_maximize(group)
        self.variant, self.alpha, self.alpha_mode = variant, alpha, alpha_mode
        self.adaptive, self.max_norm, self.model = adaptive, max_norm, model

        device = next((p.device for group in self.param_groups for p in group["params"]), None)
        if device is None:
            raise ValueError("params holds no parameter: every group is empty")
        self._radius = Radius(rho_min, rho_max, adaptive=radius == "adaptive", device=device)
        self._steps, self._skipped = torch.zeros(2, dtype=torch.int64, device=device).unbind()
        unknown = torch.full((), math.nan, dtype=torch.float64, device=device)
        self._last = _LastStep(unknown, unknown, unknown, unknown, passes.GradientDots(*[unknown] * 4))

    @property
    def rho(self) -> Tensor:
        """The radius of the next step: 0-dim float64 on the device, not to be written to."""
        return self._radius.rho

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor | float] | None = None) -> Tensor | float:
        """Make one step from a closure that is called twice.

        Whatever is raised between the passes, KeyboardInterrupt included, leaves the weights (and the running
        statistics of `model`) restored.

        Args:
            closure: Clears the gradients, computes the loss of a batch, calls backward and returns the loss.

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
            zero_grad: Clear the gradients for the second pass.

        Raises:
            RuntimeError: No parameter has a gradient, or `second_step` is due.
            TypeError: A gradient is sparse, or the loss is not a number. Nothing has been perturbed then.
            ValueError: The loss has more than one value.
        """
        self._refuse_between_passes("first_step()")
        loss = self._as_scalar(loss)
        # Copies: zero_grad and the second backward may write into the very same memory.
        buckets = [bucket._replace(grads=[g.clone() for g in bucket.grads]) for bucket in self._buckets()]
        rho = self.rho.clone()
        q0 = passes.ascent_norm(buckets, self.adaptive, rho.device)
        shift = 0.0 if self.variant == "gsam" else self.alpha
        step = passes.ascent_step(q0, rho, shift, self.alpha_mode == "relative")
        perturbed = [bucket for bucket in buckets if bucket.rho_scale > 0]
        self._pending = _Pending(
            first_grads={p: g for bucket in buckets for p, g in zip(bucket.params, bucket.grads, strict=True)},
            backups=[(bucket.params, [p.clone() for p in bucket.params]) for bucket in perturbed],
            statistics=None if self.model is None else save_running_statistics(self.model),
            statistics_before=None,
            loss=loss,
            rho=rho,
            q0=q0,
            step=step,
        )
        try:
            for bucket in perturbed:
                passes.perturb(bucket, step, self.adaptive)
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
            zero_grad: Clear the gradients. If False, `.grad` holds d afterwards.

        Raises:
            RuntimeError: `first_step` has not been called, or no parameter has a gradient.
            TypeError: A gradient is sparse, or the loss is not a number. The weights are restored first.
            ValueError: The loss has more than one value. The weights are restored first.
        """
        pending = self._pending
        if pending is None:
            raise RuntimeError("second_step() without first_step(): there is nothing to restore")
        self.restore()
        loss = self._as_scalar(loss)
        buckets = self._buckets()
        # No g0 in pass 1: it counts as 0.
        first_grads = [
            [pending.first_grads[p] if p in pending.first_grads else torch.zeros_like(p) for p in bucket.params]
            for bucket in buckets
        ]
        dots = passes.gradient_dots(buckets, first_grads, self.adaptive, pending.q0.device)
        losses = [value for value in (pending.loss, loss) if value is not None]
        gap = losses[1] - losses[0] if len(losses) == 2 else pending.step * (pending.q0 + dots.ascent) / 2
        finite = torch.isfinite(torch.stack([pending.q0, *dots, *losses])).all()
        c0, c1 = passes.combination(self.variant, dots, self.alpha, self.max_norm)
        for bucket, first in zip(buckets, first_grads, strict=True):
            passes.combine(bucket, first, c0, c1)
        self._radius.update(gap, finite)
        self._steps.add_(1)
        self._skipped.add_(~finite)
        self._last = _LastStep(gap, pending.rho, pending.q0, pending.step, dots)
        # The one synchronization: the step of an arbitrary optimizer can only be left out by the host.
        if finite.item():
            self.base_optimizer.step()
        elif pending.statistics_before is not None:
            restore_running_statistics(self.model, pending.statistics_before)
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
            for params, backups in self._pending.backups:
                passes.restore(params, backups)
            if self._pending.statistics is not None:
                restore_running_statistics(self.model, self._pending.statistics)
        self._pending = None

    def diagnostics(self) -> dict[str, float]:
        """What the last step saw. Reading it synchronizes with the device; not reading it costs nothing.

        Warns when an adaptive radius has been on one of its bounds in more than 90 % of at least 100 steps.

        Returns:
            `h`, the surrogate gap; `rho`; `norm_g0` and `norm_g1`, Euclidean; `cosine` of g0 and g1; `sigma`
            = 2 h / rho^2, the published sharpness, dominated by ||g0|| / rho at small rho; `kappa` =
            (<g0, g1> - ||g0||^2) / (s ||g0||^2), the curvature along the perturbation (products in its metric
            T). NaN before the first step and where undefined. Over all steps: `share_at_rho_min` and
            `share_at_rho_max` of the updates of the radius (0 when constant), and the counts `steps` and
            `skipped`.
        """
        h, rho, q0, step, dots = self._last
        norm_g0, norm_g1 = dots.g0_g0.sqrt(), dots.g1_g1.sqrt()
        updates = self._radius.updates.clamp(min=1)
        values = {
            "h": h,
            "rho": rho,
            "norm_g0": norm_g0,
            "norm_g1": norm_g1,
            "cosine": dots.g0_g1 / (norm_g0 * norm_g1),
            "sigma": 2.0 * h / rho**2,
            "kappa": (dots.ascent - q0) / (q0 * step),
            "share_at_rho_min": self._radius.at_rho_min.double() / updates,
            "share_at_rho_max": self._radius.at_rho_max.double() / updates,
            "steps": self._steps,
            "skipped": self._skipped,
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
        own: dict[str, object] = {name: value.clone() for name, value in self._own_state().items()}
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
        missing = {"shapes", *self._own_state()} - set(own or ())
        if missing:
            raise ValueError(f"state_dict is not from an ASGA optimizer: its entry 'asga' lacks {sorted(missing)}")
        check_same_shapes([tuple(map(tuple, group)) for group in own["shapes"]], self._shapes())
        self.base_optimizer.load_state_dict(state_dict)
        self._share_with_base()
        for name, value in self._own_state().items():
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
        except Exception:
            self.param_groups.pop()
            raise

    def __getstate__(self) -> dict[str, object]:
        self._refuse_between_passes("copying or pickling")
        kept = ("base_optimizer", "variant", "alpha", "alpha_mode", "adaptive", "max_norm", "model")
        internal = ("_radius", "_steps", "_skipped", "_last")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in (*kept, *internal)}}

    def _share_with_base(self) -> None:
        """One list of groups and one state for both, so that schedulers reach the base optimizer."""
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def _buckets(self) -> list[passes.Bucket]:
        """All tensors with a gradient by device, dtype and `rho_scale`, empty ones left out."""
        buckets: dict[tuple[object, ...], passes.Bucket] = {}
        any_gradient = False
        for group in self.param_groups:
            for index, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None:
                    continue
                check_dense(grad, f"the gradient of {describe(group, index)}")
                any_gradient = True
                if param.numel() > 0:
                    key = (param.device, param.dtype, grad.dtype, group["rho_scale"])
                    bucket = buckets.setdefault(key, passes.Bucket([], [], group["rho_scale"]))
                    bucket.params.append(param)
                    bucket.grads.append(grad)
        if not any_gradient:
            raise RuntimeError("no parameter has a gradient: call backward() on the loss first")
        return list(buckets.values())

    def _as_scalar(self, loss: Tensor | float | None) -> Tensor | None:
        if loss is None:
            return None
        check_loss("loss", loss)
        return torch.as_tensor(loss).detach().to(self.rho.device, torch.float64).reshape(())

    def _own_state(self) -> dict[str, Tensor]:
        return {**self._radius.state(), "steps": self._steps, "skipped": self._skipped}

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
    """What has to survive from the first pass to the second."""

    first_grads: dict[Tensor, Tensor]
    backups: list[tuple[list[Tensor], list[Tensor]]]
    statistics: dict[str, Tensor] | None
    statistics_before: dict[str, Tensor] | None
    loss: Tensor | None
    rho: Tensor
    q0: Tensor
    step: Tensor


class _LastStep(NamedTuple):
    """Scalars of the last step, on the device, for `diagnostics`."""

    h: Tensor
    rho: Tensor
    q0: Tensor
    step: Tensor
    dots: passes.GradientDots


def _call(closure: Callable[[], Tensor | float]) -> Tensor | float:
    loss = closure()
    check_loss("the value the closure returned", loss)
    return loss
