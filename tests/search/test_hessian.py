import pytest
import torch
from torch import nn
from torch.nn import functional

from asga import SearchSpace, prepare
from asga.nn import calibrate
from asga.search import hessian_sensitivity

SPACE = SearchSpace(weight_bits=(2, 3, 8), act_bits=(2, 4), first_last=None)


def test_is_the_formula_where_the_hessian_is_known():
    """A quadratic loss of a diagonal layer and of one-hot inputs has a diagonal Hessian: any signs give its trace."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    weight = torch.diag(torch.tensor([1.0, 2.0, 0.5]))
    model[0].weight.data.copy_(weight)
    inputs = torch.tensor([[1.0, 0, 0], [0, 0.7, 0], [0, 0, 3.0], [0, 2.0, 0]])
    batches = [(inputs, torch.zeros(4, 3))]
    loss_fn = lambda outputs, labels: outputs.square().sum(1).mean()  # noqa: E731
    found = hessian_sensitivity(model, SPACE, batches, loss_fn=loss_fn, probes=1)["0"]
    mixed = prepare(model, SPACE).eval()
    calibrate(mixed, batches)
    # By the weight: 2 x_j^2 for each of three outputs; by the input of one sample: 2 w_j^2.
    trace = {"weight": 3 * 2 * inputs.square().sum(1).mean(), "act": 2 * weight.square().sum()}
    for side, tensor, increases in (("weight", weight, found.weight), ("act", inputs, found.act)):
        quantizer = getattr(mixed[0], f"{side}_quantizer")
        for k, increase in enumerate(increases):
            squares = (quantizer.candidate(tensor, k).detach() - tensor).square().mean()
            assert increase == pytest.approx((trace[side] * squares / 2).item(), rel=1e-5)


def test_signs_give_the_trace_on_average(tiny_net, labeled_batches):
    """Of the Hessian by the input of a layer, sample by sample."""
    model, batches = tiny_net().eval(), labeled_batches(1, 3)
    space = SearchSpace(weight_bits=(2, 3, 8), act_bits=(2, 4), pinned={"conv2": 8})
    torch.manual_seed(0)
    found = hessian_sensitivity(model, space, batches, probes=100)["conv3"].act[0]
    images, labels = batches[0]

    def rest(x: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(model.fc(torch.relu(model.conv3(x)).mean((2, 3))), label)

    x = torch.relu(model.bn2(model.conv2(torch.relu(model.bn1(model.conv1(images)))))).detach()
    traces = []
    for one, label in zip(x, labels, strict=True):
        hessian = torch.autograd.functional.hessian(
            lambda flat, y=label: rest(flat.view(1, 8, 4, 4), y[None]), one.flatten()
        )
        traces.append(hessian.trace())
    mixed = prepare(model, SPACE).eval()
    calibrate(mixed, batches)
    squares = (mixed.conv3.act_quantizer.candidate(x, 0).detach() - x).square().mean()
    assert found == pytest.approx((torch.stack(traces).mean() * squares / 2).item(), rel=0.1)


def test_a_layer_called_twice_and_one_without_gradient(twice_net, labeled_batches):
    torch.manual_seed(0)
    found = hessian_sensitivity(twice_net(), SPACE, labeled_batches(2), probes=50)
    assert found["side"] == ((0, 0, 0), (0, 0))
    assert all(value > 0 for value in (*found["stem"].weight, *found["twice"].act))


def test_a_tied_weight_counts_once(labeled_batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    batches = labeled_batches(1)
    model(batches[0][0])
    model[5].weight = model[3].weight
    found = hessian_sensitivity(model, SPACE, batches, probes=4)
    assert found["3"].weight[0] > 0
    assert found["5"].weight == (0, 0, 0)
    assert found["5"].act[0] > 0


def test_a_loss_without_curvature_is_zero(labeled_batches):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    space = SearchSpace(weight_bits=(2, 3), act_bits=(4,), first_last=None, pinned={"1": 8})
    found = hessian_sensitivity(model, space, labeled_batches(1), loss_fn=lambda outputs, labels: outputs.sum())
    assert found["3"] == ((0, 0), (0,))


def test_fused_attention(labeled_batches):
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.fc = nn.Linear(8, 24), nn.Linear(8, 3)

        def forward(self, x):
            q, k, v = self.qkv(x.squeeze(1)).chunk(3, -1)
            return self.fc(functional.scaled_dot_product_attention(q, k, v).mean(1))

    found = hessian_sensitivity(Attention(), SPACE, labeled_batches(1))
    assert found["qkv"].weight[0] > 0


def test_the_model_is_left_alone(tiny_net, labeled_batches, bits_of):
    model = tiny_net()
    before = bits_of(model.state_dict())
    torch.manual_seed(0)
    found = hessian_sensitivity(model, SPACE, labeled_batches(1))
    assert bits_of(model.state_dict()) == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    torch.manual_seed(0)
    assert hessian_sensitivity(model, SPACE, labeled_batches(1)) == found


def test_probes_must_be_positive(tiny_net, labeled_batches):
    with pytest.raises(ValueError, match="probes is 0"):
        hessian_sensitivity(tiny_net(), SPACE, labeled_batches(1), probes=0)
