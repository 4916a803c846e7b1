"""An optimizer around another one: what they share, and what is saved."""

import abc

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from asga.optim._checks import Shapes, check_group, check_maximize, check_memory, check_same_options, check_same_shapes
from asga.optim._pending import Pending


class WrappingOptimizer(Optimizer, abc.ABC):
    """Parameter groups and state are those of `base_optimizer`, so that schedulers reach it and its state dicts fit.

    Args:
        params: Parameters or groups of them.
        base_optimizer: The class to build.
        base_kwargs: For it.

    Attributes:
        base_optimizer: The optimizer inside.
    """

    _pending: Pending | None = None  # the step between its passes

    def __init__(self, params: ParamsT, base_optimizer: type[Optimizer], base_kwargs: dict[str, object]) -> None:
        super().__init__(params, {"rho_scale": 1.0})
        self.base_optimizer = base_optimizer(self.param_groups, **base_kwargs)
        self.defaults.update(self.base_optimizer.defaults)
        self._share_with_base()
        for group in self.param_groups:
            check_maximize(group)

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
            ValueError: The state is not of an ASGA optimizer, or of other parameters or another base optimizer. Nothing
                changes.
            RuntimeError: Called between `first_step` and `second_step`.
        """
        self._refuse_between_passes("load_state_dict()")
        state_dict = dict(state_dict)
        own = state_dict.pop("asga", None)
        missing = {"shapes", *self._own_state()} - set(own or ())
        if missing:
            raise ValueError(
                f"state_dict is not from an ASGA optimizer, or from one with another rule of the radius: its entry "
                f"'asga' lacks {sorted(missing)}"
            )
        for name in self._own_state():
            if not torch.as_tensor(own[name]).isfinite().all():
                raise ValueError(f"state_dict holds {name} = {own[name]} in its entry 'asga'; it must be finite")
        if missing := {"state", "param_groups"} - set(state_dict):
            raise ValueError(f"state_dict lacks {sorted(missing)} of the base optimizer")
        check_same_shapes([tuple(map(tuple, group)) for group in own["shapes"]], self._shapes())
        check_same_options(state_dict["param_groups"], self.base_optimizer)
        self.base_optimizer.load_state_dict(state_dict)
        self._share_with_base()
        self._load_own_state(own)

    def add_param_group(self, param_group: dict[str, object]) -> None:
        """Add a parameter group, here and in the base optimizer; see the class for `rho_scale`.

        Raises:
            RuntimeError: Called between `first_step` and `second_step`.
            TypeError: A parameter is sparse or complex.
            ValueError: `rho_scale` is negative or not finite, the group sets `maximize`, or parameters share memory.
        """
        self._refuse_between_passes("add_param_group()")
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
            check_memory(self.param_groups)
            if "base_optimizer" in vars(self):
                self._check_base()
        except Exception:
            self.param_groups.pop()
            raise

    @abc.abstractmethod
    def _own_state(self) -> dict[str, Tensor]:
        """What is saved beside the state of the base optimizer; not copies."""

    def _load_own_state(self, saved: dict[str, Tensor]) -> None:
        """Take over what was saved of `_own_state`."""
        for name, value in self._own_state().items():
            value.copy_(saved[name])

    def _refuse_between_passes(self, what: str) -> None:
        if self._pending is not None:
            raise RuntimeError(
                f"{what} between first_step() and second_step(), while the weights are perturbed: finish the "
                "step with second_step() or abandon it with restore()"
            )

    @abc.abstractmethod
    def _check_base(self) -> None:
        """Raise a ValueError where the groups of the base optimizer, the last one new, do not do."""

    def _share_with_base(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _shapes(self) -> Shapes:
        return [tuple(tuple(p.shape) for p in group["params"]) for group in self.param_groups]
