"""Step sizes and statistics from a few batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tasks.quant.calibrate import calibrate, reestimate_batch_norm
from tasks.quant.prepare import QuantLayer, prepare


def small() -> nn.Module:
    """Conv, BN, ReLU, dropout, conv, whose last layer sees no negative values."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, momentum=0.3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )


def data(count: int = 4) -> list[Tensor]:
    """Batches of one size."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 9, 9, generator=generator) for _ in range(count)]


def quantized(**bits: int) -> nn.Module:
    """The small network, prepared."""
    return prepare(small(), weight_bits=4, act_bits=4, first_last_bits=None, **bits)


def test_ranges_of_the_float_model() -> None:
    """Min-max over all batches, of activations and weights. Kills: the last batch alone; inputs that are quantized already."""
    model = quantized()
    calibrate(model, data(), method="minmax")
    first, last = model[0], model[4]
    assert isinstance(first, QuantLayer) and isinstance(last, QuantLayer)
    assert first.input_quantizer.signed and not last.input_quantizer.signed
    pixels = torch.cat(data())
    assert first.input_quantizer.scale.item() == pytest.approx(max(pixels.max().item() / 7, -pixels.min().item() / 8))
    hidden = small().eval()[:4](pixels)
    assert last.input_quantizer.scale.item() == pytest.approx(hidden.max().item() / 15, rel=1e-5)
    weight = first.layer.weight.detach().flatten(1)
    torch.testing.assert_close(
        first.weight_quantizer.scale.detach(), torch.maximum(weight.amax(1) / 7, weight.amin(1) / -8), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("method", ["lsq", "mse", "percentile", "minmax"])
@pytest.mark.parametrize("bits", [3, 8])
def test_methods(method: str, bits: int) -> None:
    """Each leaves a working model; least squares has the least error. Kills: a method that is not passed on."""
    model = prepare(small(), weight_bits=bits, act_bits=bits, first_last_bits=None)
    calibrate(model, data(), method=method, percentile=99.0)
    layer = model[0]
    assert isinstance(layer, QuantLayer)
    pixels = torch.cat(data())
    error = (layer.input_quantizer(pixels) - pixels).detach().square().mean()
    layer.input_quantizer.initialise(pixels, "mse")
    assert error >= 0.99 * (layer.input_quantizer(pixels) - pixels).detach().square().mean()
    assert model(pixels).isfinite().all()


def test_calibration_touches_nothing_else() -> None:
    """Kills: a mode, a switch, a hook or a statistic that is left changed; randomness that follows the global generator."""
    model = quantized().train()
    model[3].eval()
    first = model[0]
    assert isinstance(first, QuantLayer)
    first.weight_quantizer.enabled = False
    modes = [m.training for m in model.modules()]
    mean = model[1].running_mean.clone()
    big = [torch.randn(64, 3, 20, 20)]
    calibrate(model, big)
    assert [m.training for m in model.modules()] == modes
    assert not first.weight_quantizer.enabled and first.input_quantizer.enabled
    assert not first.input_quantizer._forward_pre_hooks
    assert torch.equal(model[1].running_mean, mean)
    scales = [p.clone() for n, p in model.named_parameters() if n.endswith("scale")]
    torch.randn(3)
    calibrate(model, big)
    again = [p for n, p in model.named_parameters() if n.endswith("scale")]
    assert all(torch.equal(a, b) for a, b in zip(scales, again, strict=True))
    calibrate(model, big, method="minmax")  # of all values, though not all are kept
    assert first.input_quantizer.scale.item() == pytest.approx(max(big[0].max().item() / 7, -big[0].min().item() / 8))


def test_ragged_batches_weigh_what_they_hold() -> None:
    """One loud input in a batch of its own. Kills: as many values of a batch of one as of a batch of 31."""
    torch.manual_seed(0)
    x = torch.rand(32, 3, 40, 40)
    x[31] *= 9
    steps = []
    for sizes in ([32], [31, 1]):
        model = prepare(nn.Sequential(nn.Conv2d(3, 4, 1)), weight_bits=4, act_bits=4, first_last_bits=None)
        calibrate(model, x.split(sizes), method="mse")
        steps.append(model[0].input_quantizer.scale.item())  # type: ignore[union-attr, index]
    assert steps[1] == pytest.approx(steps[0], rel=0.1)


def test_an_input_that_no_batch_reached() -> None:
    """Kills: a calibration that needs every layer."""
    model = prepare(nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 2)]), weight_bits=4, act_bits=4)
    model.forward = lambda x: model[0](x)
    calibrate(model, [torch.ones(2, 3)])
    assert isinstance(model[1], QuantLayer)
    assert not model[1].input_quantizer.initialised and model[1].weight_quantizer.initialised


@pytest.mark.parametrize("prepared", [False, True])
def test_batch_norm_is_the_average_over_batches(prepared: bool) -> None:
    """Mean of means, mean of variances, dropout off. Kills: momentum, a start from the old value, dropout."""
    model = quantized() if prepared else small()
    if prepared:
        calibrate(model, data())
    with torch.no_grad():
        for norm in (model[1], model[5]):
            norm.running_mean.fill_(7)
            norm.num_batches_tracked.fill_(5)
    first = [model[0](x) for x in data()]
    model.train()
    model[5].eval()
    reestimate_batch_norm(model, iter(data()), prior=0)
    norm = model[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in first]).mean(0).detach())
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in first]).mean(0).detach())
    assert norm.momentum == 0.3
    assert model[0].training and not model[5].training
    # behind dropout: what comes of batch statistics before it, and of no masks
    second = []
    for x in first:
        h = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), keepdim=True, correction=0) + 1e-5).sqrt()
        second.append(model[4](h.relu()).mean((0, 2, 3)))
    torch.testing.assert_close(
        model[5].running_mean, torch.stack(second).mean(0).detach(), rtol=1e-3, atol=1e-2 if prepared else 1e-4
    )


def test_errors_leave_the_model() -> None:
    """Kills: statistics that are reset before it is known that there is data; a mode that an exception leaves."""
    model = quantized()
    mean = model[1].running_mean.fill_(7).clone()
    with pytest.raises(ValueError, match="at least one batch"):
        reestimate_batch_norm(model, [])
    assert torch.equal(model[1].running_mean, mean)
    assert model[1].momentum == 0.3 and model[1].training
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(model, [])
    assert all(m.enabled for m in (model[0].input_quantizer, model[0].weight_quantizer))
    with pytest.raises(ValueError, match="Sequential has no quantized layer: calibrate what `prepare` returns"):
        calibrate(small(), data())
    with pytest.raises(ValueError, match="lsq, minmax, percentile, mse"):
        calibrate(model, data(), method="kl")


def test_statistics_are_weighted_and_blended() -> None:
    """Ragged batches count by their size, old statistics as the prior. Kills: a batch of one that counts like others."""
    torch.manual_seed(0)
    x = torch.randn(37, 3, 4, 4) * 2 + 1
    for prior, share in ((0, 0.0), (37, 0.5)):
        norm = nn.BatchNorm2d(3)
        nn.init.constant_(norm.running_mean, 5.0)  # type: ignore[arg-type]
        reestimate_batch_norm(norm, x.split([32, 4, 1]), prior=prior)
        expected = share * 5 + (1 - share) * x.mean((0, 2, 3))
        torch.testing.assert_close(norm.running_mean, expected)
