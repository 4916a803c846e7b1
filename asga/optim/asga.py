"""The ASGA optimizer: two passes over a batch, one step of any base optimizer with an aligned gradient."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from asga.optim import _sweeps as sweeps
from asga.optim._checks import check_base, check_choice, check_factor, check_loss, check_radius
from asga.optim._decision import climb, decide
from asga.optim._fused import reason_not_to_fuse, update
from asga.optim._lists import collect, may_be_of_a_graph
from asga.optim._memory import Memory
from asga.optim._options import Options
from asga.optim._pending import copy_back, write_loss
from asga.optim._quantized import QuantizedWeights
from asga.optim._ranks import Ranks
from asga.optim._report import LastStep
from asga.optim._scaling import Witness
from asga.optim._wrapping import WrappingOptimizer
from asga.optim.batchnorm import restore_running_statistics, save_running_statistics
from asga.optim.radius import RULES, Radius


class ASGA(WrappingOptimizer):
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
            the losses are finite. Variants gsam and conflict, `max_norm`, steps without losses, and groups with
            rho_scale=0, whose g0 nothing else looks at, need them all.
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

    # Of the methods below that torch.compile leaves out of its graphs, torch's own decorator, which its optimizers use:
    # torch.compiler.disable would import the compiler, seconds, with this module.

    _in_step = False  # whether `step` is running

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
        options = Options(variant, alpha, alpha_mode, adaptive, max_norm, products, local_ascent)
        check_choice("radius", radius, RULES)
        check_choice("perturb", perturb, ("latent", "quantized"))
        check_radius(rho_min, rho_max, radius)
        if model is not None and not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}; a torch.nn.Module or None is needed")
        if perturb == "quantized" and (model is None or adaptive):
            raise ValueError("perturb is 'quantized'; that needs the model, and adaptive=False")

        super().__init__(params, base_optimizer, base_kwargs)
        self.options, self.fused, self.model, self.scaler = options, fused, model, scaler
        self._check_base()
        device = next((p.device for p in self._params()), None)
        if device is None:
            raise ValueError("params holds no parameter: every group is empty")
        lr = self.param_groups[0].get("lr", 1.0)
        if radius == "proportional" and lr == 0:
            raise ValueError(f"lr is {lr}; a radius proportional to it needs another start")
        self._radius = Radius(rho_min, rho_max, rule=radius, device=device, lr=lr)
        self._ranks, self._witness, self._memory = Ranks(process_group), Witness(device), Memory()
        self._last = LastStep.none(device)
        self._quantized, self._still = None, frozenset()
        if perturb == "quantized":
            scales = {p: group["rho_scale"] for group in self.param_groups for p in group["params"]}
            self._quantized = QuantizedWeights(model, scales)
            # The weights behind the quantizers are perturbed, these stay where they are.
            self._still = self._quantized.latent

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

    @torch._disable_dynamo
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
        # torch runs the hooks of a step around this method: those that it calls leave them out.
        self._in_step = True
        try:
            try:
                first_loss = _call(closure)
                if isinstance(first_loss, Tensor) and may_be_of_a_graph(first_loss):
                    first_loss = first_loss.detach().clone()
                self.first_step(first_loss)
            except BaseException:
                if before is not None:
                    restore_running_statistics(self.model, before)
                raise
            self._pending.statistics_before = before
            self.second_step(_call(closure), zero_grad=False)
        except BaseException:
            self.restore()
            raise
        finally:
            self._in_step = False
        return first_loss

    @torch._disable_dynamo
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
        self._check_base()
        self._witness.check_ready(self.scaler, self)
        self._run_hooks(self._optimizer_step_pre_hooks)
        losses = self.rho.new_empty(1 if loss is None else 2)
        if loss is not None:
            write_loss(loss, losses[:1])
        local = self.options.local_ascent
        lists = collect(self.param_groups, apart=False, may_keep=zero_grad and not local, still=self._still)
        if local and any(one.shards for one in lists):
            raise ValueError("local_ascent is True, but parameters are sharded: no process has a gradient of its own")
        self._radius.before_step(self.param_groups[0])
        self._pending = pending = climb(lists, losses, self.scaler, *self._rules)
        try:
            if self.model is not None:
                pending.statistics = save_running_statistics(self.model)
            for one in lists:
                pending.perturb(one, self._memory, adaptive=self.options.adaptive)
            if self._quantized is not None:
                self._quantized.perturb(pending.step)
            if zero_grad:
                self.zero_grad()
            # Copies in low precision that an autocast around both passes has made of the weights as they were.
            torch.clear_autocast_cache()
        except BaseException:
            self.restore()
            raise

    @torch._disable_dynamo
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
            pending.add_loss(loss)
            if self._quantized is not None:
                self._quantized.check_perturbed()
            lists = collect(self.param_groups, apart=True, still=self._still)
            backups = pending.old_weights()
            if self.options.local_ascent:
                pending.average_first_grads([p for p in self._params() if p.requires_grad], self._ranks)
            dots, coefficients = decide(pending, lists, backups, *self._rules)
            fused = self.reason_not_fused is None
            for one in lists:
                first_grads = pending.first_grads_of(one) if self.options.combines else []
                old = one.parallel(backups, one.params)
                if fused:
                    update(self.base_optimizer, one, old, first_grads, coefficients)
                else:
                    sweeps.combine(one, old, first_grads, coefficients)
            seen = {owner for one in lists for owner in one.owners}
            copy_back({owner: kept for owner, kept in backups.items() if owner not in seen})
            pending.restore_statistics(self.model, coefficients)
        except BaseException:
            self.restore()
            raise
        self._finish()
        self._last = LastStep.of(pending, dots, coefficients)
        if pending.scale is not None:
            self._witness.report(self.scaler, coefficients[2] != 0)
        # The one synchronization: the step of an arbitrary optimizer can only be left out by the host.
        if not fused and coefficients[2].item() != 0:
            self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()
        # What a scheduler looks at to tell that steps come before it; it only wraps `step` itself.
        self._opt_called = True
        self._run_hooks(self._optimizer_step_post_hooks)

    @torch._disable_dynamo
    @torch.no_grad()
    def restore(self) -> None:
        """Abandon a step between its passes: the weights get their old bits back. Otherwise does nothing.

        `step` calls it by itself; loops of `first_step` and `second_step` that catch exceptions call it.
        """
        if self._pending is not None:
            self._pending.restore(self.model)
            self._finish()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients, as any torch optimizer."""
        super().zero_grad(set_to_none)
        if self._quantized is not None:
            self._quantized.clear()

    def scale_radius(self, factor: float) -> None:
        """Multiply the radius and `rho_max`, and `rho_min` where it would lie above, for when steps go too far.

        The bounds are no part of `state_dict`: whoever scales them does so again after building the optimizer anew,
        before `load_state_dict`. A step captured in a CUDA graph keeps the bounds of its capture.

        Raises:
            ValueError: `factor` is not positive and finite.
            RuntimeError: Called between `first_step` and `second_step`.
        """
        self._refuse_between_passes("scale_radius()")
        check_factor(factor)
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
        return self._last.report(self._radius)

    def __getstate__(self) -> dict[str, object]:
        self._refuse_between_passes("copying or pickling")
        if self._quantized is not None:
            raise TypeError("an optimizer that perturbs quantized weights is tied to its model and cannot be copied")
        kept = ("base_optimizer", "options", "fused", "model", "scaler", "_radius", "_ranks", "_witness", "_last")
        own = {name: getattr(self, name) for name in (*kept, "_quantized", "_still")}
        return {**super().__getstate__(), **own, "_memory": Memory()}

    def _finish(self) -> None:
        """The step is over."""
        self._pending = None
        torch.clear_autocast_cache()
        if self._quantized is not None:
            self._quantized.restore()

    def _run_hooks(self, hooks: Mapping[int, Callable[..., object]]) -> None:
        """The hooks of a step that is written out: before its first part, or after its second."""
        if not self._in_step:
            for hook in hooks.values():
                hook(self, (), {})

    @property
    def _rules(self) -> tuple[Options, Radius, Ranks, QuantizedWeights | None]:
        return self.options, self._radius, self._ranks, self._quantized

    def _own_state(self) -> dict[str, Tensor]:
        return self._radius.state()

    def _load_own_state(self, saved: dict[str, Tensor]) -> None:
        super()._load_own_state(saved)
        self._radius.bound()

    def _check_base(self) -> None:
        if self.fused and (reason := reason_not_to_fuse(self.base_optimizer)) is not None:
            raise ValueError(f"fused is True, but {reason}")


def _call(closure: Callable[[], Tensor | float]) -> Tensor | float:
    loss = closure()
    check_loss("the value the closure returned", loss)
    return loss
