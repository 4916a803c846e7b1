"""Schemas and fakes of the fused ASGA step, once for all backends; `asga.ops.sam_reference` says what they compute.

What all of them have in common:

- Lists are parallel: entry i of each belongs to parameter i. One call takes tensors of one device: parameters of one
  dtype (float32, bfloat16, float16 or float64), backups, momenta and moments of the same, gradients of one dtype, which
  may be another. Shapes agree within an entry, strides need not.
- Arithmetic is float32, or float64 for float64 parameters, without contraction into fused multiply-adds: what is
  written has the same bits on every backend. Sums (`sam_norm`, `sam_dots`) are float32 (float64) within a block and
  float64 across blocks, in an order that depends on the sizes alone: every run gives the same bits.
- Scalars are float64 tensors on the device and are not read by the host, so a step neither waits for a GPU nor breaks
  its capture in a graph.
- ``first_grads`` (g0): no entry at all where its coefficient is known to be zero; an entry without elements counts as
  zeros. A parameter with ``rho_scales[i] == 0`` stays where it is and may be its own backup.

``coefficients`` is what `sam_coefficients` returns: ``[c0, c1, valid, h]``.
"""

import torch

from asga.ops.library import library

OPERATORS = (
    "sam_norm",
    "sam_ascent_step",
    "sam_perturb",
    "sam_dots",
    "sam_coefficients",
    "sam_combine",
    "sam_sgd",
    "sam_adam",
)

# The variants by the number that `sam_coefficients` takes: strings leak in torch's stable ABI.
VARIANTS = ("sam", "aligned", "gsam", "conflict")

# The counters that `sam_coefficients` moves, in the order of its argument `counts`.
COUNTS = ("updates", "at_rho_min", "at_rho_max", "steps", "skipped")

library.define("sam_norm(Tensor[] params, Tensor[] grads, float[] rho_scales, bool adaptive) -> Tensor")
library.define("sam_ascent_step(Tensor q0, Tensor rho, Tensor? grad_scale, float shift, bool relative) -> Tensor")
library.define(
    "sam_perturb(Tensor(a!)[] params, Tensor(b!)[] backups, Tensor(c!)[] first_grads, Tensor[] grads, Tensor step, "
    "float[] rho_scales, bool adaptive) -> ()"
)
library.define(
    "sam_dots(Tensor[] params, Tensor[] first_grads, Tensor[] grads, float[] rho_scales, bool adaptive) -> Tensor"
)
library.define(
    "sam_coefficients(Tensor q0, Tensor step, Tensor? dots, Tensor losses, Tensor? grad_scale, Tensor? found_inf, "
    "Tensor(a!) rho, Tensor(b!) counts, int variant, float weight, float? max_norm, bool follow_gap, float rho_min, "
    "float rho_max) -> Tensor"
)
library.define(
    "sam_combine(Tensor(a!)[] params, Tensor[] backups, Tensor[] first_grads, Tensor(b!)[] grads, "
    "Tensor coefficients) -> ()"
)
library.define(
    "sam_sgd(Tensor(a!)[] params, Tensor[] backups, Tensor[] first_grads, Tensor[] grads, "
    "Tensor(b!)[] momentum_buffers, Tensor coefficients, Tensor? lr_tensor, float lr, float momentum, "
    "float weight_decay, bool nesterov) -> ()"
)
library.define(
    "sam_adam(Tensor(a!)[] params, Tensor[] backups, Tensor[] first_grads, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, Tensor coefficients, Tensor? lr_tensor, float lr, float beta1, "
    "float beta2, float eps, float weight_decay, bool decoupled) -> ()"
)


@torch.library.register_fake("asga::sam_norm", lib=library)
def _(params, grads, rho_scales, adaptive):
    return grads[0].new_empty((), dtype=torch.float64)


@torch.library.register_fake("asga::sam_ascent_step", lib=library)
def _(q0, rho, grad_scale, shift, relative):
    return torch.empty_like(q0)


@torch.library.register_fake("asga::sam_dots", lib=library)
def _(params, first_grads, grads, rho_scales, adaptive):
    return grads[0].new_empty(4, dtype=torch.float64)


@torch.library.register_fake("asga::sam_coefficients", lib=library)
def _(q0, *rest):
    return q0.new_empty(4)


def _writes_only(*args) -> None:
    """Nothing is returned: the results are in the arguments."""


for _name in ("sam_perturb", "sam_combine", "sam_sgd", "sam_adam"):
    torch.library.register_fake(f"asga::{_name}", _writes_only, lib=library)
del _name
