"""What a step asks of the device outside of forward and backward: few launches, and nothing that the host waits for.

Every call of a torch operator is recorded. Besides the CPU this runs on a device that does not exist: its tensors have
no values, so that whatever would read one on the host is an error, and every copy between host and device shows.
"""

import json

import pytest
from torch.utils import backend_registration

SOURCE = """
import json, torch
from contextlib import nullcontext
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from asga.optim import ASGA

class Record(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        self.calls.append((func.name(), func.is_view, sorted({t.device.type for t in tensors})))
        return result

def statistics(device):
    model = nn.Module()
    for name in ("running_mean", "running_var"):
        for number in range(3):
            model.add_module(str(number), nn.Module())
            getattr(model, str(number)).register_buffer(name, torch.zeros(2 + number, device=device))
    return model

def record(device, base="SGD", loss="tensor", rate=False, running=False, others=(), **options):
    shapes = ((4, 3), (5,), (2, 2, 2), ())
    params = [nn.Parameter(torch.ones(shape, device=place)) for place in (device, *others) for shape in shapes]
    model = statistics(device) if running else None
    optimizer = ASGA(params, getattr(torch.optim, base), model=model, lr=0.1, **options)
    if rate:
        optimizer.param_groups[0]["lr"] = torch.full((), 0.1, dtype=torch.float64, device=device)
    value = {"tensor": torch.full((), 0.5, device=device), "number": 0.5, "none": None}[loss]
    for _ in range(2):  # the first one makes what the others use again
        calls = []
        for take in (optimizer.first_step, optimizer.second_step):
            for p in params:
                p.grad = torch.full_like(p, 0.25)
            with Record() as mode:
                take(value)
            calls += mode.calls
    return calls

device, cases = json.loads(%r)
if device != "cpu":
    _setup_privateuseone_for_python_backend(device)
with nullcontext() if device == "cpu" else FakeTensorMode():
    print(json.dumps([record(device, **case) for case in cases]))
"""

# Options of `record`, and how many kernels a GPU launches: two for each sum, one for the step counts of Adam, a fill of
# the mark of a perturbation, copies of the radius and of each loss, and one for each other operator.
CASES = {
    "SGD": ({"momentum": 0.9, "weight_decay": 1e-4}, 12),
    "AdamW": ({"base": "AdamW"}, 13),
    "GSAM": ({"variant": "gsam", "momentum": 0.9}, 12),
    "clipped": ({"variant": "conflict", "max_norm": 1.0}, 12),
    "SAM without products": ({"variant": "sam", "products": "none"}, 10),
    "ASAM": ({"variant": "sam", "adaptive": True}, 12),
    "losses as numbers": ({"loss": "number"}, 12),
    "without losses": ({"loss": "none"}, 10),
    "lr as a tensor": ({"rate": True}, 12),
    "proportional radius": ({"radius": "proportional"}, 16),
    "proportional radius, lr as a tensor": ({"radius": "proportional", "rate": True}, 16),
    "running statistics": ({"running": True}, 14),
}
LAUNCHES = {"asga::sam_norm": 2, "asga::sam_dots": 2, "asga::sam_adam": 2}
READS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal"}
ABSENT = "absent"


@pytest.fixture(scope="module", params=["cpu", ABSENT])
def recorded(request, run_python):
    """By case the calls of a step: name, whether it is a view, devices."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices without a backend in C++")
    given = json.dumps([request.param, [options for options, _ in CASES.values()]])
    return request.param, dict(zip(CASES, json.loads(run_python(SOURCE % given)), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_step_launches_few_kernels(recorded, case):
    _, calls = recorded
    launched = [name.partition(".")[0] for name, is_view, _ in calls[case] if not is_view]
    launched = [name for name in launched if not name.startswith(("prim::", "profiler::"))]
    launched = [name for name in launched if name not in ("aten::empty", "aten::new_empty", "aten::empty_like")]
    assert sum(LAUNCHES.get(name, 1) for name in launched) == CASES[case][1], launched


@pytest.mark.parametrize("case", CASES)
def test_a_step_reads_no_value_and_copies_none_between_devices(recorded, case):
    device, calls = recorded
    assert not READS & {name.partition(".")[0] for name, _, _ in calls[case]}
    assert {name for _, _, devices in calls[case] for name in devices} == {device}


def test_parameters_on_several_devices(run_python):
    """Every operator over lists once a device, scalars on that of the first parameter, no value read."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices without a backend in C++")
    cases = [{"others": ["cpu"], "variant": "gsam", "momentum": 0.9}, {"others": ["cpu"], "base": "AdamW"}]
    for case, update in zip(json.loads(run_python(SOURCE % json.dumps([ABSENT, cases]))), ("sgd", "adam"), strict=True):
        assert not READS & {name.partition(".")[0] for name, _, _ in case}
        ours = [(name, devices) for name, _, devices in case if name.startswith("asga::")]
        for operator in ("sam_norm", "sam_perturb", "sam_dots", f"sam_{update}"):
            places = [devices for name, devices in ours if name == f"asga::{operator}"]
            assert sorted(places) == [["absent"], ["cpu"]], operator
        for operator in ("sam_ascent_step", "sam_coefficients"):
            assert [devices for name, devices in ours if name == f"asga::{operator}"] == [["absent"]]


def test_an_unfused_step_reads_one_value(run_python):
    (calls,) = json.loads(run_python(SOURCE % json.dumps(["cpu", [{"fused": False}]])))
    assert [name for name, _, _ in calls if name.partition(".")[0] in READS] == ["aten::_local_scalar_dense"]
