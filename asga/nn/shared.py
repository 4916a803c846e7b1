"""Tensors that a model has under several names: loading must give all of these the same values."""

from collections.abc import Mapping

from torch import Tensor, nn


def refuse_contradictions(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Refuse a state dict with different values for one tensor, of which the last would silently win.

    A hook for ``module.register_load_state_dict_pre_hook``; of the module nothing has been loaded when it is called.
    Tied layers share a weight and, with the same bits, its scales; layers of a group share logits. A checkpoint of the
    same model in which they were separate may have two sets of values.

    Args:
        module: A converted model.
        state_dict: What is about to be loaded, for this module and perhaps others.
        prefix: Of the module's names in it.

    Raises:
        ValueError: There are such values; the message has their names.
    """
    names: dict[Tensor, list[str]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if prefix + name in state_dict and isinstance(tensor, Tensor):
            names.setdefault(tensor, []).append(prefix + name)
    pairs = ((first, other) for first, *others in names.values() for other in others)
    wrong = [pair for pair in pairs if _differ(*(state_dict[name] for name in pair))]
    if wrong:
        listed = "".join(f"\n  {first!r} and {other!r}" for first, other in wrong)
        raise ValueError(
            f"the state dict has different values for what is one tensor of the model:{listed}\nIt is of a model in "
            f"which these are separate: separate them here, too (give layers parameters of their own, or different "
            f"bits), or keep one of the values in the state dict"
        )


def _differ(a: object, b: object) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return False  # torch refuses what is no tensor
    return a.shape != b.shape or bool(((a != b) & ~(a.isnan() & b.isnan())).any())  # any two NaNs are the same
