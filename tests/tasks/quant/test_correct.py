"""What rounding has shifted, put right from few pictures."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from tasks.quant.calibrate import calibrate
from tasks.quant.correct import correct_statistics, distance
from tasks.quant.prepare import convert, prepare


def network() -> nn.Sequential:
    """Convolutions with BatchNorm, one with a bias, and a linear layer."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 5),
    )  # fmt: skip
    model.train()(torch.randn(256, 3, 8, 8))
    return model.eval()


def few(shift: float = 0.0) -> Tensor:
    """Pictures that are not those of training."""
    return torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 0.5 + shift


def test_nothing_is_changed_where_nothing_is_rounded() -> None:
    """Whatever the pictures. Kills: statistics of a few pictures taken for the world's, a bias that is corrected twice."""
    model = prepare(network(), weight_bits=8, act_bits=8)
    calibrate(model, [few()])
    for quantizer in [m for m in model.modules() if hasattr(m, "enabled")]:
        quantizer.enabled = False  # type: ignore[assignment]
    before = copy.deepcopy(model.state_dict())
    correct_statistics(model, convert(model), few(shift=3.0).split(7))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=1e-5, rtol=1e-5, msg=name)


def test_shifts_are_put_right() -> None:
    """Fewer bits, a smaller error, and means that fit on the very pictures. Kills: a shift of the wrong sign."""
    model = prepare(network(), weight_bits=2, act_bits=8, first_last_bits=None)
    x = few()
    calibrate(model, [x])
    reference = convert(model)
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        pairs = [(x, reference(x))]
        before = distance(model, pairs)
        correct_statistics(model, reference, [x])
        assert distance(model, pairs) < 0.8 * before
        # the last layer has a bias: its mean over the pictures is the float model's
        torch.testing.assert_close(model(x).mean(0), reference(x).mean(0), atol=1e-4, rtol=1e-4)
    assert [m.training for m in model.modules()] == modes


def test_ragged_batches_weigh_what_they_hold() -> None:
    """Kills: a last batch of one that counts as much as one of twenty-three."""
    biases = []
    for sizes in ([24], [23, 1]):
        model = prepare(nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), weight_bits=2, act_bits=8, first_last_bits=None)
        torch.manual_seed(0)
        nn.init.normal_(model[1].layer.weight)  # type: ignore[union-attr, arg-type, index]
        nn.init.zeros_(model[1].layer.bias)  # type: ignore[union-attr, arg-type, index]
        calibrate(model, [few()])
        correct_statistics(model, convert(model), few().split(sizes))
        biases.append(model[1].layer.bias.clone())  # type: ignore[union-attr, operator, index]
    torch.testing.assert_close(biases[0], biases[1])


class Reused(nn.Module):
    """A convolution and a normalisation that are used twice, on inputs that differ."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 3, 3, padding=1), norm, nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.norm(self.conv(x)).relu()
        return self.head(self.norm(self.conv(2 * x + 1)).mean((2, 3)))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_module_that_is_used_twice(frozen: bool) -> None:
    """Its bias moves by the mean of both uses. Kills: their sum, one use compared with the other, a frozen norm left out."""
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(3) if frozen else nn.BatchNorm2d(3)
    float_model = Reused(norm).eval()
    model: Any = prepare(float_model, weight_bits=2, act_bits=8, first_last_bits=None)
    calibrate(model, [few()])
    reference: Any = convert(model)
    inputs: list[Tensor] = []
    hook = model.conv.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    correct_statistics(model, reference, [few()])
    hook.remove()
    with torch.no_grad():
        answers: list[Tensor] = []
        hook = reference.conv.register_forward_hook(lambda _, __, y: answers.append(y))
        reference(few())
        hook.remove()
        moved = model.conv.layer.bias - reference.conv.bias
        now = [model.conv(x) - moved.view(3, 1, 1) for x in inputs]
    shifts = [(exact - y).mean((0, 2, 3)) for exact, y in zip(answers, now, strict=True)]
    torch.testing.assert_close(moved, (shifts[0] + shifts[1]) / 2, atol=1e-5, rtol=1e-4)
    assert not torch.equal(model.norm.running_var, reference.norm.running_var)


def test_correcting_again_changes_nothing() -> None:
    """Kills: differences that are added to what they were added to before."""
    model = prepare(nn.Sequential(*list(network())[:3]), weight_bits=2, act_bits=8, first_last_bits=None)
    calibrate(model, [few()])
    reference = convert(model)
    correct_statistics(model, reference, [few()])
    once = copy.deepcopy(model.state_dict())
    correct_statistics(model, reference, [few()])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, once[name], msg=name)


def test_a_bias_of_two_layers() -> None:
    """Stays as it is: what fits one does not fit the other. Kills: a shared bias that moves twice."""
    model: Any = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    low: Any = prepare(model, weight_bits=2, act_bits=8, first_last_bits=None)
    calibrate(low, [torch.randn(9, 4)])
    correct_statistics(low, convert(low), [torch.randn(9, 4)])
    assert torch.equal(low[0].layer.bias, model[0].bias)


def test_no_batches() -> None:
    """The error is calibration's own."""
    model = prepare(network(), weight_bits=4, act_bits=4)
    with pytest.raises(ValueError, match="at least one batch"):
        correct_statistics(model, convert(model), [])
