"""Loss scaling, accumulation and compilation: what a real loop does around the optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD, AdamW, Optimizer

from arsam import ARSAM, reuse, sampling, scaled_step, scaling
from tests.reference import counts, problem

STEPS = 24
RULES: dict[str, Callable[[], dict[str, Any]]] = {
    "periodic": lambda: {"sampling": sampling.Periodic(4), "reuse": reuse.Decayed(0.8, 3)},
    "auto": lambda: {"passes": 1.25},
    "orthogonal": lambda: {"sampling": sampling.Periodic(3), "reuse": reuse.Orthogonal()},
    "adaptive": lambda: {"sampling": sampling.Adaptive(window=4, blocks=2, warmup=6, alpha=(3.0, 3.0), initial=2.0)},
}


def scaler_of(scale: float, **settings: Any) -> GradScaler:
    return GradScaler("cpu", init_scale=scale, growth_interval=settings.pop("growth_interval", 5), **settings)


def by_helper(optimizer: Optimizer, scaler: GradScaler, loss_of: Callable[[], Tensor]) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of()
        scaler.scale(loss).backward()  # type: ignore[union-attr]
        return loss

    scaled_step(optimizer, closure, scaler)


def by_hand(optimizer: ARSAM, scaler: GradScaler, loss_of: Callable[[], Tensor], clip: float | None = None) -> None:
    """What the README shows, with clipping or without."""
    optimizer.zero_grad()
    scaler.scale(loss_of()).backward()  # type: ignore[union-attr]
    if optimizer.due:
        with optimizer.perturb(scaler if clip else None):
            scaler.scale(loss_of()).backward()  # type: ignore[union-attr]
    if clip:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], clip)
    scaler.step(optimizer)
    scaler.update()


def trained(step: Callable[..., None], scale: float, rule: str = "periodic", **more: Any) -> tuple[list[Tensor], ARSAM]:
    model, loss_of = problem()
    optimizer = ARSAM(AdamW(model.parameters(), lr=1e-2), rho=0.1, **(RULES[rule]() if rule in RULES else more.pop("settings")))
    scaler = scaler_of(scale)
    for _ in range(STEPS):
        step(optimizer, scaler, lambda: loss_of(model), **more)
    return weights(model), optimizer


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def distance(xs: list[Tensor], ys: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(xs, ys, strict=True))


@pytest.mark.parametrize("step", [by_helper, by_hand])
@pytest.mark.parametrize("rule", RULES)
def test_loss_scale_does_not_matter(step: Callable[..., None], rule: str) -> None:
    """Scale 1 and 65536, both growing. Kills: a scaled kept vector, scaled norms in the schedule."""
    plain, first = trained(step, 1.0, rule)
    large, second = trained(step, 65536.0, rule)
    assert distance(plain, large) < 1e-6
    assert counts(first) == counts(second)
    assert 0 < first.stats["ascents"] < STEPS


def test_broken_variant_depends_on_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the units of the kept vector guard against: a variant that leaves it in those of the scaled loss."""
    plain = trained(by_helper, 1.0)[0]
    monkeypatch.setattr(scaling, "unscale_", lambda ascent, inverse: setattr(ascent, "scaled", False))
    assert distance(plain, trained(by_helper, 65536.0)[0]) > 1e-2


def test_clipping_after_the_second_pass() -> None:
    """Kills: a kept vector unscaled twice, or not at all, when the loop unscales."""
    plain, _ = trained(by_hand, 1.0, clip=0.05)
    large, _ = trained(by_hand, 65536.0, clip=0.05)
    assert distance(plain, large) < 1e-6
    assert distance(plain, trained(by_hand, 1.0)[0]) > 1e-4, "the clipping must matter"


def test_gradient_norm_rule_by_helper() -> None:
    """Kills: AE-SAM's norm of the scaled gradient, compared over a growing scale."""
    runs = [trained(by_helper, s, "", settings={"sampling": sampling.GradientNorm(-1, 1, STEPS)}) for s in (1.0, 65536.0)]
    assert counts(runs[0][1]) == counts(runs[1][1])
    assert 0 < runs[0][1].stats["ascents"] < STEPS
    assert distance(runs[0][0], runs[1][0]) < 1e-6


def test_helper_steps_any_optimizer() -> None:
    """Kills: a helper that asks every optimizer whether an ascent is due."""
    model, loss_of = problem()
    other = copy.deepcopy(model)
    scaled, plain = SGD(model.parameters(), lr=0.1), SGD(other.parameters(), lr=0.1)
    scaler = scaler_of(1024.0)
    for _ in range(5):
        by_helper(scaled, scaler, lambda: loss_of(model))
        plain.zero_grad()
        loss_of(other).backward()
        plain.step()
    assert distance(weights(model), weights(other)) < 1e-12


@pytest.mark.parametrize("step", [by_helper, by_hand])
@pytest.mark.parametrize("bad_pass", [0, 1], ids=["first pass", "second pass"])
def test_inf_skips_the_whole_step(step: Callable[..., None], bad_pass: int) -> None:
    """Kills: weights left perturbed or moved, a kept vector of infs, a schedule that counts the step, a scale that stays."""
    model, loss_of = problem()
    optimizer = ARSAM(AdamW(model.parameters(), lr=1e-2), rho=0.1, sampling=sampling.Periodic(2), model=model)
    scaler = scaler_of(1024.0)
    for _ in range(4):  # an ascent is due next, and a kept vector is in use
        step(optimizer, scaler, lambda: loss_of(model))
    before = copy.deepcopy((optimizer.state_dict(), model.state_dict()))
    scale = scaler.get_scale()
    passes = 0

    def overflowing() -> Tensor:
        nonlocal passes
        passes += 1
        return loss_of(model) * (float("inf") if passes - 1 == bad_pass else 1.0)

    step(optimizer, scaler, overflowing)
    assert passes == 2
    assert scaler.get_scale() == scale / 2
    torch.testing.assert_close(model.state_dict(), before[1], atol=0, rtol=0)
    after = optimizer.state_dict()
    assert after["arsam"].pop("rules") == before[0]["arsam"].pop("rules")
    torch.testing.assert_close(after, before[0], atol=0, rtol=0)
    step(optimizer, scaler, lambda: loss_of(model))
    assert optimizer.stats["steps"] == 5


def test_misuse_is_named() -> None:
    """Kills: a silent step with a vector of the wrong scale, a closure run under a scaler."""
    model, loss_of = problem()
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Always(), reuse=reuse.Decayed())
    scaler = scaler_of(1024.0)
    scaler.scale(loss_of(model)).backward()  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="scaled_step"):
        scaler.step(optimizer, lambda: None)
    optimizer, scaler = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Always()), scaler_of(1024.0)
    scaler.scale(loss_of(model)).backward()  # type: ignore[union-attr]
    with optimizer.perturb():
        scaler.scale(loss_of(model)).backward()  # type: ignore[union-attr]
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"perturb\(scaler\)"):
        scaler.step(optimizer)
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.GradientNorm(1, 1, 4))
    with pytest.raises(RuntimeError, match="depend on the loss scale"):
        by_hand(optimizer, scaler_of(1024.0), lambda: loss_of(model))


def test_disabled_scaler() -> None:
    """Kills: a step that insists on grad_scale."""
    model, loss_of = problem()
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Always())
    for step in (by_helper, by_hand):
        step(optimizer, GradScaler("cpu", enabled=False), lambda: loss_of(model))
    assert optimizer.stats["ascents"] == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_trains(dtype: torch.dtype) -> None:
    """Half-precision passes over float32 weights. Kills: a kept vector in half precision, a frozen model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 4
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), sampling=sampling.Periodic(3), model=model)
    scaler = GradScaler("cpu", enabled=dtype == torch.float16)

    def loss_of() -> Tensor:
        with torch.autocast("cpu", dtype):
            return nn.functional.cross_entropy(model(x), y)

    first = loss_of().item()
    for _ in range(20):
        by_helper(optimizer, scaler, loss_of)
    assert loss_of().item() < 0.1 * first
    assert {x.dtype for x in optimizer.state_dict()["arsam"]["kept"].values()} == {torch.float32}
    assert int(model[1].num_batches_tracked) == 22  # type: ignore[arg-type]


def accumulating(model: nn.Module, optimizer: ARSAM, parts: list[Any], second: int | None = None) -> Callable[[], Tensor]:
    """The closure over all micro-batches; the broken variant's second pass sees only the first few."""
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in parts[: second if passes % 2 == 0 else None]:
            loss = (model(x) - y).square().mean() / len(parts)
            loss.backward()
            total += loss.detach()
        return total

    return closure


def accumulated(parts: int, second: int | None = None, by_hand: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = list(zip(torch.randn(8, 6).chunk(parts), torch.randn(8, 3).chunk(parts), strict=True))
    optimizer = ARSAM(SGD(model.parameters(), lr=0.3, momentum=0.9), rho=0.1, sampling=sampling.Always())
    closure = accumulating(model, optimizer, data, second)
    for _ in range(10):
        if by_hand:
            closure()
            with optimizer.perturb():
                closure()
            optimizer.step()
        else:
            optimizer.step(closure)
    return weights(model)


@pytest.mark.parametrize("hand", [False, True], ids=["closure", "perturb"])
def test_accumulation_equals_the_big_batch(hand: bool) -> None:
    """Kills: a perturbation by the last micro-batch. The broken variant drops micro-batches from the second pass."""
    assert distance(accumulated(1), accumulated(4, by_hand=hand)) < 1e-6
    assert distance(accumulated(1), accumulated(4, second=1, by_hand=hand)) > 1e-3


def test_compiled_model_is_compiled_once() -> None:
    """Two graphs at most, one for each pass. Kills: a statistic, a step number or a norm that a graph depends on."""
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    graphs = 0

    def counting(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    compiled: Any = torch.compile(model, backend=counting)
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Periodic(3), model=model)
    x, y = torch.randn(16, 6), torch.randn(16, 3)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (compiled(x) - y).square().mean()
        loss.backward()
        return loss

    counts = []
    for _ in range(12):
        optimizer.step(closure)
        counts.append(graphs)
    assert counts[0] == counts[-1] <= 2


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=1e-2, fused=True), lambda p: SGD(p, lr=1e-2, fused=True)])
def test_fused_base(make: Callable[..., Optimizer]) -> None:
    """A fused base under a scaler. Kills: gradients that the fused kernel would unscale once more."""
    model, loss_of = problem()
    other = copy.deepcopy(model)
    fused = ARSAM(make(model.parameters()), rho=0.1, sampling=sampling.Periodic(2))
    plain = ARSAM(type(fused.base)(other.parameters(), lr=1e-2), rho=0.1, sampling=sampling.Periodic(2))
    scalers = scaler_of(4096.0), scaler_of(4096.0)
    for _ in range(10):
        by_helper(fused, scalers[0], lambda: loss_of(model))
        by_helper(plain, scalers[1], lambda: loss_of(other))
    assert distance(weights(model), weights(other)) < 1e-6
