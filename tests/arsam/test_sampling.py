"""The sampling rules: quotas, draws, trends and their limits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arsam import reuse, sampling
from arsam.sampling import Adaptive, Bernoulli, Budget, GradientNorm, Periodic, Tail
from tests import reference


def nothing() -> Tensor:
    return torch.zeros(())


def simulate(rule: Adaptive, steps: int, gradient: float = 1.0, psf: float = 0.1) -> list[bool]:
    """Drive a rule by constant norms."""
    taken = []
    for step in range(steps):
        due = rule.due(step, nothing)
        assert rule.due(step, nothing) == due, "asking twice changed the answer"
        rule.update(step, due, (torch.tensor(gradient), torch.tensor(psf)) if due else None)
        taken.append(due)
    return taken


@given(
    window=st.integers(4, 60),
    rate=st.floats(0, 1),
    warmup=st.integers(0, 30),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=60, deadline=None)
def test_every_full_window_has_its_quota(window: int, rate: float, warmup: int, seed: int) -> None:
    """Exactly floor(S) ascents, in the first window after warm-up too. Kills: a quota met only on average."""
    cap = math.floor(0.8 * window)
    initial = 1 + rate * (cap - 1)
    rule = Adaptive(window=window, blocks=2, initial=initial, warmup=warmup, alpha=(0.0, 0.0), seed=seed)
    taken = simulate(rule, warmup + 4 * window)
    assert all(taken[:warmup])
    for start in range(warmup, len(taken), window):
        assert sum(taken[start : start + window]) == math.floor(rule.rate)


def test_a_missed_ascent_is_made_up_for() -> None:
    """Who skips a due ascent meets it again before the window ends."""
    rule = Adaptive(window=10, blocks=2, initial=3)
    ascents = 0
    for step in range(10):
        due = rule.due(step, nothing)
        done = due and step >= 7
        ascents += done
        rule.update(step, done, (torch.ones(()), torch.ones(())) if done else None)
    assert ascents == 3


def test_places_are_random_and_seeded() -> None:
    """Kills: ascents at the end of each window only; an unused seed."""
    places = [tuple(simulate(Adaptive(initial=5, alpha=(0, 0), seed=s), 50)) for s in (0, 0, 1)]
    assert places[0] == places[1] != places[2]
    assert sum(places[0][:40]) >= 2


@pytest.mark.parametrize(("estimator", "drifts"), [("ratio", True), ("log", False)])
def test_stationary_noise(estimator: str, drifts: bool) -> None:
    """The published estimator climbs on noise around a constant, the logarithm stays: as documented."""
    generator = torch.Generator().manual_seed(0)
    rule = Adaptive(window=20, blocks=2, initial=4, max_rate=0.8, estimator=estimator)  # type: ignore[arg-type]
    for step in range(6000):
        due = rule.due(step, nothing)
        psf = torch.rand((), generator=generator) + 0.5
        rule.update(step, due, (torch.ones(()), psf) if due else None)
    assert (rule.rate == rule.cap) == drifts
    assert drifts or 2 < rule.rate < 8


def test_short_queues_leave_the_rate_alone() -> None:
    """2K - 1 ascents at the earliest. Kills: NaN or a changed rate before that."""
    rule = Adaptive(window=10, blocks=2, initial=8, warmup=9)
    for step in range(19):
        rule.update(step, True, (torch.ones(()), torch.tensor(1.0 + step)))
        assert rule.rate == 8 or step == 18
    assert rule.rate == 8, "19 ascents, of which 10 give a variance"
    # The boundary at step 18 saw 19 ascents = 2K - 1; with rising norms the rate must have been allowed to move.
    rule = Adaptive(window=10, blocks=2, initial=4, warmup=9)
    for step in range(19):
        rule.update(step, True, (torch.ones(()), torch.tensor(1.0 + step)))
    assert rule.rate > 4


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan])
def test_degenerate_norms(value: float) -> None:
    """Zero, infinite and NaN norms leave a finite rate. Kills: a crash in floor(NaN)."""
    rule = Adaptive(window=4, blocks=2, initial=2)
    simulate(rule, 100, gradient=value, psf=value)
    assert 1 <= rule.rate <= rule.cap


def test_host_reads_once_per_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a read of the device on every ascent."""
    reads = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append(1) or tolist(self))
    simulate(Adaptive(window=10, blocks=2, initial=5, warmup=20), 100)
    assert len(reads) == 10  # 20 steps of warm-up fill two windows, then 8 windows


def test_bernoulli() -> None:
    """A share of p, the same for the same seed. Kills: p inverted."""
    taken = [Bernoulli(0.2, seed=4).due(t, nothing) for t in range(5000)]
    assert 0.17 < sum(taken) / 5000 < 0.23
    assert taken != [Bernoulli(0.2, seed=5).due(t, nothing) for t in range(5000)]
    assert not any(Bernoulli(0.0).due(t, nothing) for t in range(100))
    assert all(Bernoulli(1.0).due(t, nothing) for t in range(100))


def test_periodic_and_tail() -> None:
    """Step numbers from 0. Kills: off by one."""
    assert [t for t in range(10) if Periodic(4, offset=2).due(t, nothing)] == [2, 6]
    assert [t for t in range(10) if Tail(0.25, 10).due(t, nothing)] == [8, 9]  # round(2.5) = 2
    assert [t for t in range(10) if Tail(1.0, 10).due(t, nothing)] == list(range(10))


@given(passes=st.floats(1, 2), total=st.integers(1, 3000), share=st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_budget_is_met(passes: float, total: int, share: float) -> None:
    """Exactly the promised ascents, at the twin's steps, and to within one wherever the run stops.

    Kills: a count that floats off by one, a first ascent late in the first gap, a warm-up on top of the budget.
    """
    ascents = round((passes - 1) * total)
    warmup = int(share * ascents)
    rule = Budget(passes, total, warmup=warmup)
    taken = [rule.due(t, nothing) for t in range(total)]
    assert sum(taken) == ascents and abs(total * passes - (total + sum(taken))) <= 0.5 + 1e-9
    assert {t for t, due in enumerate(taken) if due} == reference.budget(passes, total, warmup)
    assert all(taken[:warmup]) and (ascents == 0 or taken[0])
    done, rate = 0, (ascents - warmup) / max(total - warmup, 1)
    for n, due in enumerate(taken[warmup:], start=1):
        done += due
        assert abs(done - rate * n) < 1


def test_spacing() -> None:
    """What `Decayed("auto")` reads. Kills: the inverse; S before it is rounded down."""
    assert Budget(1.05, 1000).spacing == 20 and Budget(1.5, 1000, warmup=200).spacing == 800 / 300
    assert Periodic(7, offset=2).spacing == 7 and Bernoulli(0.25).spacing == 4
    assert Adaptive(initial=4.9).spacing == 12.5
    assert Budget(1.0, 10).spacing == Bernoulli(0.0).spacing == math.inf


def test_gradient_norm_ramps() -> None:
    """The threshold goes from lambda1 to lambda2. Kills: the ends swapped."""
    rule = GradientNorm(lambda1=10.0, lambda2=-10.0, total_steps=1000)
    generator = torch.Generator().manual_seed(0)
    taken = []
    for step in range(1000):
        value = 1 + 0.1 * torch.rand((), generator=generator)
        taken.append(rule.due(step, lambda value=value: value))
        rule.observe(value)
        rule.update(step, taken[-1], None)
    assert sum(taken[20:300]) == 0 and all(taken[900:])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Adaptive(window=8, blocks=5), "window must be >= 2"),
        (lambda: Adaptive(max_rate=0.0), "max_rate"),
        (lambda: Adaptive(max_rate=0.01), "max_rate"),
        (lambda: Adaptive(alpha=(0.1, -0.1)), "alpha"),
        (lambda: Adaptive(initial=41), r"initial must lie in \[1, .* = \[1, 40\]"),
        (lambda: Adaptive(warmup=-1), "warmup"),
        (lambda: Adaptive(monitor=0), "monitor"),
        (lambda: Adaptive(estimator="mean"), "estimator"),  # type: ignore[arg-type]
        (lambda: Periodic(0), "every"),
        (lambda: Periodic(3, offset=3), "offset"),
        (lambda: Bernoulli(1.5), "p must lie"),
        (lambda: Tail(1.2, 10), "fraction"),
        (lambda: Tail(0.2, 0), "total_steps"),
        (lambda: GradientNorm(1, -1, 0), "total_steps"),
        (lambda: Budget(0.9, 10), "passes_per_step"),
        (lambda: Budget(1.2, 0), "total_steps"),
        (lambda: Budget(1.2, 100, warmup=21), r"warmup must lie in \[0, 20\]"),
    ],
)
def test_bad_arguments(build: object, message: str) -> None:
    """Errors name the argument and the rule."""
    with pytest.raises(ValueError, match=message):
        build()  # type: ignore[operator]


def test_public_names() -> None:
    """The contract's names."""
    for name in ["Always", "Never", "Periodic", "Bernoulli", "Tail", "Budget", "GradientNorm", "Adaptive"]:
        assert hasattr(sampling, name)


def test_rules_are_all_named() -> None:
    """What overrides and configs of other loops look up. Kills: a rule that cannot be named there."""
    assert {r.__name__ for r in sampling.RULES} == set(sampling.__all__) - {"RULES", "Sampling"}
    assert {r.__name__ for r in reuse.RULES} == {"Decayed", "Nothing", "Orthogonal"}


def test_asking_again_changes_nothing() -> None:
    """GradientNorm is asked about g, about g_s, and again. Kills: running averages that are written when `due` is read."""
    rule, other = (GradientNorm(lambda1=1.0, lambda2=-1.0, total_steps=20) for _ in range(2))
    for step in range(20):
        norm = torch.tensor(1.0 + 0.3 * math.sin(step))
        assert rule.due(step, lambda norm=norm: norm) == other.due(step, lambda norm=norm: norm)
        rule.observe(norm)
        other.observe(norm)
        rule.due(step, lambda: torch.tensor(9.0))
        rule.update(step, False, None)
        other.update(step, False, None)
        assert rule.state_dict() == other.state_dict()
