"""Optimizers of others, each stepped as ours are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from arsam import ARSAM, functional
from arsam.reuse import Decayed
from arsam.sampling import Always
from benchmarks.compare.controls import RandomVector, Reversed
from benchmarks.compare.rivals import PACKAGED, HalfBatch, MomentumSAM, StaleSAM, WeightAverage


def problem() -> tuple[nn.Module, Callable[[Any], Callable[[], Tensor]]]:
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    inputs, labels = torch.randn(8, 6), torch.arange(8) % 3

    def closure_of(optimizer: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            size = round(getattr(model, "part", 1.0) * len(labels))
            seen.append((size, model.weight.detach().clone()))
            loss = nn.functional.cross_entropy(model(inputs[:size]), labels[:size])
            loss.backward()
            return loss

        return closure

    seen: list[tuple[int, Tensor]] = []
    model.seen = seen  # type: ignore[assignment]
    return model, closure_of


@pytest.mark.parametrize(("kind", "base"), [(MomentumSAM, SGD), (MomentumSAM, Adam), (StaleSAM, SGD)])
def test_one_pass_rivals(kind: Any, base: Any) -> None:
    """e of norm rho in the rule's direction, weights restored, one pass. Kills: the other sign, a gradient taken at w."""
    model, closure_of = problem()
    settings = {"momentum": 0.9} if base is SGD else {}
    inner = base(model.parameters(), lr=0.1, **settings)
    rival = kind(inner, model, rho=0.3)
    closure = closure_of(rival)
    for step in range(3):
        before = model.weight.detach().clone()
        state = inner.state.get(model.weight, {})
        momentum = state.get("momentum_buffer", state.get("exp_avg"))
        direction = -momentum if kind is MomentumSAM and step else model.weight.grad
        direction = None if direction is None else direction.clone()
        assert rival.step(closure).ndim == 0
        _, seen = model.seen[-1]  # type: ignore[index]
        if step:
            e = seen - before
            assert float((e * direction).sum() / e.norm() / direction.norm()) == pytest.approx(1, abs=1e-4)
            assert float(e.norm()) <= 0.3 + 1e-5
        else:
            assert torch.equal(seen, before)
    assert len(model.seen) == 3  # type: ignore[arg-type]


def test_half_batch() -> None:
    """The second pass alone sees half. Kills: halves in the first pass, a part that outlasts the pass."""
    model, closure_of = problem()
    optimizer = HalfBatch(SGD(model.parameters(), lr=0.1), model=model, rho=0.1, sampling=Always(), reuse=Decayed())
    optimizer.step(closure_of(optimizer))
    optimizer.step(closure_of(optimizer))
    assert [size for size, _ in model.seen] == [8, 4, 8, 4]  # type: ignore[union-attr]


def test_weight_average() -> None:
    """The mean of the last epochs' weights. Kills: a mean over steps, one from the start."""
    model, closure_of = problem()
    rival = WeightAverage(SGD(model.parameters(), lr=0.1), model, steps_per_epoch=2, total_steps=8, share=0.5)
    ends = []
    for _ in range(8):
        rival.step(closure_of(rival))
        ends.append(model.weight.detach().clone())
    plain, closure_of = problem()
    base = SGD(plain.parameters(), lr=0.1)
    weights = []
    for _ in range(8):
        base.step(closure_of(base))
        weights.append(plain.weight.detach().clone())
    torch.testing.assert_close(ends[-1], (weights[5] + weights[7]) / 2)
    assert torch.equal(ends[5], weights[5])


@pytest.mark.parametrize("place", range(len(PACKAGED)), ids=[name for name, _ in PACKAGED])
def test_the_sam_family_of_another_package(place: int) -> None:
    """Two passes on every step, and the base's settings. Kills: a first pass left out, a base without momentum."""
    pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
    name, kind = PACKAGED[place]
    model, closure_of = problem()
    rival = kind(SGD(model.parameters(), lr=0.1, momentum=0.9), model, rho=0.1, name=name)
    for _ in range(3):
        loss = rival.step(closure_of(rival))
    assert loss.ndim == 0
    assert len(model.seen) == 6  # type: ignore[arg-type]
    if name == "SAM":
        ours, closure_of = problem()
        optimizer = ARSAM(SGD(ours.parameters(), lr=0.1, momentum=0.9), rho=0.1, sampling=Always(), model=ours)
        for _ in range(3):
            optimizer.step(closure_of(optimizer))
        torch.testing.assert_close(model.weight, ours.weight)


def test_controls() -> None:
    """Noise with the norm of each tensor's PSF, and the PSF reversed. Kills: a global norm, a PSF left as it is."""
    g, g_s = [torch.ones(50), torch.zeros(3)], [torch.full((50,), 3.0), torch.ones(3)]
    kept = [x.clone() for x in g]
    RandomVector().keep_(kept, g_s)
    for x, a, b in zip(kept, g, g_s, strict=True):
        assert float(x.norm()) == pytest.approx(float((b - a).norm()), rel=1e-5)
    assert abs(float(kept[0] @ (g_s[0] - g[0]) / functional.global_norm([kept[0]]) ** 2)) < 0.6
    kept = [x.clone() for x in g]
    Reversed().keep_(kept, g_s)
    assert kept[0].tolist() == [-2.0] * 50
