"""Ascents on a fake-quantized model: before rounding, after rounding, and the figures that compare the two."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from arsam import ARSAM, sampling
from tasks.quant.calibrate import calibrate
from tasks.quant.prepare import QuantLayer, parameter_groups, prepare
from tasks.quant.sharpness import AfterRounding, effect


def quantized(after_rounding: bool) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    images = torch.randn(16, 6)
    model = prepare(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), weight_bits=3, act_bits=4, first_last_bits=None)
    calibrate(model, [images])
    if after_rounding:
        for layer in model.modules():
            if isinstance(layer, QuantLayer):
                layer.weight_quantizer = AfterRounding(layer.weight_quantizer)  # type: ignore[assignment]
    return model.train(), images


def loss_of(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).square().mean()


def test_after_rounding_moves_the_quantized_weight() -> None:
    """Q(w) + e exactly. Kills: e rounded away, e added twice, w requantized."""
    model, images = quantized(after_rounding=True)
    layer = model[0]  # type: ignore[index]
    plain = layer.weight_quantizer(layer.layer.weight).detach().clone()
    optimizer = ARSAM(SGD(parameter_groups(model), lr=0.1), rho=0.05, sampling=sampling.Always(), model=model)
    before = layer.layer.weight.detach().clone()
    optimizer.zero_grad()
    loss_of(model, images).backward()
    with optimizer.perturb():
        e = layer.layer.weight.detach() - before
        torch.testing.assert_close(layer.weight_quantizer(layer.layer.weight).detach(), plain + e)
        loss_of(model, images).backward()
    assert e.abs().max() > 0
    assert torch.equal(layer.layer.weight, before)
    assert torch.equal(layer.weight_quantizer(layer.layer.weight), plain)


def test_gradient_goes_to_the_latent_weight() -> None:
    """Straight through, as without perturbation: the gradient at Q(w) + e reaches w."""
    model, images = quantized(after_rounding=True)
    optimizer = ARSAM(SGD(parameter_groups(model), lr=0.1), rho=0.5, sampling=sampling.Always(), model=model)
    before = [p.detach().clone() for p in model.parameters()]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, images)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert all(not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True) if p.dim() == 2)
    assert all(p.isfinite().all() for p in model.parameters())


def test_scales_are_never_perturbed() -> None:
    """Their group has rho 0. Kills: the group lost on the way to the optimizer."""
    model, images = quantized(after_rounding=False)
    optimizer = ARSAM(SGD(parameter_groups(model), lr=0.1), rho=5.0, sampling=sampling.Always(), model=model)
    loss_of(model, images).backward()
    scales = {n: p.detach().clone() for n, p in model.named_parameters() if "quantizer" in n}
    with optimizer.perturb():
        assert scales
        for name, p in model.named_parameters():
            if name in scales:
                assert torch.equal(p, scales[name]), name


@pytest.mark.parametrize("after_rounding", [False, True])
def test_effect(after_rounding: bool) -> None:
    """No length, no effect; a small latent step changes few codes, a quantized one raises the loss; the model stays."""
    model, images = quantized(after_rounding)
    before = copy.deepcopy(model.state_dict())
    nothing = effect(model, lambda m: loss_of(m, images), 0.0)
    assert nothing == {"codes_changed": 0.0, "loss_rise_latent": 0.0, "loss_rise_quantized": 0.0}
    small, large = (effect(model, lambda m: loss_of(m, images), rho) for rho in (1e-3, 1.0))
    assert small["codes_changed"] < large["codes_changed"]
    assert large["codes_changed"] > 0.05
    assert 0 < small["loss_rise_quantized"] < large["loss_rise_quantized"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
