"""The methods of the searcher."""

from collections.abc import Mapping

# One pass a step; every other trained method makes the two passes of ASGA.
SGD = "sgd"

# By trained method the options of `asga.optim.ASGA` that make it. The fixed radius is the 0.05 that SAM (Foret et al.,
# ICLR 2021) and SAGM (Wang et al., CVPR 2023, the published form of "aligned") use; adaptive radii of a search came
# out several times larger, so give the same `rho_max` to all to compare at one radius.
_FIXED_RADIUS = {"radius": "constant", "rho_max": 0.05}
TRAINED: Mapping[str, Mapping[str, object]] = {
    "asga": {},
    "aligned": {"variant": "aligned", **_FIXED_RADIUS},
    "sam": {"variant": "sam", **_FIXED_RADIUS},
    SGD: {},
}

METHODS: Mapping[str, str] = {
    "asga": "trained with the ASGA step: two passes, aligned gradients, a radius that follows the loss gap",
    "aligned": "trained like asga, with a fixed radius (SAGM)",
    "sam": "trained with sharpness-aware minimization, at a fixed radius",
    "sgd": "trained with plain SGD, one pass a step (EdMIPS, with relaxation softmax)",
    "sensitivity": "not trained: gradients times quantization errors (AutoQuantize)",
    "hawq": "not trained: traces of the Hessian times squared quantization errors (HAWQ-V2)",
    "uniform": "the uniform pair of weight and activation bits that is best after a short fine-tuning",
    "random": "not trained: drawn from all policies within the budget",
}
