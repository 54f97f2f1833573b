"""ARSAM against its plain twin, and the promises of its contract."""

from __future__ import annotations

import copy
import io
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import ExponentialLR

from arsam import ARSAM, reuse, sampling
from benchmarks.speed.memory import Live
from tests import reference
from tests.reference import Rule, Twin, closure_of, counts, decayed, looksam, problem

BASES: dict[str, Callable[..., Optimizer]] = {
    "sgd": lambda p: SGD(p, lr=0.1),
    "momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=1e-2, weight_decay=1e-3),
    "adamw": lambda p: AdamW(p, lr=1e-2, amsgrad=True),
    "rmsprop": lambda p: RMSprop(p, lr=1e-3, momentum=0.5),
}
STEPS = 25


def groups_of(model: nn.Module, rho: float | None = None) -> list[dict[str, Any]]:
    """Three groups, one of them empty; with rho, the last one has its own."""
    first: list[dict[str, Any]] = [{"params": list(model[0].parameters())}, {"params": []}]  # type: ignore[index]
    rest = [p for p in model.parameters() if not any(p is q for q in first[0]["params"])]
    return [*first, {"params": rest, **({"rho": rho} if rho is not None else {})}]


def ordered(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> None:
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=0)


def run_both(make: Callable[[Optimizer], ARSAM], twin: Callable[..., Twin], base: str, rho: float | None = None) -> ARSAM:
    """Train the optimizer and the twin side by side; losses and weights agree below 1e-9."""
    model, loss_of = problem()
    other = copy.deepcopy(model)
    optimizer = make(BASES[base](groups_of(model, rho)))
    closure = closure_of(optimizer, model, loss_of)
    plain = BASES[base](groups_of(other))
    reference_twin = twin(plain, ordered(plain), closure_of(plain, other, loss_of))
    for _ in range(STEPS):
        assert float(optimizer.step(closure).detach()) == pytest.approx(float(reference_twin.step().detach()), abs=1e-9)
    assert_same(model, other, 1e-9)
    return optimizer


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("adaptive", [False, True], ids=["sam", "asam"])
def test_equals_textbook_sam(base: str, adaptive: bool) -> None:
    """Kills: no-op ascent, reversed sign, per-group norm, loss of the wrong pass."""
    optimizer = run_both(
        lambda b: ARSAM(b, rho=0.3, adaptive=adaptive, sampling=sampling.Always(), reuse=reuse.Nothing()),
        lambda *a: Twin(*a, due=lambda t, g: True, rho=0.3, adaptive=adaptive),
        base,
    )
    assert counts(optimizer) == {"steps": STEPS, "ascents": STEPS, "reuses": 0, "passes_per_step": 2.0}


@pytest.mark.parametrize("base", BASES)
def test_never_is_the_base_bitwise(base: str) -> None:
    """Kills: any arithmetic on one-pass steps, a second call of the closure."""
    model, loss_of = problem()
    other = copy.deepcopy(model)
    optimizer = ARSAM(BASES[base](model.parameters()), sampling=sampling.Never(), model=model)
    plain = BASES[base](other.parameters())
    closure, plain_closure = closure_of(optimizer, model, loss_of), closure_of(plain, other, loss_of)
    for _ in range(STEPS):
        assert torch.equal(optimizer.step(closure), plain.step(plain_closure))  # type: ignore[arg-type]
    assert_same(model, other)
    assert closure.calls == STEPS  # type: ignore[attr-defined]


class AESAM:
    """AE-SAM's decision, restated for lambda1 = 1, lambda2 = -1."""

    def __init__(self) -> None:
        self.mean = self.variance = 0.0

    def __call__(self, step: int, g: list[Tensor]) -> bool:
        square = reference.norm(g) ** 2
        self.mean = 0.9 * self.mean + 0.1 * square
        self.variance = 0.9 * self.variance + 0.1 * (square - self.mean) ** 2
        return square >= self.mean + (1 - 2 * step / STEPS) * math.sqrt(self.variance)


def drawn(step: int, _: list[Tensor]) -> bool:
    return random.Random(f"3:{step}").random() < 0.4


# name -> (sampling, reuse, what builds the twin's decision, its mixing)
RIVALS: dict[str, tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any], Any]] = {
    "SS-SAM": (lambda: sampling.Bernoulli(0.4, seed=3), reuse.Nothing, lambda: drawn, None),
    "periodic SAM": (lambda: sampling.Periodic(4, offset=1), reuse.Nothing, lambda: lambda t, g: t % 4 == 1, None),
    "late-phase SAM": (lambda: sampling.Tail(0.3, STEPS), reuse.Nothing, lambda: lambda t, g: t >= STEPS - 8, None),
    "LookSAM": (lambda: sampling.Periodic(5), reuse.Orthogonal, lambda: lambda t, g: t % 5 == 0, looksam(0.7)),
    "AE-SAM": (lambda: sampling.GradientNorm(1, -1, STEPS), reuse.Nothing, AESAM, None),
    "decayed": (lambda: sampling.Periodic(9), reuse.Decayed, lambda: lambda t, g: t % 9 == 0, decayed(0.7, 6)),
    "slow decay": (
        lambda: sampling.Periodic(20),
        lambda: reuse.Decayed(0.95, horizon=20),
        lambda: lambda t, g: t % 20 == 0,
        decayed(0.95, 20),
    ),
    "budget": (
        lambda: sampling.Budget(1.08, STEPS),
        lambda: reuse.Decayed("auto", horizon=None),
        lambda: lambda t, g: t in reference.budget(1.08, STEPS),
        decayed(1 - 2 / STEPS, STEPS),
    ),
    "budget, short gaps": (
        lambda: sampling.Budget(1.32, STEPS, warmup=3),
        lambda: reuse.Decayed("auto", horizon=None),
        lambda: lambda t, g: t in reference.budget(1.32, STEPS, 3),
        decayed(0.9, STEPS),
    ),
}


@pytest.mark.parametrize("rival", RIVALS)
@pytest.mark.parametrize("base", ["momentum", "adamw"])
def test_rivals_equal_their_restatement(rival: str, base: str) -> None:
    """Kills: mixing with the wrong sign, power or age; LookSAM's projection or norm; AE-SAM's order of updates."""
    when, after, due, mix = RIVALS[rival]
    optimizer = run_both(
        lambda b: ARSAM(b, rho=0.2, sampling=when(), reuse=after()), lambda *a: Twin(*a, due(), mix, rho=0.2), base
    )
    assert 0 < optimizer.stats["ascents"] < STEPS


@pytest.mark.parametrize("log", [False, True], ids=["ratio", "log"])
def test_arsam_equals_its_restatement(log: bool) -> None:
    """The whole optimizer, over many windows. Kills: queues fed on the wrong steps, horizon off by one, norms per group."""
    model, loss_of = problem()
    other = copy.deepcopy(model)
    settings: dict[str, Any] = {"window": 6, "blocks": 2, "max_rate": 0.8, "alpha": (0.9, 0.7), "initial": 2.0}
    settings |= {"warmup": 4, "monitor": 3, "seed": 5}
    adaptive = sampling.Adaptive(**settings, estimator="log" if log else "ratio")
    optimizer = ARSAM(BASES["momentum"](groups_of(model, rho=0.1)), rho=0.2, sampling=adaptive)
    plain = BASES["momentum"](groups_of(other))
    rule = Rule(**settings, log=log)
    rho = [0.2] * 2 + [0.1] * (len(ordered(plain)) - 2)
    twin = Twin(plain, ordered(plain), closure_of(plain, other, loss_of), rule.due, decayed(0.7, 6), rho, after=rule.after)
    closure = closure_of(optimizer, model, loss_of)
    rates = []
    for _ in range(120):
        optimizer.step(closure)
        twin.step()
        assert adaptive.rate == pytest.approx(rule.S, abs=1e-9)
        rates.append(adaptive.rate)
    assert len(set(rates)) > 3, "the rate never moved, so nothing was compared"
    assert_same(model, other, 1e-9)
    assert optimizer.stats["ascents"] == len(rule.ascents)


def test_mixed_gradient_on_each_age() -> None:
    """g + 0.7^j PSF for j = 1 ... 6, then g. Kills: float horizon, beta^(j-1), beta^(j+1)."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    base = SGD([weight], lr=0.0)
    seen: list[Tensor] = []
    base.register_step_pre_hook(lambda *_: seen.append(weight.grad.clone()))  # type: ignore[union-attr]
    optimizer = ARSAM(base, rho=0.5, sampling=sampling.Periodic(100))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight**4).sum()
        loss.backward()
        return loss

    for _ in range(9):
        optimizer.step(closure)
    w = weight.detach()
    g = 4 * w**3
    psf = 4 * (w + 0.5 * g / g.norm()) ** 3 - g
    torch.testing.assert_close(seen[0], g + psf)
    for age in range(1, 9):
        torch.testing.assert_close(seen[age], g + (0.7**age if age <= 6 else 0.0) * psf)
    assert counts(optimizer) == {"steps": 9, "ascents": 1, "reuses": 6, "passes_per_step": 10 / 9}


def test_one_pass_steps_call_the_closure_once() -> None:
    """Kills: closure run on one-pass steps."""
    model, loss_of = problem()
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Periodic(5))
    closure = closure_of(optimizer, model, loss_of)
    for _ in range(10):
        optimizer.step(closure)
    assert closure.calls == 12  # type: ignore[attr-defined]


def test_perturb_equals_the_closure() -> None:
    """The manual path, asked by `due`. Kills: due that changes when asked twice, perturb that forgets the PSF."""
    model, loss_of = problem()
    other = copy.deepcopy(model)
    make = lambda m: ARSAM(
        SGD(m.parameters(), lr=0.1, momentum=0.9), model=m, sampling=sampling.Adaptive(window=10, blocks=2, initial=4)
    )
    one, two = make(model), make(other)
    closure = closure_of(one, model, loss_of)
    for _ in range(30):
        one.step(closure)
        two.zero_grad()
        loss_of(other).backward()
        if two.due and two.due:
            with two.perturb():
                assert all(p.grad is None for p in other.parameters())
                loss_of(other).backward()
        assert two.step() is None
    assert_same(model, other)
    assert counts(one) == counts(two) and one.stats["ascents"] == 12


def test_gradient_norm_decides_alike_by_hand() -> None:
    """AE-SAM's decision reads g, not g_s, on the manual path too."""
    model, loss_of = problem()
    other = copy.deepcopy(model)
    one, two = (
        ARSAM(SGD(m.parameters(), lr=0.5), sampling=sampling.GradientNorm(0.5, -0.5, 40), reuse=reuse.Nothing())
        for m in (model, other)
    )
    closure = closure_of(one, model, loss_of)
    for _ in range(40):
        one.step(closure)
        two.zero_grad()
        loss_of(other).backward()
        if two.due:
            with two.perturb():
                loss_of(other).backward()
        two.step()
    assert_same(model, other)
    assert counts(one) == counts(two) and 0 < one.stats["ascents"] < 40


def test_asking_due_once_more_changes_nothing() -> None:
    """A log line between the passes and the step. Kills: running averages that take in g_s, or g twice."""
    runs: list[ARSAM] = []
    for asks in (False, True):
        model, loss_of = problem()
        optimizer = ARSAM(SGD(model.parameters(), lr=0.5), sampling=sampling.GradientNorm(-9, -9, 10), reuse=reuse.Nothing())
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model).backward()
            with optimizer.perturb():
                loss_of(model).backward()
            if asks:
                assert optimizer.due and optimizer.due
            optimizer.step()
        runs.append(optimizer)
    assert runs[0].sampling.state_dict() == runs[1].sampling.state_dict()


def test_one_reuse_rule_for_two_optimizers() -> None:
    """A generator and a discriminator. Kills: the spacing of the one as the other's decay."""
    rule = reuse.Decayed("auto", horizon=None)

    def mixed(*spacings: int) -> Tensor:
        """What the first optimizer's base sees one step after its ascent, where the others are built as well."""
        weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
        optimizers = [ARSAM(SGD([weight], lr=0.0), rho=0.5, sampling=sampling.Periodic(k), reuse=rule) for k in spacings]
        closure = closure_of(optimizers[0], nn.Module(), lambda _: (weight**4).sum())
        for _ in range(2):
            optimizers[0].step(closure)
        assert weight.grad is not None
        return weight.grad.clone()

    assert torch.equal(mixed(100), mixed(100, 20))
    assert not torch.equal(mixed(100), mixed(20))


def test_a_rule_with_a_history_serves_one_optimizer() -> None:
    """Two optimizers would halve its ascents. Kills: a shared history, a refusal that outlives the first optimizer."""
    weight = nn.Parameter(torch.ones(2))
    for rule in (sampling.Adaptive(), sampling.GradientNorm(1, -1, 10)):
        first = ARSAM(SGD([weight], lr=0.1), sampling=rule)
        with pytest.raises(ValueError, match="already serves another optimizer"):
            ARSAM(SGD([weight], lr=0.1), sampling=rule)
        del first
        ARSAM(SGD([weight], lr=0.1), sampling=rule)
    shared = sampling.Periodic(5)
    assert ARSAM(SGD([weight], lr=0.1), sampling=shared).sampling is ARSAM(SGD([weight], lr=0.1), sampling=shared).sampling


def test_the_old_psf_is_gone_before_the_second_pass() -> None:
    """Two vectors at once would be one the size of the parameters too many. Kills: an old PSF that outlives its use."""
    model = nn.Sequential(*[nn.Linear(100, 100, bias=False) for _ in range(4)])
    size = sum(p.numel() for p in model.parameters())
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Periodic(3), reuse=reuse.Decayed(0.9, None))
    closure = closure_of(optimizer, model, lambda m: m(torch.ones(1, 100)).square().mean())
    optimizer.step(closure)
    with Live() as live:
        for _ in range(6):
            optimizer.step(closure)
    assert live.peak / 4 < 4.4 * size, "w, g, a copy of w in the old PSF's memory, g_s, and a tensor on its way"


def test_step_without_the_ascent_that_is_due() -> None:
    """The error names both ways out."""
    model, loss_of = problem()
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Always())
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"closure.*perturb\(\)"):
        optimizer.step()


@pytest.mark.parametrize("kind", ["closure", "perturb"])
def test_exception_in_the_second_pass(kind: str) -> None:
    """The weights are bitwise what they were, in the same storage. Kills: skipped restore, w - e, p.data = saved."""
    model, loss_of = problem(dtype=torch.float32)
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), rho=3.0, model=model, sampling=sampling.Always())
    before = {n: (p.data_ptr(), p.detach().clone()) for n, p in model.named_parameters()}
    moved = []

    def failing() -> Tensor:
        optimizer.zero_grad()
        if moved:
            raise FloatingPointError("second pass")
        moved.append(True)
        loss = loss_of(model)
        loss.backward()
        return loss

    with pytest.raises(FloatingPointError):
        if kind == "closure":
            optimizer.step(failing)
        else:
            failing()
            with optimizer.perturb():
                assert any(not torch.equal(p, before[n][1]) for n, p in model.named_parameters())
                failing()
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name][0]
        assert torch.equal(p, before[name][1])
    assert optimizer.stats["steps"] == 0
    optimizer.step(closure_of(optimizer, model, loss_of))
    assert optimizer.stats["ascents"] == 1


def test_restore_is_bitwise_after_every_ascent() -> None:
    """With lr 0 the weights never change by a bit. Kills: w - e in place of the saved w."""
    model, loss_of = problem(dtype=torch.float32)
    before = copy.deepcopy(model)
    optimizer = ARSAM(SGD(model.parameters(), lr=0.0), rho=5.0, sampling=sampling.Always())
    closure = closure_of(optimizer, model, loss_of)
    for _ in range(5):
        optimizer.step(closure)
    assert_same(model, before)


def test_batch_norm_as_if_the_second_pass_had_not_been() -> None:
    """Kills: statistics moved by the second pass."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    other = copy.deepcopy(model)
    inputs = torch.randn(8, 4)
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), model=model, sampling=sampling.Always())
    optimizer.step(closure_of(optimizer, model, lambda m: m(inputs).square().mean()))
    other(inputs)
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name
    assert int(model[1].num_batches_tracked) == 1
    assert model[1].track_running_stats


def rebuilt(optimizer: ARSAM, model: nn.Module, way: str) -> tuple[nn.Module, ARSAM]:
    """The pair, gone through one way of saving."""
    if way == "deepcopy":
        return copy.deepcopy((model, optimizer))
    if way == "pickle":
        return pickle.loads(pickle.dumps((model, optimizer)))
    fresh = copy.deepcopy(model)
    other = make_resumable(fresh)
    state = optimizer.state_dict()
    if way == "torch.save":
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    other.load_state_dict(copy.deepcopy(state))
    return fresh, other


def make_resumable(model: nn.Module) -> ARSAM:
    rule = sampling.Adaptive(window=6, blocks=2, initial=2.0, alpha=(0.9, 0.9), seed=1)
    return ARSAM(AdamW(groups_of(model), lr=1e-2), rho=0.2, sampling=rule, model=model)


@pytest.mark.parametrize("way", ["state_dict", "torch.save", "pickle", "deepcopy"])
@pytest.mark.parametrize("stop", [3, 41])
def test_resume_is_bitwise(way: str, stop: int) -> None:
    """With an LR scheduler, in the midst of a window and of a PSF's life. Kills: schedule, PSF, age or counters not saved."""
    model, loss_of = problem()
    optimizer = make_resumable(model)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 80)
    closure = closure_of(optimizer, model, loss_of)
    # On to the next moment when an old PSF is about to be reused: there every part of the state is needed.
    while optimizer.stats["steps"] < stop or optimizer.due or not optimizer.state_dict()["arsam"]["kept"]:
        optimizer.step(closure)
        scheduler.step()
    other, resumed = rebuilt(optimizer, model, way)
    other_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(resumed, 80)
    other_scheduler.load_state_dict(scheduler.state_dict())
    for group, own in zip(resumed.param_groups, optimizer.param_groups, strict=True):
        group["lr"] = own["lr"]
    other_closure = closure_of(resumed, other, loss_of)
    for _ in range(40):
        assert torch.equal(optimizer.step(closure), resumed.step(other_closure))
        scheduler.step()
        other_scheduler.step()
    assert_same(model, other)
    assert optimizer.stats == resumed.stats
    assert optimizer.sampling.state_dict() == resumed.sampling.state_dict()


@pytest.mark.parametrize("way", ["state_dict", "pickle"])
def test_a_budget_resumes_and_is_kept(way: str) -> None:
    """Stopped within a gap. Kills: a spacing that a copy no longer follows, a budget counted anew."""

    def make(model: nn.Module) -> ARSAM:
        rules = {"sampling": sampling.Budget(1.06, 100), "reuse": reuse.Decayed("auto", horizon=None)}
        return ARSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.2, **rules)

    model, loss_of = problem()
    optimizer = make(model)
    for _ in range(40):
        optimizer.step(closure_of(optimizer, model, loss_of))
    if way == "pickle":
        other, resumed = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        other = copy.deepcopy(model)
        resumed = make(other)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(60):
        optimizer.step(closure_of(optimizer, model, loss_of))
        resumed.step(closure_of(resumed, other, loss_of))
    assert_same(model, other)
    assert counts(resumed) == {"steps": 100, "ascents": 6, "reuses": 94, "passes_per_step": 1.06}


def test_decayed_needs_to_know_the_spacing() -> None:
    """Errors name the rule, the argument and the way out."""
    model, _ = problem()
    with pytest.raises(ValueError, match=r"Tail has none: give beta"):
        ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Tail(0.2, 10), reuse=reuse.Decayed("auto"))
    with pytest.raises(ValueError, match="beta must lie in"):
        reuse.Decayed(beta="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="horizon must be an integer >= 1, or None"):
        reuse.Decayed(horizon=0)


def test_a_plain_state_is_refused() -> None:
    """Silently starting without PSF and schedule would be a different run."""
    model, _ = problem()
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"optimizer\.base"):
        optimizer.load_state_dict(SGD(model.parameters(), lr=0.1).state_dict())
    other = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Always())
    with pytest.raises(ValueError, match="Budget.*Always"):
        other.load_state_dict(optimizer.state_dict())


def test_groups_and_state_are_the_base_optimizers() -> None:
    """Kills: own keys in the base's state (they break Adam's lazy start), copies of the groups."""
    model, loss_of = problem()
    base = Adam(model.parameters(), lr=1e-2)
    optimizer = ARSAM(base, rho=0.1, sampling=sampling.Always())
    optimizer.step(closure_of(optimizer, model, loss_of))
    assert optimizer.param_groups is base.param_groups and optimizer.state is base.state
    assert set(optimizer.state[model[0].weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert base.param_groups[0]["sam_rho"] == 0.1 and base.param_groups[0]["sam_adaptive"] is False
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 1e-3, "sam_rho": 0.0})
    assert base.param_groups[1]["sam_rho"] == 0.0 and base.param_groups[1]["lr"] == 1e-3
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.param_groups is base.param_groups


def test_a_group_with_rho_zero_stays_where_it_is() -> None:
    """Per-group rho. Kills: the optimizer's rho used for all groups."""
    model, loss_of = problem()
    groups = groups_of(model, rho=0.0)
    optimizer = ARSAM(SGD(groups, lr=0.1), rho=0.5, sampling=sampling.Always())
    before = [p.detach().clone() for p in ordered(optimizer)]
    loss_of(model).backward()
    with optimizer.perturb():
        moved = [not torch.equal(p, w) for p, w in zip(ordered(optimizer), before, strict=True)]
    assert moved == [True, True] + [False] * (len(moved) - 2)


def test_length_of_the_perturbation() -> None:
    """||e||_2 = rho over all groups together. Kills: per-group norm."""
    model, loss_of = problem()
    optimizer = ARSAM(SGD(groups_of(model), lr=0.1), rho=0.25, sampling=sampling.Always())
    before = [p.detach().clone() for p in ordered(optimizer)]
    loss_of(model).backward()
    with optimizer.perturb():
        e = [p.detach() - w for p, w in zip(ordered(optimizer), before, strict=True)]
    assert reference.norm(e) == pytest.approx(0.25, abs=1e-9)


def test_ascent_raises_the_loss() -> None:
    """Kills: reversed sign."""
    model, loss_of = problem()
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), rho=0.1, sampling=sampling.Always())
    first = loss_of(model)
    first.backward()
    with optimizer.perturb():
        assert loss_of(model) > first
        loss_of(model).backward()


def test_loss_is_that_of_the_first_pass() -> None:
    """Kills: loss of the wrong pass."""
    model, loss_of = problem()
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), rho=2.0, sampling=sampling.Always())
    expected = loss_of(model).item()
    assert optimizer.step(closure_of(optimizer, model, loss_of)).item() == expected


@pytest.mark.parametrize("keep_zeros", [False, True], ids=["set_to_none", "zero_fill"])
def test_both_ways_of_zeroing(keep_zeros: bool) -> None:
    """A closure that fills with zeros must not wipe the gradient of the first pass."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    optimizer = ARSAM(SGD([weight], lr=0.1), rho=0.5, sampling=sampling.Always())

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=not keep_zeros)
        loss = (weight**4).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    w = torch.tensor([1.0, -2.0], dtype=torch.float64)
    g = 4 * w**3
    g_s = 4 * (w + 0.5 * g / g.norm()) ** 3
    torch.testing.assert_close(optimizer.state_dict()["arsam"]["kept"][0], g_s - g)
    torch.testing.assert_close(weight.detach(), w - 0.1 * g_s)


def test_gradient_that_is_a_view_is_copied() -> None:
    """DDP's buckets: the second pass writes into the memory that the first gradient lies in."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    bucket = torch.zeros(2, dtype=torch.float64)
    optimizer = ARSAM(SGD([weight], lr=0.1), rho=0.5, sampling=sampling.Always())

    def closure() -> Tensor:
        bucket.copy_(4 * weight.detach() ** 3)
        weight.grad = bucket.view(2)
        return (weight**4).sum()

    w = weight.detach().clone()
    optimizer.step(closure)
    g = 4 * w**3
    torch.testing.assert_close(optimizer.state_dict()["arsam"]["kept"][0], 4 * (w + 0.5 * g / g.norm()) ** 3 - g)


def test_tied_parameters_and_a_gradient_that_comes_and_goes() -> None:
    """Tied weights move once; a tensor that only some passes reach breaks nothing."""
    torch.manual_seed(0)
    first, second, third = (nn.Linear(4, 4, bias=False).double() for _ in range(3))
    second.weight = first.weight
    model = nn.ModuleList([first, second, third])
    inputs, calls = torch.randn(8, 4, dtype=torch.float64), iter(range(100))
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), rho=0.1, sampling=sampling.Periodic(2))

    def closure() -> Tensor:
        optimizer.zero_grad()
        x = second(first(inputs))
        loss = ((third(x) if next(calls) % 3 else x) - 1).square().mean()
        loss.backward()
        return loss

    for _ in range(12):
        optimizer.step(closure)
    assert len(ordered(optimizer)) == 2
    assert all(p.isfinite().all() for p in model.parameters())


def test_no_gradient_at_all() -> None:
    """A step before any backward pass does nothing, as with torch's optimizers."""
    model, _ = problem()
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Always())
    before = copy.deepcopy(model)
    optimizer.step(lambda: torch.zeros(()))
    assert_same(model, before)


def test_zero_gradient() -> None:
    """Eps keeps 0 / 0 out."""
    weight = nn.Parameter(torch.zeros(3))
    optimizer = ARSAM(SGD([weight], lr=0.1), sampling=sampling.Adaptive(initial=5))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    for _ in range(120):
        optimizer.step(closure)
    assert torch.equal(weight.detach(), torch.zeros(3))


def test_sparse_gradients_are_refused() -> None:
    """A clear error, and the weights stay."""
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = ARSAM(SGD(table.parameters(), lr=0.1), sampling=sampling.Always())
    before = table.weight.detach().clone()
    with pytest.raises(RuntimeError, match="dense.*sparse=False"):
        optimizer.step(closure_of(optimizer, nn.Sequential(table), lambda m: m(torch.tensor([1, 2])).sum()))
    assert torch.equal(table.weight, before)


def test_perturb_inside_perturb() -> None:
    """Once at a time."""
    model, loss_of = problem()
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1))
    loss_of(model).backward()
    with optimizer.perturb(), pytest.raises(RuntimeError, match="already active"), optimizer.perturb():
        pass


def test_memory_kept_between_steps() -> None:
    """One buffer the size of the parameters, in float32, none once the horizon is over. Kills: copies kept after use."""
    model, loss_of = problem()
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Periodic(20), reuse=reuse.Decayed(horizon=3))
    closure = closure_of(optimizer, model, loss_of)
    moving = sum(p.numel() for p in model[0].parameters()) + model[2].weight.numel() + 7 * 3 + 3  # type: ignore[index, union-attr]
    sizes = []
    for _ in range(5):
        optimizer.step(closure)
        sizes.append(sum(x.numel() for x in optimizer.state_dict()["arsam"]["kept"].values()))
    assert sizes == [moving, moving, moving, 0, 0]


def test_half_precision_parameters_warn_and_keep_the_psf_in_float32() -> None:
    """Kills: a PSF in bfloat16."""
    model, loss_of = problem()
    model = model.bfloat16()
    with pytest.warns(UserWarning, match="perturbation is lost"):
        optimizer = ARSAM(SGD(model.parameters(), lr=0.1), rho=1.0, sampling=sampling.Always())
    inputs = torch.randn(4, 5).bfloat16()
    optimizer.step(closure_of(optimizer, model, lambda m: m(inputs).float().square().mean()))
    assert {x.dtype for x in optimizer.state_dict()["arsam"]["kept"].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rho": -0.1}, "rho must be >= 0"), ({"rho": math.nan}, "rho must be >= 0"), ({"eps": 0.0}, "eps must be > 0")],
)
def test_bad_arguments(arguments: dict[str, float], message: str) -> None:
    """Errors name the argument and the rule."""
    model, _ = problem()
    with pytest.raises(ValueError, match=message):
        ARSAM(SGD(model.parameters(), lr=0.1), **arguments)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="torch.optim.Optimizer"):
        ARSAM(model.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="in a parameter group"):
        ARSAM(SGD([{"params": model.parameters(), "rho": -1}], lr=0.1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device beside the CPU")
def test_two_devices_in_one_model() -> None:
    """One global norm across devices."""
    model, _ = problem()
    model[4].cuda()  # type: ignore[index]
    inputs = torch.randn(4, 5, dtype=torch.float64)
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), rho=0.25, sampling=sampling.Always())
    model[4](model[:4](inputs).cuda()).sum().backward()  # type: ignore[index, operator]
    before = [p.detach().clone() for p in ordered(optimizer)]
    with optimizer.perturb():
        e = [p.detach() - w for p, w in zip(ordered(optimizer), before, strict=True)]
    assert reference.norm(e) == pytest.approx(0.25, abs=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: the CPU never waits")
def test_no_host_sync_on_one_pass_steps() -> None:
    """Kills: .item() on a one-pass step; the adaptive rule reads the device once per window."""
    model, loss_of = problem(dtype=torch.float32)
    model.cuda()
    inputs = torch.randn(4, 5, device="cuda")
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1), sampling=sampling.Adaptive(initial=3, window=50))
    closure = closure_of(optimizer, model, lambda m: m(inputs).square().mean())
    for _ in range(2):
        optimizer.step(closure)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(47):
            optimizer.step(closure)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_closure_that_perturbs_has_done_both_passes() -> None:
    """Kills: a second ascent on top of the closure's own, a pending ascent that is thrown away."""
    model, loss_of = problem()
    other = copy.deepcopy(model)
    settings = {"rho": 0.3, "reuse": reuse.Decayed(0.5, 3)}
    optimizer = ARSAM(SGD(model.parameters(), lr=0.1, momentum=0.9), sampling=sampling.Periodic(3), **settings)  # type: ignore[arg-type]
    plain = ARSAM(SGD(other.parameters(), lr=0.1, momentum=0.9), sampling=sampling.Periodic(3), **settings)  # type: ignore[arg-type]
    closure, inner = closure_of(plain, other, loss_of), closure_of(optimizer, model, loss_of)

    def both() -> Tensor:
        loss = inner()
        if optimizer.due:
            with optimizer.perturb():
                inner()
        return loss

    for _ in range(8):
        assert torch.equal(optimizer.step(both), plain.step(closure))
    assert_same(model, other)
    assert inner.calls == closure.calls == 11  # type: ignore[attr-defined]
    assert counts(optimizer) == counts(plain)


@given(
    base=st.sampled_from(list(BASES)),
    start=st.integers(0, 10**6),
    rho=st.floats(1e-3, 1.0),
    adaptive=st.booleans(),
    rule=st.one_of(
        st.tuples(st.just("periodic"), st.integers(1, 9)),
        st.tuples(st.just("bernoulli"), st.floats(0, 1)),
        st.tuples(st.just("budget"), st.floats(1, 2)),
    ),
    mixing=st.one_of(
        st.none(),
        st.tuples(st.floats(0, 1), st.one_of(st.none(), st.integers(1, 9))),
        st.floats(0, 1).map(lambda alpha: (alpha,)),
    ),
    factor=st.floats(0.5, 1.0),
)
@settings(max_examples=60, deadline=None)
@pytest.mark.filterwarnings("ignore:.*rho is far too small")  # so it may be, where nothing but equality is wanted
def test_whatever_is_combined_equals_the_twin(
    base: str, start: int, rho: float, adaptive: bool, rule: tuple[str, Any], mixing: Any, factor: float
) -> None:
    """Base, weights, schedule, rho, sampling and reuse at random. Kills: what goes wrong in one combination only."""
    kind, value = rule
    ours: Any = {
        "periodic": lambda: sampling.Periodic(value),
        "bernoulli": lambda: sampling.Bernoulli(value, seed=start),
        "budget": lambda: sampling.Budget(value, STEPS),
    }[kind]()
    steps = {
        "periodic": lambda: set(range(0, STEPS, value)),
        "bernoulli": lambda: {t for t in range(STEPS) if random.Random(f"{start}:{t}").random() < value},
        "budget": lambda: reference.budget(value, STEPS),
    }[kind]()
    after, mix = reuse.Nothing(), None
    if mixing is not None and len(mixing) == 2:
        after, mix = reuse.Decayed(*mixing), decayed(mixing[0], mixing[1] or STEPS)
    elif mixing is not None:
        after, mix = reuse.Orthogonal(*mixing), looksam(*mixing)
    model, loss_of = problem(start)
    other = copy.deepcopy(model)
    optimizer = ARSAM(BASES[base](groups_of(model)), rho=rho, adaptive=adaptive, sampling=ours, reuse=after)
    plain = BASES[base](groups_of(other))
    twin = Twin(
        plain, ordered(plain), closure_of(plain, other, loss_of), lambda t, _: t in steps, mix, rho=rho, adaptive=adaptive
    )
    schedules = [ExponentialLR(o, factor) for o in (optimizer, plain)]
    closure = closure_of(optimizer, model, loss_of)
    for _ in range(STEPS):
        optimizer.step(closure)
        twin.step()
        for schedule in schedules:
            schedule.step()
    assert optimizer.stats["ascents"] == len(steps)
    assert_same(model, other, 1e-8)
