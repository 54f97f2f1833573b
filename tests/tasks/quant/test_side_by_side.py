"""Two networks in one forward pass, and the columns of a layer's input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

from tasks.quant.calibrate import calibrate
from tasks.quant.columns import columns
from tasks.quant.prepare import QuantLayer, convert, prepare
from tasks.quant.side_by_side import side_by_side


def pair(model: nn.Module, x: Tensor) -> tuple[nn.Module, nn.Module]:
    """Calibrated, and float."""
    low = prepare(model.eval(), weight_bits=3, act_bits=4, first_last_bits=None)
    calibrate(low, [x])
    return low, convert(low)


class Tokens(nn.Module):
    """A convolution with BatchNorm, tokens, and a linear layer on a table that is no input."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 2, stride=2, bias=False), nn.BatchNorm2d(6)
        self.of_table, self.head = nn.Linear(6, 6), nn.Linear(6, 4)
        self.register_buffer("table", torch.randn(1, 6))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        tokens = self.norm(self.conv(x)).relu().flatten(2).mT + self.of_table(self.table)
        return self.head(tokens).mean(1)


def test_each_half_is_what_its_network_sees() -> None:
    """And everything is as it was. Kills: quantized inputs in the float half, a forward that stays patched."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, 4, 4)
    low, reference = pair(Tokens(), x)
    low.train()
    wanted: dict[str, Tensor] = {}
    for model, kind in ((low, "q"), (reference, "f")):
        for name in ("conv", "norm", "head"):
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, x, key=name + kind: wanted.__setitem__(key, x[0].detach())  # type: ignore[misc]
            )
    low.eval()(x)
    reference(x)
    asked = dict(wanted)
    low.train()
    seen: dict[str, Any] = {}
    side_by_side(low, reference, x, lambda name, module, f, q: seen.update({name: (module, f, q)}))
    assert list(seen) == ["conv", "norm", "head"]
    for name, (module, f, q) in seen.items():
        assert module is low.get_submodule(name)
        torch.testing.assert_close(f, asked[name + "f"])
        if name != "head":  # a table that has no half for each network is float for both
            torch.testing.assert_close(q, asked[name + "q"])
    assert low.training and not any("forward" in vars(m) for m in low.modules())


def test_what_is_fitted_is_what_the_next_layers_see() -> None:
    """Kills: a fit that comes after the layer has run."""
    x = torch.randn(5, 4)
    low, reference = pair(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), x)
    inputs: list[Tensor] = []

    def fit(name: str, module: Any, f: Tensor, q: Tensor) -> None:
        inputs.append(q)
        module.layer.bias.add_(100)

    side_by_side(low, reference, x, fit)
    assert inputs[1].min() > 50


class Mixing(nn.Module):
    """Takes the mean of the batch away."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Logits that depend on the other inputs."""
        y = self.layer(x)
        return y - y.mean(0)


def test_a_network_that_mixes_its_inputs() -> None:
    """Is refused. Kills: layers fitted to what no network sees."""
    x = torch.randn(5, 4)
    low, reference = pair(Mixing(), x)
    with pytest.raises(ValueError, match="Mixing mixes the inputs of a batch"):
        side_by_side(low, reference, x, lambda *_: None)


LAYERS: dict[str, Any] = {
    "plain": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2),
    "dilated groups": lambda: nn.Conv2d(4, 6, 3, dilation=2, groups=2, bias=False),
    "same": lambda: Conv2dSame(4, 6, 3, stride=2),
    "reflected": lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    "by name": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "one dimension": lambda: nn.Conv1d(4, 6, 3),
    "linear": lambda: nn.Linear(7, 6),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_columns_times_weights_are_the_output(kind: str) -> None:
    """At all places, where there are few. Kills: another order than the weight's, lost padding, a bias in the columns."""
    torch.manual_seed(0)
    layer = QuantLayer(LAYERS[kind](), 4, 4)
    x = torch.randn(3, 4, 7) if kind == "one dimension" else torch.randn(3, 4, 7, 7)
    inner: Any = layer.layer
    with torch.no_grad():
        (u,) = columns(layer, x)
        w = inner.weight.reshape(len(u), -1, u.shape[1])
        y = (w @ u).flatten(0, 1)
        exact = inner(x)
        exact = exact - (
            0 if inner.bias is None else inner.bias if kind == "linear" else inner.bias.view(-1, *[1] * (x.dim() - 2))
        )
    wanted = exact.flatten(0, -2).mT if kind == "linear" else exact.movedim(1, 0).flatten(1)
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    assert "bias" not in vars(inner)


def test_columns_of_many_places() -> None:
    """A sample, the same of every input. Kills: pairs that are not of one place."""
    layer = QuantLayer(nn.Conv2d(2, 3, 1), 4, 4)
    x = torch.randn(2, 2, 20, 20)
    one, other = columns(layer, x, 2 * x)
    assert one.shape == (1, 2, 128)
    assert torch.equal(2 * one, other)
