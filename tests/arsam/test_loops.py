"""Loops that are wrong are told so, with what to write, before anything is lost."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adadelta, AdamW, SparseAdam

from arsam import ARSAM, reuse, sampling
from tests.reference import closure_of, counts, problem


def always(model: nn.Module, **settings: Any) -> ARSAM:
    return ARSAM(SGD(model.parameters(), lr=0.1), rho=0.1, sampling=sampling.Always(), **settings)


def steps(count: int, optimizer: ARSAM, closure: Any) -> None:
    for _ in range(count):
        optimizer.step(closure)


def test_a_closure_that_does_nothing_after_perturb() -> None:
    """Lightning's manual optimization passes one. Kills: an ascent that is thrown away, so that nothing is updated."""
    model, loss_of = problem()
    other = copy.deepcopy(model)
    optimizer, plain = always(model), always(other)
    for o, m, arguments in ((optimizer, model, [lambda: None]), (plain, other, [])):
        for _ in range(3):
            o.zero_grad()
            loss_of(m).backward()
            with o.perturb():
                loss_of(m).backward()
            o.step(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert counts(optimizer) == counts(plain) and optimizer.stats["ascents"] == 3


def test_a_closure_that_runs_after_perturb() -> None:
    """Kills: three passes, of which one is lost."""
    model, loss_of = problem()
    optimizer = always(model)
    loss_of(model).backward()
    with optimizer.perturb():
        loss_of(model).backward()
    with pytest.raises(RuntimeError, match="after perturb"):
        optimizer.step(lambda: loss_of(model).backward())


@pytest.mark.parametrize("in_place", [False, True])
def test_gradients_that_grow_in_the_closure(in_place: bool) -> None:
    """Kills: an update by g + g, a PSF of g_s - 2 g; and a complaint about a loop that zeroes, in whatever way."""
    model, loss_of = problem()
    optimizer = always(model)

    def growing() -> Tensor:
        loss = loss_of(model)
        loss.backward()
        return loss

    growing()
    with pytest.raises(RuntimeError, match="added its gradient.*zero_grad"):
        optimizer.step(growing)
    optimizer = always(model)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=not in_place)  # outside of the closure
        optimizer.step(growing)

    def zeroing() -> Tensor:
        optimizer.zero_grad(set_to_none=not in_place)
        return growing()

    optimizer = always(model)
    for _ in range(3):
        optimizer.step(zeroing)


def test_a_second_pass_without_a_gradient() -> None:
    """Kills: a step that updates nothing."""
    model, loss_of = problem()
    optimizer = always(model)
    loss_of(model).backward()
    with optimizer.perturb():
        pass  # a look at w + e is allowed; a step by it is not
    with pytest.raises(RuntimeError, match="left no gradient"):
        optimizer.step()
    passes = iter((True, False))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        if next(passes):
            loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="left no gradient"):
        optimizer.step(closure)
    assert optimizer.stats["steps"] == 0


def test_a_psf_of_zero_is_told() -> None:
    """Features that were computed beforehand. Kills: a method that is off without a word; a word on every ascent."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = ARSAM(SGD([weight], lr=0.1), sampling=sampling.Always(), reuse=reuse.Decayed())
    with pytest.warns(UserWarning, match="PSF = 0") as told:
        steps(3, optimizer, closure_of(optimizer, nn.Module(), lambda _: weight.sum()))
    assert len(told) == 1


def test_a_loop_that_knows_nothing_of_ascents() -> None:
    """At its first step, not at the first ascent. Kills: an error after 80 % of a run; one where no ascent ever comes."""
    model, loss_of = problem()
    rules: list[Any] = [
        sampling.Tail(0.2, 100),
        sampling.Periodic(9, offset=5),
        sampling.Budget(1.05),
        sampling.GradientNorm(9, 9, 9),
    ]
    for rule in rules:
        optimizer = ARSAM(SGD(model.parameters(), lr=0.1), sampling=rule)
        loss_of(model).backward()
        with pytest.raises(RuntimeError, match="has not asked"):
            optimizer.step()
        _ = optimizer.due
    quiet: list[dict[str, Any]] = [{"sampling": sampling.Never()}, {"passes": 1.0}, {"rho": 0.0}]
    for settings in quiet:
        optimizer = ARSAM(SGD(model.parameters(), lr=0.1), **settings)
        loss_of(model).backward()
        optimizer.step()
        assert optimizer.stats["steps"] == 1


def test_the_form_of_other_packages() -> None:
    """The error names the new form. Kills: "unexpected keyword argument 'lr'"."""
    model, _ = problem()
    for arguments, more in (((model.parameters(), SGD), {"lr": 0.1}), ((list(model.parameters()), SGD), {"lr": 0.1, "rho": 1})):
        with pytest.raises(TypeError, match=r"ARSAM\(torch.optim.SGD\(model.parameters\(\), lr=0.1\), model\)"):
            ARSAM(*arguments, **more)  # type: ignore[arg-type]


def test_bases_that_cannot_work() -> None:
    """Refused by name when built. Kills: a bare TypeError at the first step, a sharpness of a sharpness."""
    p = [nn.Parameter(torch.ones(2))]
    for base, name in ((LBFGS(p), "LBFGS"), (SparseAdam(p), "SparseAdam"), (ARSAM(SGD(p, lr=0.1)), "ARSAM already")):
        with pytest.raises(TypeError, match=name):
            ARSAM(base)
        with pytest.raises(TypeError, match=name):
            ARSAM([base])
    with pytest.raises(TypeError, match="empty"):
        ARSAM([])
    with pytest.raises(TypeError, match="nn.Module"):
        ARSAM(SGD(p, lr=0.1), SGD)  # type: ignore[arg-type]


def test_a_base_with_a_rho_of_its_own() -> None:
    """Adadelta's is its decay. Kills: a radius of 0.9, a decay of 0.05."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = ARSAM(Adadelta([weight]), rho=0.05, sampling=sampling.Always())
    weight.square().sum().backward()
    before = weight.detach().clone()
    with optimizer.perturb():
        assert float((weight.detach() - before).norm()) == pytest.approx(0.05, rel=1e-4)
    assert optimizer.param_groups[0]["rho"] == 0.9


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_second_pass_that_is_not_finite_is_not_kept(bad: float) -> None:
    """A step that a guard leaves out. Kills: a PSF of NaN that poisons every step until the next ascent."""
    weight = nn.Parameter(torch.ones(3))
    base = SGD([weight], lr=0.1)
    optimizer = ARSAM(base, sampling=sampling.Periodic(4), reuse=reuse.Decayed(0.9, None))
    passes = 0

    def closure() -> Tensor:
        nonlocal passes
        passes += 1
        optimizer.zero_grad()
        loss = weight.square().sum() * (bad if passes == 2 else 1.0)
        loss.backward()
        return loss

    base.register_step_pre_hook(lambda *_: None if weight.grad.isfinite().all() else weight.grad.zero_())  # type: ignore[union-attr, func-returns-value]
    for _ in range(4):
        optimizer.step(closure)
        assert weight.isfinite().all()
    assert optimizer.state_dict()["arsam"]["kept"] == {} and optimizer.stats["reuses"] == 0


def test_max_ratio_bounds_what_is_reused() -> None:
    """||beta^j PSF|| <= max_ratio ||g||. Kills: an outlier batch that rules the steps after its ascent."""
    for ratio, size in ((0.5, 5.0), (None, 9.0), (2.0, 9.0)):
        g = [torch.tensor([6.0, 0.0]), torch.tensor([8.0])]  # of norm 10
        kept = [torch.tensor([0.0, 10.0]), torch.tensor([0.0])]
        before = [x.clone() for x in g]
        reuse.Decayed(0.9, None, max_ratio=ratio).mix_(g, kept, 1)
        assert float(torch.cat([x - b for x, b in zip(g, before, strict=True)]).norm()) == pytest.approx(size)
    with pytest.raises(ValueError, match="max_ratio"):
        reuse.Decayed(max_ratio=0.0)
    zero = [torch.zeros(2)]
    reuse.Decayed(0.9, None, max_ratio=1.0).mix_(zero, [torch.zeros(2)], 1)
    assert zero[0].isfinite().all()


@pytest.mark.parametrize("resumed", [False, True])
def test_an_outlier_on_an_ascent_does_not_rule_the_steps_after_it(resumed: bool) -> None:
    """By default, where we choose the decay; a beta of one's own is what it says. Kills: a replayed outlier, a lost length."""
    for settings, left in (
        ({"passes": 1.1}, True),
        ({"sampling": sampling.Budget(1.1), "reuse": reuse.Decayed(0.9, None)}, False),
    ):
        weight = nn.Parameter(torch.tensor([1.0, 2.0, -1.0], dtype=torch.float64))
        optimizer = ARSAM(SGD([weight], lr=0.0), rho=0.5, **settings)  # type: ignore[arg-type]
        sizes = []
        for step in range(30):
            scale = 1000.0 if step == 10 else 1.0  # both passes of the second ascent are of a broken batch
            optimizer.step(closure_of(optimizer, nn.Module(), lambda _, w=weight, s=scale: s * (w**4).sum()))  # type: ignore[misc]
            sizes.append(sum(float(x.norm()) for x in optimizer.state_dict()["arsam"]["kept"].values()))
            if step == 9 and resumed:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = ARSAM(SGD([weight], lr=0.0), rho=0.5, **settings)  # type: ignore[arg-type]
                optimizer.load_state_dict(state)
        assert sizes[9] > 0 and sizes[19] == pytest.approx(0.0 if left else 1000 * sizes[9])
        assert sizes[29] == pytest.approx(sizes[9]), "the next ascent is as ever"
    assert ARSAM.published(SGD([weight], lr=0.1)).reuse.max_growth is None
    with pytest.raises(ValueError, match="max_growth"):
        reuse.Decayed("auto", None, max_growth=1.0)


def test_clip_is_of_the_mixed_gradient() -> None:
    """Kills: passes clipped one by one, a PSF that escapes."""
    model, loss_of = problem()
    norms: list[float] = []
    base = SGD(model.parameters(), lr=0.1)
    optimizer = ARSAM(base, passes=1.5, rho=1.0, clip=0.01)
    base.register_step_pre_hook(
        lambda *_: norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm()))
    )
    for _ in range(4):
        optimizer.step(closure_of(optimizer, model, loss_of))
    assert norms == pytest.approx([0.01] * 4, rel=1e-3)


def test_stats_of_the_last_ascent() -> None:
    """Against their definitions. Kills: a ratio to g_s, a cosine of g and PSF, the loss of another pass."""
    weight = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    for rule in (reuse.Decayed(0.9, None), reuse.Orthogonal()):
        optimizer = ARSAM(SGD([weight], lr=0.0), rho=0.5, sampling=sampling.Periodic(3), reuse=rule)
        assert optimizer.stats["rise"] is optimizer.stats["psf_ratio"] is optimizer.stats["cosine"] is None
        for _ in range(2):
            optimizer.step(closure_of(optimizer, nn.Module(), lambda _: (weight**4).sum()))
        w = weight.detach()
        g = 4 * w**3
        e = 0.5 * g / g.norm()
        g_s = 4 * (w + e) ** 3
        stats = optimizer.stats
        assert stats["rise"] == pytest.approx(float(((w + e) ** 4 - w**4).sum()))
        assert stats["psf_ratio"] == pytest.approx(float((g_s - g).norm() / g.norm()))
        assert stats["cosine"] == pytest.approx(float(g @ g_s / g.norm() / g_s.norm()))


@pytest.mark.parametrize("rho", [1e-9, 1e3])
def test_a_radius_far_off_is_told(rho: float) -> None:
    """Once, after twenty ascents in a row. Kills: a word at the first odd batch; none at all."""
    model, loss_of = problem()
    optimizer = ARSAM(SGD(model.parameters(), lr=0.0), rho=rho, sampling=sampling.Always(), reuse=reuse.Decayed())
    closure = closure_of(optimizer, model, lambda m: loss_of(m) + sum(p.pow(4).sum() for p in m.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(19):
            optimizer.step(closure)
    with pytest.warns(UserWarning, match="far too " + ("small" if rho < 1 else "large")) as told:
        steps(30, optimizer, closure)
    assert len(told) == 1


def test_one_sign_alone_does_not_tell_of_a_radius() -> None:
    """A loss that is nearly linear: a PSF of next to nothing, and a rise as it should be. Kills: a verdict by the PSF alone."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = ARSAM(SGD([weight], lr=0.0), rho=0.1, sampling=sampling.Always(), reuse=reuse.Decayed())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(30, optimizer, closure_of(optimizer, nn.Module(), lambda _: weight.sum() + 1e-6 * weight.square().sum()))
    assert optimizer.stats["psf_ratio"] < 1e-3 < optimizer.stats["rise"] / 3


def test_rho_rises() -> None:
    """Linearly from 0, also where a scheduler moves a group's own. Kills: a step counted from the wrong end, a lost warm-up."""
    weight = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))

    def make() -> ARSAM:
        return ARSAM(SGD([weight], lr=0.0), rho=0.8, rho_warmup=4, sampling=sampling.Always())

    optimizer, lengths = make(), []

    def loss_of(_: nn.Module) -> Tensor:
        if optimizer.perturbed:
            lengths.append(float((weight.detach() - torch.tensor([3.0, 4.0], dtype=torch.float64)).norm()))
        return weight.square().sum()

    for step in range(6):
        if step == 3:
            optimizer.param_groups[0]["sam_rho"] = 1.6
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = make()
            optimizer.load_state_dict(state)
        optimizer.step(closure_of(optimizer, nn.Module(), loss_of))
    assert lengths == pytest.approx([0.2, 0.4, 1.2, 1.6, 1.6]), "with rho 0 the first step takes one pass"


def test_the_simplest_call() -> None:
    """1.2 passes, whatever the length. Kills: the published rule as a default, a budget that needs the run's length."""
    model, loss_of = problem()
    for settings, passes in (({}, 1.2), ({"passes": 1.05}, 1.05), ({"passes": 2}, 2.0), ({"passes": 1}, 1.0)):
        optimizer = ARSAM(SGD(model.parameters(), lr=0.01), model, **settings)
        for _ in range(40):
            optimizer.step(closure_of(optimizer, model, loss_of))
        assert optimizer.stats["passes_per_step"] == pytest.approx(passes)
    with pytest.raises(ValueError, match="exclude each other"):
        ARSAM(SGD(model.parameters(), lr=0.1), passes=1.2, sampling=sampling.Always())
    with pytest.raises(ValueError, match="passes must lie in"):
        ARSAM(SGD(model.parameters(), lr=0.1), passes=2.5)
    published = ARSAM.published(SGD(model.parameters(), lr=0.1), model, rho=0.2, window=20)
    assert isinstance(published.sampling, sampling.Adaptive) and published.sampling.window == 20
    assert repr(published).startswith("ARSAM(sampling=Adaptive(") and "beta=0.7" in repr(published)


def test_other_settings_of_the_rules_are_refused() -> None:
    """By name; a state of the first version, which has none, loads. Kills: a run that silently goes on by another rule."""
    model, loss_of = problem()
    optimizer = ARSAM(AdamW(model.parameters()), passes=1.5)
    for _ in range(3):
        optimizer.step(closure_of(optimizer, model, loss_of))
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match="Budget\\(passes_per_step=1.5.*Budget\\(passes_per_step=1.2"):
        ARSAM(AdamW(model.parameters())).load_state_dict(copy.deepcopy(state))
    old = copy.deepcopy(state)
    old["arsam"] = {k: v for k, v in old["arsam"].items() if k not in ("version", "size", "last", "rho_warmup")}
    old["arsam"]["rules"] = ["Budget", "Decayed"]
    for group in old["param_groups"]:
        group["rho"], group["adaptive"] = 0.3, group.pop("sam_adaptive")
        del group["sam_rho"]
    resumed = ARSAM(AdamW(model.parameters()), passes=1.5)
    resumed.load_state_dict(old)
    assert counts(resumed) == counts(optimizer)
    assert resumed.param_groups[0]["sam_rho"] == 0.3 and "rho" not in resumed.param_groups[0]


def vit() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), nn.Linear(8, 2))


def muon_and_adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    if not hasattr(torch.optim, "Muon"):
        pytest.skip(f"torch {torch.__version__} has no Muon")
    return [torch.optim.Muon(matrices, lr=0.02), AdamW([p for p in model.parameters() if p.ndim != 2], lr=1e-2)]


def test_several_bases() -> None:
    """One e over all, one step, one state. Kills: a norm per base, a base that does not step, ids that clash in the state."""
    model = vit()
    bases = muon_and_adamw(model)
    optimizer = ARSAM(bases, model, passes=1.5, rho=0.1)
    x, y = torch.randn(16, 5, 6), torch.randint(2, (16,))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 0.99) for o in (*bases, optimizer)]
    loss_of = lambda m: nn.functional.cross_entropy(m(x).mean(1), y)
    closure = closure_of(optimizer, model, loss_of)
    first = float(closure().detach())
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.perturb():
        e = [p.detach() - w for p, w in zip(model.parameters(), before, strict=True)]
    assert float(torch.cat([x.flatten() for x in e]).norm()) == pytest.approx(0.1, rel=1e-4)
    for _ in range(15):
        loss = optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step()
    assert float(loss.detach()) < first
    assert all(not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert bases[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.99**30)
    other = copy.deepcopy(model)
    resumed = ARSAM(muon_and_adamw(other), other, passes=1.5, rho=0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for o, m in ((optimizer, model), (resumed, other)):
        torch.manual_seed(3)
        for _ in range(3):
            o.step(closure_of(o, m, loss_of))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with pytest.raises(ValueError, match="an optimizer before it"):
        ARSAM([bases[0], SGD(model.parameters(), lr=0.1)])
    with pytest.raises(TypeError, match="add_param_group of the one"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_modes_pass_through() -> None:
    """Schedule-free optimizers have them. Kills: a base that stays in training when it is evaluated."""

    class Free(SGD):
        mode = ""

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    base = Free([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer = ARSAM([base, SGD([nn.Parameter(torch.ones(2))], lr=0.1)])
    optimizer.train()
    assert base.mode == "train"
    optimizer.eval()
    assert base.mode == "eval"


def test_a_clipping_hook_may_return_its_norm() -> None:
    """On a gradient of zero it is falsy, and a hook that ends in `and None` returns it. Kills: torch's complaint about it."""
    weight = nn.Parameter(torch.ones(3))
    base = SGD([weight], lr=0.1)
    base.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_([weight], 1.0) and None)  # type: ignore[arg-type, return-value]
    optimizer = ARSAM(base, sampling=sampling.Never())
    (weight * 0).sum().backward()
    optimizer.step()
