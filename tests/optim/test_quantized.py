"""perturb="quantized": the perturbation is added behind the quantizers."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from asga.nn import QuantLinear
from asga.optim import ASGA

RHO, LR = 0.3, 0.1


@pytest.fixture(params=[2, "fp4"], ids=["int2", "fp4"])
def layer(request):
    """One linear layer of low-bit weights and float inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = QuantLinear(4, 3, bias=False, weight_bits=request.param, act_bits=None)
    made.weight_quantizer.scale.requires_grad_(False)
    return made


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)


def loss_of(weight, batch):
    return (batch[0] @ weight.t() - batch[1]).square().mean()


def optimizer_of(layer, **options):
    settings = {"radius": "constant", "rho_max": RHO, "lr": LR, "variant": "sam", "fused": False}
    return ASGA([layer.weight], perturb="quantized", model=layer, **(settings | options))


def take(layer, optimizer, batch, after=lambda number: None):
    number = 0

    def closure():
        nonlocal number
        number += 1
        optimizer.zero_grad()
        loss = (layer(batch[0]) - batch[1]).square().mean()
        loss.backward()
        after(number)
        return loss

    return optimizer.step(closure)


def test_pass_2_sees_the_quantized_weight_plus_the_step_along_its_gradient(layer, batch):
    optimizer, latent = optimizer_of(layer), layer.weight.detach().clone()
    quantized = layer.weight_quantizer(layer.weight).detach().requires_grad_()
    (g0,) = torch.autograd.grad(loss_of(quantized, batch), quantized)
    moved = (quantized + RHO * g0 / g0.norm()).detach().requires_grad_()
    loss1 = loss_of(moved, batch)
    (g1,) = torch.autograd.grad(loss1, moved)
    start = take(layer, optimizer, batch)
    report = optimizer.diagnostics()
    assert report["h"] == pytest.approx((loss1 - start).item(), rel=1e-4)
    assert report["kappa"] == pytest.approx(
        (((g0 * g1).sum() - g0.square().sum()) / (g0.square().sum() * RHO / g0.norm())).item(), rel=1e-4
    )
    # The gradient at the latent weight is that of pass 2 where it passes the quantizer.
    passed = layer.weight.grad != 0
    torch.testing.assert_close(layer.weight.grad[passed], g1[passed])
    torch.testing.assert_close(layer.weight.detach(), latent - LR * layer.weight.grad)


def test_the_latent_weight_stays_and_nothing_is_added_after_the_step(layer, batch):
    optimizer, latent = optimizer_of(layer, lr=0.0), layer.weight.detach().clone()
    expected = layer(batch[0]).detach()

    def check(number):
        assert torch.equal(layer.weight.detach(), latent)

    take(layer, optimizer, batch, check)
    assert torch.equal(layer(batch[0]), expected)


@pytest.mark.parametrize("number", [1, 2], ids=["pass 1", "pass 2"])
def test_a_bad_gradient_skips_the_step(layer, batch, number):
    optimizer, latent = optimizer_of(layer), layer.weight.detach().clone()

    def spoil(current):
        if current == number:
            layer.weight.grad[0, 0] = math.inf
            for grad in optimizer._quantized._grads.values():
                grad[0, 0] = math.inf

    take(layer, optimizer, batch, spoil)
    assert torch.equal(layer.weight.detach(), latent)
    assert optimizer.diagnostics()["skipped"] == 1


def test_an_exception_in_pass_2_ends_the_step(layer, batch):
    optimizer, expected = optimizer_of(layer), layer(batch[0]).detach()

    def interrupt(number):
        if number == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take(layer, optimizer, batch, interrupt)
    assert torch.equal(layer(batch[0]), expected)


def test_what_it_needs():
    plain = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="needs the model"):
        ASGA(plain.parameters(), perturb="quantized")
    with pytest.raises(ValueError, match="no quantized weight"):
        ASGA(plain.parameters(), perturb="quantized", model=plain)
    with pytest.raises(ValueError, match="adaptive=False"):
        ASGA(plain.parameters(), perturb="quantized", model=plain, adaptive=True)
    with pytest.raises(ValueError, match="perturb is 'both'"):
        ASGA(plain.parameters(), perturb="both")


def test_a_model_that_was_compiled_before_is_refused(layer, batch):
    """Its graph has no hooks: nothing would be perturbed."""
    before = layer.weight.detach().clone()
    compiled = torch.compile(layer, backend="eager")
    compiled(batch[0]).sum().backward()
    optimizer = optimizer_of(layer)
    optimizer.zero_grad()
    loss = (compiled(batch[0]) - batch[1]).square().mean()
    loss.backward()
    with pytest.raises(RuntimeError, match="no quantized weight got a gradient in pass 1: the model must run in eager"):
        optimizer.first_step(loss)
    assert torch.equal(layer.weight.detach(), before)


def test_a_pass_2_without_the_perturbation_is_refused(layer, batch):
    before, optimizer = layer.weight.detach().clone(), optimizer_of(layer)
    loss = (layer(batch[0]) - batch[1]).square().mean()
    loss.backward()
    optimizer.first_step(loss)
    (batch[0] @ layer.weight.t()).sum().backward()
    with pytest.raises(RuntimeError, match="pass 2 ran without any perturbation"):
        optimizer.second_step()
    assert torch.equal(layer.weight.detach(), before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_activations_change_nothing(layer, batch, reentrant):
    """Reentrant checkpointing computes the loss without gradients, and everything once more for them."""
    twin, reports = copy.deepcopy(layer), []
    for one, wrap in ((layer, lambda x: checkpoint(layer, x, use_reentrant=reentrant)), (twin, twin)):
        optimizer = optimizer_of(one)
        for part in (optimizer.first_step, optimizer.second_step):
            loss = (wrap(batch[0].clone().requires_grad_()) - batch[1]).square().mean()
            loss.backward()
            part(loss)
        reports.append(optimizer.diagnostics())
    assert reports[0] == pytest.approx(reports[1], rel=1e-6)
    assert reports[0]["h"] > 0.01
    assert torch.equal(layer.weight, twin.weight)


def test_copies_of_the_model_have_no_part_in_a_step(layer, batch):
    """As for an average of the weights."""
    optimizer = optimizer_of(layer)
    average = torch.optim.swa_utils.AveragedModel(layer)
    quiet = average.module(batch[0]).detach()
    loss = (layer(batch[0]) - batch[1]).square().mean()
    loss.backward()
    optimizer.first_step(loss)
    assert torch.equal(average.module(batch[0]), quiet)
    loss = (layer(batch[0]) - batch[1]).square().mean()
    loss.backward()
    optimizer.second_step(loss)
    average.update_parameters(layer)
    assert torch.equal(average.module.weight, layer.weight)


def test_an_infinity_in_pass_1_leaves_pass_2_finite(layer, batch):
    optimizer, before, losses = optimizer_of(layer), layer.weight.detach().clone(), []
    for number, part in enumerate((optimizer.first_step, optimizer.second_step)):
        loss = (layer(batch[0]) - batch[1]).square().mean()
        losses.append(loss.item())
        (loss * (math.inf if number == 0 else 1.0)).backward()
        part(loss)
    assert losses[0] == losses[1]
    assert optimizer.last_skipped
    assert torch.equal(layer.weight, before)
