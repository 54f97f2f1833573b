"""Codes by the error of the layer's output."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tasks.quant.calibrate import calibrate
from tasks.quant.prepare import QuantLayer, convert, prepare
from tasks.quant.rounding import descend, learn_rounding


def error(w: Tensor, h: Tensor, s: Tensor, q: Tensor) -> Tensor:
    """(w - s q) h (w - s q)^T per output, by the definition."""
    r = w - s[..., None] * q
    return torch.einsum("god,gde,goe->go", r, h, r)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two groups of three outputs of four inputs that go together, in 2 bits."""
    torch.manual_seed(0)
    u = torch.randn(2, 4, 50).double() + 2 * torch.randn(2, 1, 50).double()
    w, s = torch.randn(2, 3, 4).double(), torch.full((2, 3), 0.7).double()
    return w, u @ u.mT / 50, s, (w / s[..., None]).round().clamp(-2, 1)


def test_descent_never_raises_the_error_and_ends_where_no_code_wants_to_move() -> None:
    """By trying all moves. Kills: a wrong sign of the gradient, a group's moments taken for another's."""
    w, h, s, start = problem()
    q = descend(w, h, s, start, -2, 1, sweeps=20)
    assert q.min() >= -2 and q.max() <= 1
    before, after = error(w, h, s, start), error(w, h, s, q)
    assert (after <= before + 1e-9).all() and after.sum() < 0.9 * before.sum()
    for j, value in itertools.product(range(4), range(-2, 2)):
        other = q.clone()
        other[:, :, j] = value
        assert (error(w, h, s, other) >= after - 1e-9).all()


LAYERS = {  # built after the seed
    "convolution": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
    "linear": lambda: nn.Linear(7, 5),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layers_output_comes_nearer(kind: str) -> None:
    """And the weight is what its codes stand for, on the grid. Kills: columns in another order than the weight's."""
    torch.manual_seed(0)
    # correlated inputs, for which rounding to the nearest is far from best
    x = torch.randn(64, 4, 7, 7) * 0.3 + torch.randn(64, 1, 1, 1)
    model = prepare(nn.Sequential(LAYERS[kind]()), weight_bits=2, act_bits=8, first_last_bits=None)
    calibrate(model, [x])
    layer = model[0]  # type: ignore[index]
    assert isinstance(layer, QuantLayer)
    reference = convert(model)
    with torch.no_grad():
        exact, nearest = reference(x), model(x)
        learn_rounding(model, reference, x.split(20))
        learned = model(x)
        ratio = float((learned - exact).square().mean() / (nearest - exact).square().mean())
        assert ratio < 0.8, ratio
        torch.testing.assert_close(layer.weight_quantizer(layer.layer.weight), layer.layer.weight)


def test_a_weight_of_two_layers_keeps_the_nearest_codes() -> None:
    """Kills: codes for one layer that are the other's weight."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    low: Any = prepare(model, weight_bits=2, act_bits=8, first_last_bits=None)
    x = torch.randn(30, 4)
    calibrate(low, [x])
    learn_rounding(low, convert(low), [x])
    assert torch.equal(low[0].layer.weight, model[0].weight) and low[0].layer.weight is low[2].layer.weight
    assert not torch.equal(low[3].layer.weight, model[3].weight)


def test_statistics_are_as_they_were() -> None:
    """They are put right on the way alone. Kills: statistics that are corrected twice, by this and by the correction."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    x = torch.randn(16, 3, 6, 6)
    low: Any = prepare(model, weight_bits=3, act_bits=3, first_last_bits=None)
    calibrate(low, [x])
    learn_rounding(low, convert(low), [x])
    assert torch.equal(low[1].running_mean, torch.zeros(4)) and torch.equal(low[1].running_var, torch.ones(4))
