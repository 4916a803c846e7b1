"""What can be chosen about a step, and what is allowed."""

from dataclasses import dataclass

from asga._checks import check_number
from asga.ops.sam_library import VARIANTS
from asga.optim._checks import check_alpha, check_choice

# Where `alpha` is not given. Aligned and conflict: a tenth of the ascent step, so that the shift is felt (an
# absolute 0.001 was 1.4 % of the step and changed nothing). GSAM: the default of its authors' code.
_DEFAULT_ALPHA = {"sam": 0.0, "aligned": 0.1, "conflict": 0.1, "gsam": 0.4}


@dataclass(frozen=True)
class Options:
    """Those of `asga.optim.ASGA` by their names there; `alpha` of None becomes the default of the variant.

    Raises:
        ValueError: One is out of range.
    """

    variant: str
    alpha: float | None
    alpha_mode: str
    adaptive: bool
    max_norm: float | None
    products: str
    local_ascent: bool

    def __post_init__(self) -> None:
        check_choice("variant", self.variant, tuple(_DEFAULT_ALPHA))
        check_choice("alpha_mode", self.alpha_mode, ("relative", "absolute"))
        check_choice("products", self.products, ("all", "guard", "none"))
        if self.alpha is None:
            object.__setattr__(self, "alpha", _DEFAULT_ALPHA[self.variant])
        check_alpha(self.alpha, self.variant, self.alpha_mode)
        if self.max_norm is not None:
            check_number("max_norm", self.max_norm)
            if self.max_norm == 0:
                raise ValueError("max_norm is 0.0; it must be positive and finite, or None")

    @property
    def variant_number(self) -> int:
        """As the operators know it."""
        return VARIANTS.index(self.variant)

    @property
    def shift(self) -> float:
        """What alpha takes from the ascent step."""
        return 0.0 if self.variant == "gsam" else self.alpha

    @property
    def combines(self) -> bool:
        """Whether g0 is part of what the base optimizer gets."""
        return self.variant != "sam"

    @property
    def needs_products(self) -> bool:
        """Whether c0 and c1 depend on the dot products."""
        return self.variant in ("gsam", "conflict") or self.max_norm is not None
