"""The rows of the comparison, each defined here and nowhere else.

Rows without a `borrows` choose every setting of theirs on held-out images. Late-phase ascents leave no one-pass step behind
them, so that reuse would change nothing there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from arsam import ARSAM
from arsam.reuse import Decayed, Nothing, Orthogonal, Reuse
from arsam.sampling import Adaptive, Always, Bernoulli, Budget, GradientNorm, Periodic, Sampling, Tail
from benchmarks.compare.controls import GradientNoise, PermutedVector, RandomVector, Reversed, Rounded
from benchmarks.compare.rivals import PACKAGED, HalfBatch, MomentumSAM, StaleSAM, WeightAverage
from benchmarks.compare.schema import Knob, Row, Settings, Setup, Sharpen

RHO = (Knob("rho"),)
WARMUP = 0.3  # share of the steps over which rho rises, in the rows that are named so


def lasting() -> Decayed:
    """Reuse until the next ascent, its decay following the spacing; unbounded, as in all records so far (trials/bound.py)."""
    return Decayed("auto", horizon=None, max_growth=None)


def _even(setup: Setup) -> Sampling:
    return Budget(1 + setup.ascents, setup.total_steps)


def _random(setup: Setup) -> Sampling:
    return Bernoulli(setup.ascents, seed=setup.seed)


def _late(setup: Setup) -> Sampling:
    return Tail(setup.ascents, setup.total_steps)


def _always(setup: Setup) -> Sampling:
    return Always()


def _adaptive(setup: Setup, **settings: Any) -> Sampling:
    return Adaptive(warmup=3 * setup.steps_per_epoch, seed=setup.seed, **settings)  # the authors' warm-up


def _arsam(
    sampling: Callable[[Setup], Sampling],
    reuse: Callable[[], Reuse] = Nothing,
    *,
    kind: Callable[..., Any] = ARSAM,
    warmup: float = 0.0,
    **fixed: Any,
) -> Callable[[Setup], Sharpen]:
    """ARSAM with these rules; `warmup`: share of the steps over which rho rises."""

    def sharpen(setup: Setup) -> Sharpen:
        schedule = {"rho_warmup": round(warmup * setup.total_steps)} if warmup else {}
        return partial(_built, kind, sampling, reuse, setup, {"rho": setup.settings["rho"], **schedule, **fixed})

    return sharpen


def _built(kind: Any, sampling: Any, reuse: Any, setup: Setup, settings: Settings, base: Any, model: Any) -> Any:
    own = reuse(setup.settings["alpha"]) if "alpha" in setup.settings else reuse()
    return kind(base, model=model, sampling=sampling(setup), reuse=own, **settings)


def _average(setup: Setup) -> Sharpen:
    return partial(WeightAverage, steps_per_epoch=setup.steps_per_epoch, total_steps=setup.total_steps)


def _one_pass(kind: Callable[..., Any]) -> Callable[[Setup], Sharpen]:
    return lambda setup: partial(kind, rho=setup.settings["rho"])


def _packaged(kind: Callable[..., Any], name: str) -> Callable[[Setup], Sharpen]:
    return lambda setup: partial(kind, rho=setup.settings["rho"], name=name)


def _spent(passes: float, name: str = "", **settings: Any) -> Row:
    """`Budget` at so many passes per step."""
    return Row(
        f"budget-{passes:g}{name}", f"ARSAM, `Budget({passes:g})`", "arsam",
        _arsam(_even, lasting), RHO, ascents=passes - 1, **settings,
    )  # fmt: skip


def _warmed(name: str, title: str, passes: float, sampling: Any, reuse: Any) -> Row:
    return Row(
        f"{name}-warmup", f"{title}, rho warmed up", "schedule",
        _arsam(sampling, reuse, warmup=WARMUP), RHO, ascents=passes - 1,
    )  # fmt: skip


def _control(name: str, title: str, rule: Callable[..., Reuse]) -> Row:
    return Row(
        f"control-{name}", title, "control", _arsam(_even, partial(rule, "auto", horizon=None, max_growth=None)),
        ascents=0.2, borrows="budget-1.2",
    )  # fmt: skip


_PLACES = (("periodic", "evenly spaced", _even), ("bernoulli", "random", _random), ("late", "late", _late))


def _without_reuse(passes: float) -> tuple[Row, ...]:
    return tuple(
        Row(
            f"{name}-{passes:g}",
            f"SAM, {title} ascents, no reuse, {passes:g}",
            "no reuse",
            _arsam(rule),
            RHO,
            ascents=passes - 1,
        )
        for name, title, rule in _PLACES
    )


MAIN = (
    Row("base", "base", "base"),
    Row("sam", "SAM", "sam", _arsam(_always), RHO),
    _spent(1.2),
    _spent(1.05),
    _warmed("sam", "SAM", 2.0, _always, Nothing),
    _warmed("budget-1.2", "ARSAM, `Budget(1.2)`", 1.2, _even, lasting),
    _warmed("budget-1.05", "ARSAM, `Budget(1.05)`", 1.05, _even, lasting),
    Row(
        "base-tuned", "base, tuned and stopped early", "base", None,
        (
            Knob("lr", (0.5, 2**-0.5, 1.0, 2**0.5, 2.0)),
            Knob("weight_decay", (1.0, 2.0, 4.0), ratio=2.0),
            Knob("epochs", (0.5, 2**-0.5, 1.0), largest=1.0),
        ),
        early=True,
    ),
    Row("msam", "Momentum-SAM, one pass", "rival", _one_pass(MomentumSAM), (Knob("rho", scale=4.0),), reestimate=True),
    Row("s2-sam", "S2-SAM, one pass", "rival", _one_pass(StaleSAM), RHO, reestimate=True),
    Row(
        "looksam", "LookSAM, every 5th step", "rival", _arsam(lambda setup: Periodic(5), Orthogonal),
        (Knob("rho"), Knob("alpha", (0.5, 0.7, 1.0))), settings={"alpha": 0.7},
    ),
    Row("budget-1.2-beta1.0", "ARSAM, `Budget(1.2)`, no decay", "decay",
        _arsam(_even, partial(Decayed, 1.0, horizon=None)), RHO, ascents=0.2),
    Row("budget-1.2-half-batch", "ARSAM, `Budget(1.2)`, second pass on half the batch", "arsam",
        _arsam(_even, lasting, kind=HalfBatch), (Knob("rho", scale=0.5**0.5),), ascents=0.2, part=0.5),
    Row("published", "ARSAM, the published rule", "arsam", _arsam(_adaptive, Decayed), RHO),
    _spent(1.1),
    _warmed("budget-1.1", "ARSAM, `Budget(1.1)`", 1.1, _even, lasting),
    _spent(1.4),
    Row("asam", "ASAM", "sam", _arsam(_always, adaptive=True), (Knob("rho", scale=4.0),)),
    *_without_reuse(1.2),
    Row("base-ema", "base, average of the weights", "base", ema=0.99),
    Row("base-swa", "base, SWA", "base", _average, reestimate=True),
    Row("base-1.2x", "base, 1.2 times the epochs", "base", settings={"epochs": 1.2}),
    Row("base-2x", "base, twice the epochs", "base", settings={"epochs": 2.0}),
)  # fmt: skip

FURTHER = (
    *(row for passes in (1.05, 1.1, 1.4) for row in _without_reuse(passes)),
    Row("published-log", "ARSAM, the published rule, log-ratios", "arsam",
        _arsam(partial(_adaptive, estimator="log"), Decayed), RHO),
    *(
        Row(f"{name}-published", f"SAM, {title} ascents, as many as the published rule's", "no reuse", _arsam(rule),
            ascents="published", borrows=f"{name}-1.2")
        for name, title, rule in _PLACES
    ),
    Row("ae-sam", "AE-SAM", "rival", _arsam(lambda setup: GradientNorm(1.0, -1.0, setup.total_steps)), RHO),
    Row("budget-1.2-short", "ARSAM, `Budget(1.2)`, the published decay", "decay", _arsam(_even, Decayed), RHO, ascents=0.2),
    _control("reversed", "the PSF reversed", Reversed),
    _control("random", "a random vector of the PSF's norm", RandomVector),
    _control("permuted", "the PSF's entries permuted", PermutedVector),
    _control("gradient-noise", "a difference of two gradients", GradientNoise),
    Row("budget-1.2-bf16", "ARSAM, `Budget(1.2)`, PSF in bfloat16", "control",
        _arsam(_even, partial(Rounded, "auto", horizon=None, max_growth=None)), ascents=0.2, borrows="budget-1.2"),
    Row("sam-half-batch", "SAM, second pass on half the batch", "sam", _arsam(_always, kind=HalfBatch),
        (Knob("rho", scale=0.5**0.5),), part=0.5),
    *(
        Row(f"pytorch-optimizer-{name}", f"pytorch-optimizer's {name}", "package", _packaged(kind, name), borrows="sam")
        for name, kind in PACKAGED
    ),
)  # fmt: skip

ROWS = MAIN + FURTHER
