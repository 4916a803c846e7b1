"""What a step reads and writes: the floor of the method, counted, and the table it is counted from, tried out."""

import pytest
import torch
from torch import nn

from asga.ops import backend, backends
from asga.ops.sam_traffic import LISTS, CountTraffic
from asga.optim import ASGA

VALUES = 50_000
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
ADAM = {"lr": 0.1, "weight_decay": 1e-4}
# Where the update is not fused: what torch's own SGD moves as well, gradient, weight and momentum in, two of them out.
UNFUSED = 5

per_backend = pytest.mark.parametrize("name", ["reference", *(["cpu"] if backends.unavailable("cpu") is None else [])])


def count(base, base_options, **options) -> tuple[float, dict[str, int]]:
    """Parameter-sized reads and writes of one step, and the calls of operators."""
    params = [nn.Parameter(torch.ones(VALUES)), nn.Parameter(torch.ones(2, VALUES))]
    optimizer = ASGA(params, base, **base_options, **options)

    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    optimizer.step(closure)
    with CountTraffic() as counted:
        optimizer.step(closure)
    # The mark of `asga.optim._sweeps.perturb` is a tensor of one value.
    return round(counted.bytes / (4 * 3 * VALUES), 3), dict(counted.calls)


@pytest.mark.parametrize(
    ("base", "base_options", "extra"),
    [
        pytest.param(torch.optim.SGD, SGD, 0, id="SGD"),
        pytest.param(torch.optim.SGD, {"lr": 0.1}, -2, id="SGD without momentum"),
        pytest.param(torch.optim.AdamW, ADAM, 2, id="AdamW"),
    ],
)
@pytest.mark.parametrize(
    ("options", "floor"),
    [
        pytest.param({"variant": "sam", "products": "none"}, 10, id="SAM"),
        pytest.param({"variant": "aligned", "products": "none"}, 11, id="aligned"),
        pytest.param({"variant": "gsam", "products": "none"}, 13, id="projection"),
        pytest.param({"variant": "conflict", "max_norm": 1.0, "products": "none"}, 13, id="projection and clipping"),
        pytest.param({"variant": "aligned", "products": "guard"}, 12, id="aligned, g1 checked"),
        pytest.param({"variant": "aligned"}, 13, id="aligned, all products"),
        pytest.param({"variant": "sam", "adaptive": True, "products": "none"}, 11, id="ASAM"),
    ],
)
def test_a_step_moves_no_more_than_the_floor(base, base_options, extra, options, floor):
    moved, calls = count(base, base_options, **options)
    assert moved == floor + extra
    sweeps = 3 if options.get("products") == "none" and "max_norm" not in options else 4
    sweeps = 4 if options["variant"] in ("gsam", "conflict") else sweeps
    assert sum(calls.values()) == sweeps + 2, "the sweeps and two blocks of scalars, whatever the number of tensors"


def test_an_unfused_step_writes_the_combined_gradient():
    moved, _ = count(torch.optim.SGD, SGD, variant="aligned", products="none", fused=False)
    # Backup, g0 and g1 are read, weight and d written.
    assert moved == 11 - UNFUSED - 1 + 5


def test_unperturbed_tensors_are_neither_measured_nor_backed_up():
    params = [nn.Parameter(torch.ones(VALUES))]
    optimizer = ASGA([{"params": params, "rho_scale": 0.0}], variant="sam", products="none", lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = params[0].square().sum()
        loss.backward()
        return loss

    with CountTraffic() as counted:
        optimizer.step(closure)
    assert round(counted.bytes / (4 * VALUES), 3) == 3  # theta and g1 in, theta out


def arguments(step, name):
    """A call of an operator in which every list of the table matters."""
    scalar = torch.tensor(0.3, dtype=torch.float64)
    valid = torch.tensor([0.3, 0.6, 1.0, 0.0], dtype=torch.float64)
    lists = {"params": step.params, "backups": step.backups, "first_grads": step.first_grads, "grads": step.grads}
    buffers = {"momentum_buffers": step.momentum_buffers}
    moments = {"exp_avgs": step.momentum_buffers, "exp_avg_sqs": step.exp_avg_sqs}
    scales = [1.0] * len(step.params)
    some = {key: lists[key] for key in ("params", "first_grads", "grads")}
    calls = {
        "sam_norm": ({"params": step.params, "grads": step.grads}, (scales, True)),
        "sam_perturb": (lists, (scalar, scales, True)),
        "sam_dots": (some, (scales, True)),
        "sam_combine": (lists, (valid,)),
        "sam_sgd": ({**lists, **buffers}, (valid, None, 0.1, 0.9, 0.01, False)),
        "sam_adam": ({**lists, **moments}, (step.steps, valid, None, 0.1, 0.9, 0.99, 1e-8, 0.01, False)),
    }
    return calls[name]


@per_backend
@pytest.mark.parametrize("operator", LISTS)
def test_the_table_says_what_is_read_and_what_is_written(make_step, bits_of, operator, name):
    run = getattr(torch.ops.asga, operator).default
    reads, writes = LISTS[operator]

    def results(tamper=None):
        step = make_step(layouts=("1025 values", "channels_last"))
        lists, rest = arguments(step, operator)
        if tamper is not None:
            for tensor in lists[tamper]:
                tensor.mul_(2)
        before = {key: bits_of(tensors) for key, tensors in lists.items()}
        with backend(name):
            returned = run(*lists.values(), *rest)
        after = {key: bits_of(tensors) for key, tensors in lists.items()}
        changed = {key for key in lists if before[key] != after[key]}
        return changed, (bits_of(returned), {key: after[key] for key in writes})

    written, expected = results()
    assert written == set(writes)
    lists, _ = arguments(make_step(layouts=("7 values",)), operator)
    for key in lists:
        assert (results(tamper=key)[1] != expected) == (key in reads), key
