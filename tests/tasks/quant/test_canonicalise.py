"""The same outputs from a network without negative gammas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tasks.quant.canonicalise import canonicalise
from tests.tasks.quant.test_prepare import build, quantized


def random_norms(model: nn.Module) -> None:
    """BatchNorm as training may leave it, with a few gammas of zero."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight).data[0] = 0.0
            nn.init.normal_(m.bias)
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2.0)


def negative(model: nn.Module) -> dict[str, int]:
    """BatchNorms with negative gammas, and how many."""
    counts = {n: int((m.weight < 0).sum()) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "resnetv2_50"])
def test_canonical_signs_are_exact(name: str) -> None:
    """Same outputs to the last bit, in both modes. Kills: a forgotten running mean, a norm whose input others use too."""
    model, x = build(name, 32, {})
    random_norms(model)
    before = negative(model)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    twin = canonicalise(model, x)
    assert [m.training for m in twin.modules()] == modes
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(twin.eval()(x), model.eval()(x))
        if "efficientnet" not in name:  # drop path draws
            assert torch.equal(twin.train()(x), model.train()(x))
    if name == "resnetv2_50":  # norms before convolutions: those behind an addition must stay
        assert 0 < len(negative(twin)) < len(before)
    else:
        assert not negative(twin)
        if name == "resnet18":
            assert torch.equal(twin.conv1.weight[0], model.conv1.weight[0])
        assert all(m.weight[0] == 0 for m in twin.modules() if isinstance(m, nn.BatchNorm2d))


class Awkward(nn.Module):
    """A bias, a norm used twice, a convolution that something else sees as well, and a norm on the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.BatchNorm2d(3)
        self.biased, self.bn1 = nn.Conv2d(3, 3, 3, bias=True), nn.BatchNorm2d(3)
        self.twice, self.bn2 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.seen, self.bn3 = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.biased(self.image(x)))
        x = self.bn2(self.bn2(self.twice(x)))
        y = self.seen(x)
        return self.bn3(y) + y.relu()


def test_canonical_signs_only_where_exact() -> None:
    """Kills: pairing by name or order; a bias that keeps its sign."""
    torch.manual_seed(0)
    model, x = Awkward(), torch.randn(2, 3, 8, 8)
    random_norms(model)
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.copy_(torch.tensor([-1.0, 0.0, 0.5]))
    twin = canonicalise(model.requires_grad_(False), x)
    assert set(negative(twin)) == {"image", "bn2", "bn3"}
    assert torch.equal(twin.biased.bias[:1], -model.biased.bias[:1]) and not any(p.requires_grad for p in twin.parameters())
    assert torch.equal(twin.eval()(x), model.eval()(x))


def test_a_prepared_model_is_refused() -> None:
    """The error says what to do. Kills: signs turned behind quantizers that know the old ones."""
    with pytest.raises(ValueError, match="canonicalise the float model first"):
        canonicalise(quantized(nn.Linear(3, 3)), torch.ones(1, 3))
