"""ARSAM around every optimizer in torch's own test database, put through what torch asks of its optimizers.

torch keeps a database of its optimizers, their settings and the errors they must raise (`optim_db`), and runs one suite over
it. The checks of that suite are restated here for an ARSAM around each entry, in every setting and implementation the
database names for the CPU, and with every pair of a sampling and a reuse rule. What cannot apply is in `DOES_NOT_APPLY`, with
the reason.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn import Parameter
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from arsam import ARSAM, reuse, sampling, scaled_step

with torch.backends.__allow_nonbracketed_mutation():  # the import forbids setting flags, for torch's suite and for all others
    from torch.testing._internal.common_optimizers import (
        OptimizerErrorEnum,
        _get_optim_inputs_including_global_cliquey_kwargs,
        optim_db,
    )
hypothesis.settings.load_profile("default")  # nor are other tests to draw as few examples as torch's do

DOES_NOT_APPLY = {
    "LBFGS": "its step runs the closure itself, many times: refused when built",
    "SparseAdam": "takes sparse gradients alone, whose second pass has other indices: refused when built",
    "sparse gradients": "refused on an ascent, for the same reason; one-pass rules pass them on",
    "differentiable=True": "a step through which one differentiates; a perturbation and its undoing have no derivative",
    "capturable=True, foreach by default, peak memory, several devices": "asked on accelerators alone",
    "groups step like optimizers of their own": "one perturbation, with one norm, over all groups is what SAM is",
    "adaptive=True on complex weights": "|w| g depends on whether w is seen as one number or two",
}
INFOS = {info.optim_cls.__name__: info for info in optim_db if info.optim_cls.__name__ not in DOES_NOT_APPLY}
SAMPLING: dict[str, Callable[[], Any]] = {
    "always": sampling.Always,
    "never": sampling.Never,
    "periodic": lambda: sampling.Periodic(3),
    "bernoulli": lambda: sampling.Bernoulli(0.4, seed=1),
    "tail": lambda: sampling.Tail(0.4, 10),
    "budget": lambda: sampling.Budget(1.3, 10),
    "gradient norm": lambda: sampling.GradientNorm(0.0, 0.0, 10),
    "adaptive": lambda: sampling.Adaptive(window=4, blocks=2, monitor=1),
}
REUSE: dict[str, Callable[[], Any]] = {
    "nothing": reuse.Nothing,
    "decayed": lambda: reuse.Decayed(0.7, horizon=2),
    "auto": lambda: reuse.Decayed("auto", horizon=None),
    "orthogonal": reuse.Orthogonal,
}
RULES = [(s, r) for s in SAMPLING for r in REUSE if r != "auto" or hasattr(SAMPLING[s](), "spacing")]
SOME = [("periodic", "decayed"), ("adaptive", "orthogonal")]
INPUT = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.5])


each = pytest.mark.parametrize("name", INFOS)


def settings_of(name: str, skip: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """Keyword arguments of every setting of the database, times the implementations that the CPU has."""
    skip = ("differentiable", *skip)
    return [x.kwargs for x in _get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float32, INFOS[name], skip=skip)]


def parameters(name: str, dtype: torch.dtype = torch.float32, contiguous: bool = True) -> list[Parameter]:
    """A matrix and a bias; for Muon, which takes matrices alone, the bias is one too."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(10, 5), (10, 1) if name == "Muon" else (10,)]
    extra = () if contiguous else (2,)
    drawn = [torch.randn(*shape, *extra, generator=generator).to(dtype) for shape in shapes]
    return [Parameter(x if contiguous else x[..., 0]) for x in drawn]


def loss_of(params: list[Parameter]) -> Tensor:
    weight, bias = params
    return (weight.mv(INPUT.to(weight.dtype)) + bias.flatten()).square().sum()


def closure_of(optimizer: Optimizer, params: list[Parameter]) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(params)
        loss.backward()
        return loss

    return closure


def wrap(base: Optimizer, s: str = "periodic", r: str = "decayed", rho: float = 0.05) -> ARSAM:
    return ARSAM(base, rho=rho, sampling=SAMPLING[s](), reuse=REUSE[r]())


def make(name: str, params: Any, s: str = "periodic", r: str = "decayed", /, **settings: Any) -> ARSAM:
    return wrap(INFOS[name].optim_cls(params, **copy.deepcopy(settings)), s, r)


def same(x: Any, y: Any) -> bool:
    """Equal to the last bit, however deeply nested."""
    if isinstance(x, Tensor):
        return isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, list | tuple):
        return len(x) == len(y) and all(same(a, b) for a, b in zip(x, y, strict=True))
    return bool(x == y)


class Replay:
    """A plain optimizer beside an ARSAM, stepped on copies of the gradients that the ARSAM's base is handed."""

    def __init__(self, optimizer: ARSAM, build: Callable[[list[Tensor]], Optimizer]) -> None:
        self.params = [p for group in optimizer.param_groups for p in group["params"]]
        self.copies: list[Tensor] = [Parameter(p.detach().clone()) for p in self.params]
        self.plain, self.optimizer = build(self.copies), optimizer
        optimizer.base.register_step_pre_hook(self.step)

    def step(self, *_: Any) -> None:
        for p, copied in zip(self.params, self.copies, strict=True):
            copied.grad = None if p.grad is None else p.grad.clone()
        self.plain.step()

    def check(self) -> None:
        assert same(self.params, self.copies)
        assert same(self.plain.state_dict()["state"], self.optimizer.base.state_dict()["state"])


@pytest.mark.parametrize("rule", RULES, ids=" ".join)
@each
def test_the_base_steps_as_it_does_alone(name: str, rule: tuple[str, str]) -> None:
    """Kills: a base whose state, groups or weights are touched besides its gradient; a pass too many or too few."""
    params = parameters(name)
    optimizer = make(name, params, *rule)
    replay = Replay(optimizer, INFOS[name].optim_cls)
    closure, calls = closure_of(optimizer, params), []
    for _ in range(5):
        optimizer.step(lambda: (calls.append(1), closure())[1])
    replay.check()
    stats = optimizer.stats
    assert stats["steps"] == 5 and len(calls) == 5 + stats["ascents"]
    assert stats["ascents"] == {"always": 5, "never": 0, "periodic": 2}.get(rule[0], stats["ascents"])


@pytest.mark.parametrize(
    ("name", "rule"), [(n, r) for n in INFOS for r in RULES if n in ("SGD", "AdamW") or r in SOME], ids=str
)
def test_copies_pickles_and_states_go_on_bitwise(name: str, rule: tuple[str, str]) -> None:
    """Kills: a rule, a kept vector or a counter that a state, a pickle or a copy loses."""
    params = parameters(name)
    optimizer = make(name, params, *rule)
    for _ in range(5):
        optimizer.step(closure_of(optimizer, params))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded_params = [Parameter(p.detach().clone()) for p in params]
    loaded = make(name, loaded_params, *rule)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    others = [
        copy.deepcopy((params, optimizer)),
        pickle.loads(pickle.dumps((params, optimizer))),
        (loaded_params, loaded),
    ]
    for some, other in [(params, optimizer), *others]:
        for _ in range(4):
            other.step(closure_of(other, some))
    for some, other in others:
        assert same(some, params)
        assert same(other.state_dict(), optimizer.state_dict())


@each
def test_never_is_the_base(name: str) -> None:
    """Every setting. Kills: anything that ARSAM does on a one-pass step."""
    for settings in settings_of(name):
        params, others = parameters(name), parameters(name)
        optimizer = make(name, params, "never", **settings)
        plain = INFOS[name].optim_cls(others, **copy.deepcopy(settings))
        for _ in range(4):
            assert torch.equal(optimizer.step(closure_of(optimizer, params)), plain.step(closure_of(plain, others)))
        assert same(params, others), settings
        assert same(
            optimizer.base.state_dict(), {**plain.state_dict(), "param_groups": optimizer.base.state_dict()["param_groups"]}
        )


@pytest.mark.parametrize(
    ("scheduled", "contiguous"), [(False, True), (False, False), (True, True)], ids=["", "strided", "scheduled"]
)
@each
def test_goes_in_the_right_direction(name: str, scheduled: bool, contiguous: bool) -> None:
    """Every setting, with the schedulers of the database. Kills: a lost sign, a lost update, an lr that no scheduler moves."""
    for schedulers in INFOS[name].scheduler_inputs if scheduled else [()]:
        # torch's fused loops read strided weights wrongly: SGD alone lets the loss rise from 0.9 to 71
        skip = () if contiguous and not scheduled else ("fused",) if not scheduled else ("fused", "foreach")
        for settings in settings_of(name, skip):
            params = parameters(name, contiguous=contiguous)
            optimizer = make(name, params, **settings)
            closure = closure_of(optimizer, params)
            moving = [build(optimizer) for build in schedulers]
            before = float(closure().detach())
            for _ in range(10):
                loss = optimizer.step(closure)
                for scheduler in moving:
                    scheduler.step(*[float(loss.detach())] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else [])
            after = float(closure().detach())
            assert after > before if settings.get("maximize") else after < before, settings


@pytest.mark.parametrize("rule", [("always", "nothing"), ("periodic", "decayed"), ("periodic", "orthogonal")], ids=" ".join)
@pytest.mark.parametrize(
    "name", [name for name, info in INFOS.items() if "maximize" in inspect.signature(info.optim_cls).parameters]
)
def test_maximizing_mirrors_minimizing(name: str, rule: tuple[str, str]) -> None:
    """The worst case near w of -L under maximize is that of L. Kills: a perturbation towards larger L, whatever is sought."""
    params, mirrored = parameters(name, torch.float64), parameters(name, torch.float64)
    optimizer, other = make(name, params, *rule), make(name, mirrored, *rule, maximize=True)
    for _ in range(5):
        optimizer.step(closure_of(optimizer, params))

        def closure() -> Tensor:
            other.zero_grad()
            loss = -loss_of(mirrored)
            loss.backward()
            return loss

        other.step(closure)
        torch.testing.assert_close([p.grad for p in mirrored], [-p.grad for p in params])
    torch.testing.assert_close(mirrored, params)


@each
def test_implementations_agree(name: str) -> None:
    """foreach and fused against the plain loop, with a layer frozen for a while and a step without gradients.

    Kills: vectors that are mixed into the wrong tensor when some have no gradient.
    """
    implementations = [x for x in ("foreach", "fused") if x in INFOS[name].supported_impls]
    for settings in settings_of(name, skip=("foreach", "fused")):
        runs = []
        for flag in (None, *implementations):
            torch.manual_seed(0)
            bias = name != "Muon"
            model = nn.Sequential(
                nn.Linear(5, 6, bias), nn.Sigmoid(), nn.Linear(6, 4, bias), nn.Sigmoid(), nn.Linear(4, 1, bias)
            )
            model.double()
            chosen = {**settings, **dict.fromkeys(implementations, False), **({flag: True} if flag else {})}
            optimizer = make(name, model.parameters(), **chosen)
            for step in range(8):
                model[2].requires_grad_(step not in (3, 4))

                def closure(step: int = step, model: nn.Module = model, optimizer: ARSAM = optimizer) -> Tensor:
                    optimizer.zero_grad()
                    loss = model(INPUT.double()).sum()
                    if step != 2:
                        loss.backward()
                    return loss

                optimizer.step(closure)
            runs.append([p.detach() for p in model.parameters()])
        for run in runs[1:]:
            torch.testing.assert_close(run, runs[0], msg=lambda m, s=settings: f"{s}: {m}")


@each
def test_lr_as_a_tensor(name: str) -> None:
    """Kills: an lr that is copied, so that the tensor's owner no longer moves it."""
    compared = 0
    for settings in settings_of(name):
        runs = []
        for lr in (1e-3, torch.tensor(1e-3)):
            params = parameters(name)
            try:
                optimizer = make(name, params, **{**settings, "lr": lr})
            except ValueError:  # torch's own: some implementations take no tensor
                continue
            scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
            for _ in range(4):
                optimizer.step(closure_of(optimizer, params))
                scheduler.step()
            assert type(optimizer.param_groups[0]["lr"]) is type(lr)
            runs.append([p.detach() for p in params])
        if len(runs) == 2:
            compared += 1
            torch.testing.assert_close(runs[1], runs[0])
    assert compared


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 0.9**t),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.5, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, 0.9),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")  # torch 2.6 at its own SequentialLR
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_moves_it_as_it_moves_the_base(scheduler: str) -> None:
    """lr, momentum and betas, over two groups. Kills: groups or defaults that are not the base's own; step wrapped wrongly."""
    builds: list[Callable[[Any], Optimizer]] = [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9)),
    ]
    for build in builds:
        seen = []
        for wrapped in (False, True):
            params = parameters("SGD")
            optimizer = build([{"params": params[:1]}, {"params": params[1:], "lr": 0.05}])
            optimizer = wrap(optimizer) if wrapped else optimizer
            moving = SCHEDULERS[scheduler](optimizer)
            values = []
            for _ in range(6):
                optimizer.step(closure_of(optimizer, params))
                moving.step(*[1.0] if scheduler == "ReduceLROnPlateau" else [])
                values.append([(g["lr"], g.get("momentum"), g.get("betas")) for g in optimizer.param_groups])
            seen.append(values)
        assert seen[0] == seen[1]
        assert len({str(x) for x in seen[0]}) > 1


@pytest.mark.parametrize("rule", [("periodic", "decayed"), ("periodic", "orthogonal")], ids=" ".join)
@pytest.mark.parametrize("name", [name for name, info in INFOS.items() if info.supports_complex])
def test_complex_weights_are_pairs_of_real_ones(name: str, rule: tuple[str, str]) -> None:
    """Beside a real tensor. Kills: a complex norm or coefficient; a perturbation or a projection of another pair of numbers."""
    for settings in settings_of(name, skip=("fused",)):
        torch.manual_seed(0)
        start = [torch.randn(4, 3, dtype=torch.complex128), torch.randn(3, dtype=torch.float64)]
        factors = torch.randn(4, 3, dtype=torch.complex128)
        as_complex = [Parameter(x.clone()) for x in start]
        as_real = [Parameter(torch.view_as_real(start[0]).clone()), Parameter(start[1].clone())]
        for params in (as_complex, as_real):
            optimizer = make(name, params, *rule, **settings)

            def closure(params: list[Parameter] = params, optimizer: ARSAM = optimizer) -> Tensor:
                optimizer.zero_grad()
                z = params[0] if params[0].is_complex() else torch.view_as_complex(params[0])
                loss = (z * factors).sum(0).abs().pow(4).sum() + (z.imag.sum(0) * params[1]).square().sum()
                loss.backward()
                return loss

            for _ in range(2):
                optimizer.step(closure)
        torch.testing.assert_close(torch.view_as_real(as_complex[0].detach()), as_real[0].detach(), msg=str(settings))
        torch.testing.assert_close(as_complex[1], as_real[1], msg=str(settings))


@each
def test_without_gradients_nothing_moves(name: str) -> None:
    """Kills: a kept vector that is added to a tensor without a gradient; a division by the norm of nothing."""
    for settings in settings_of(name):
        params = parameters(name)
        optimizer = make(name, params, "periodic", "decayed", **settings)
        optimizer.step(closure_of(optimizer, params))
        before = copy.deepcopy(params)
        optimizer.zero_grad()
        for _ in range(4):  # the fourth step is an ascent
            optimizer.step(lambda: torch.ones(()))
        assert same(params, before), settings


@pytest.mark.parametrize("rule", [("always", "decayed"), ("always", "orthogonal"), ("never", "nothing")], ids=" ".join)
@each
def test_zero_gradients_move_what_the_base_moves(name: str, rule: tuple[str, str]) -> None:
    """Nothing, but for a base that decays weights. Kills: 0 / 0 in the perturbation or in a projection."""
    for settings in settings_of(name):
        params = parameters(name)
        optimizer = make(name, params, *rule, **settings)
        replay = Replay(optimizer, lambda p, s=settings: INFOS[name].optim_cls(p, **copy.deepcopy(s)))

        def closure(params: list[Parameter] = params) -> Tensor:
            for p in params:
                p.grad = torch.zeros_like(p)
            return torch.zeros(())

        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # that a second pass which changes nothing is worth a word is not asked
            for _ in range(3):
                optimizer.step(closure)
        assert not any(p.grad.any() for p in params), settings
        replay.check()


@each
def test_groups_keep_their_own_settings(name: str) -> None:
    """Kills: groups that are merged, reordered or given another's lr or weight decay."""
    params = parameters(name)
    cls = INFOS[name].optim_cls

    def groups(params: list[Any]) -> list[dict[str, Any]]:
        return [{"params": params[:1], "lr": 3e-3}, {"params": params[1:], "weight_decay": 0.3}]

    own = groups if "weight_decay" in cls(params).defaults else lambda p: [{"params": p[:1], "lr": 3e-3}, {"params": p[1:]}]
    optimizer = wrap(cls(own(params)))
    replay = Replay(optimizer, lambda p: cls(own(p)))
    for _ in range(5):
        optimizer.step(closure_of(optimizer, params))
    replay.check()


@each
def test_a_group_that_joins_later(name: str) -> None:
    """Kills: kept vectors that are told apart by place; a group without rho."""
    params = parameters(name)
    alone = torch.optim.Adagrad(params[:1])
    alone.add_param_group({"params": params[1:]})
    if name == "Adagrad" and len(alone.state) < len(params):
        pytest.skip(f"the Adagrad of torch {torch.__version__} takes no group later")
    optimizer = make(name, params[:1])
    optimizer.step(closure_of(optimizer, params))
    optimizer.add_param_group({"params": params[1:]})
    before = copy.deepcopy(params)
    for _ in range(4):
        optimizer.step(closure_of(optimizer, params))
    assert len(optimizer.base.param_groups) == 2
    assert not any(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_what_a_base_refuses_in_a_step() -> None:
    """The errors of the database that come with a step. Kills: a step that goes around the base's."""
    seen = 0
    for name, info in INFOS.items():
        for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
            if case.error_on == OptimizerErrorEnum.STEP_ERROR:
                optimizer = make(name, case.optimizer_error_input.params, "never", **case.optimizer_error_input.kwargs)
                with pytest.raises(case.error_type, match=case.error_regex):
                    optimizer.step(lambda: None)
                seen += 1
    assert seen


def test_groups_that_a_base_refuses() -> None:
    """Kills: an add_param_group that goes around the base's checks, or fails before them."""
    weight, other = (Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = wrap(torch.optim.SGD([("weight", weight)], lr=0.1))
    cases: list[tuple[Any, Any, str]] = [
        (TypeError, [other], "must be a dict"),
        (ValueError, {"params": [("again", weight)]}, "more than one parameter group"),
        (ValueError, {"params": [other]}, "names"),
        (ValueError, {"params": [("x", other * 2)]}, "non-leaf"),
        (TypeError, {"params": [("x", "tensor")]}, "only optimize Tensors"),
    ]
    for error, group, match in cases:
        with pytest.raises(error, match=match):
            optimizer.add_param_group(group)
    with pytest.warns(UserWarning, match="duplicate"):
        optimizer.add_param_group({"params": [("x", other), ("y", other)]})


@pytest.mark.parametrize("name", ["LBFGS", "SparseAdam"])
def test_a_base_that_cannot_work_is_refused_when_built(name: str) -> None:
    """Kills: an error that comes out of the base's step, hours later."""
    base = getattr(torch.optim, name)([Parameter(torch.ones(2))])
    with pytest.raises((TypeError, ValueError), match=name):
        ARSAM(base, sampling=sampling.Always())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("name", [name for name, info in INFOS.items() if info.supports_sparse])
def test_sparse_gradients(name: str) -> None:
    """A one-pass step takes them, an ascent refuses them by name. Kills: a second pass that mixes other rows' gradients."""
    for s in ("never", "always"):
        torch.manual_seed(0)
        table = nn.Embedding(5, 3, sparse=True)
        optimizer = make(name, table.parameters(), s, foreach=False)
        replay = Replay(optimizer, lambda p: INFOS[name].optim_cls(p, foreach=False))

        def closure(table: nn.Embedding = table, optimizer: ARSAM = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = table(torch.tensor([1, 3, 3])).square().sum()
            loss.backward()
            return loss

        if s == "never":
            optimizer.step(closure)
            replay.check()
        else:
            with pytest.raises(RuntimeError, match="dense gradients"):
                optimizer.step(closure)


@each
def test_step_hooks_run_once_and_in_order(name: str) -> None:
    """Global before own before the step, own after it before global, on ascents too. Kills: hooks that run twice."""
    params = parameters(name)
    optimizer = make(name, params, "always")
    order: list[str] = []

    def noting(word: str) -> Callable[..., None]:
        return lambda *_: order.append(word)

    handles = [
        register_optimizer_step_pre_hook(noting("global pre")),
        register_optimizer_step_post_hook(noting("global post")),
        optimizer.register_step_pre_hook(noting("pre")),
        optimizer.register_step_post_hook(noting("post")),
        optimizer.base.register_step_pre_hook(noting("base pre")),
        optimizer.base.register_step_post_hook(noting("base post")),
    ]
    try:
        for _ in range(2):
            optimizer.step(closure_of(optimizer, params))
    finally:
        for handle in handles:
            handle.remove()
    assert order == 2 * ["global pre", "pre", "base pre", "base post", "post", "global post"]
    optimizer.step(closure_of(optimizer, params))
    assert len(order) == 12


@each
def test_a_step_pre_hook_may_replace_the_closure(name: str) -> None:
    """torch's contract: (args, kwargs) returned by a hook are what step gets. Kills: a step that looks past its hooks."""
    params = parameters(name)
    optimizer = make(name, params, "always")
    closure, calls = closure_of(optimizer, params), []

    def hook(own: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return (own, lambda: (calls.append(1), args[1]())[1]), kwargs

    optimizer.register_step_pre_hook(hook)
    optimizer.step(closure)
    assert len(calls) == 2


@each
def test_state_dict_hooks(name: str) -> None:
    """Before and after saving, in order, and what a hook returns is the state. Kills: hooks that never run."""
    params = parameters(name)
    optimizer = make(name, params)
    optimizer.step(closure_of(optimizer, params))
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("pre"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append("post"))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "mine": 1})
    state = optimizer.state_dict()
    assert seen == ["pre", "post"] and state["mine"] == 1 and "arsam" in state


@each
def test_load_state_dict_hooks(name: str) -> None:
    """A pre-hook may change or replace the state, prepended ones first. Kills: hooks that never run."""
    params = parameters(name)
    optimizer = make(name, params)
    state = optimizer.state_dict()
    lr = state["param_groups"][0]["lr"]

    def to(value: float) -> Callable[..., dict[str, Any]]:
        def hook(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
            return {**state, "param_groups": [{**group, "lr": value} for group in state["param_groups"]]}

        return hook

    loaded: list[float] = []
    optimizer.register_load_state_dict_post_hook(lambda o: loaded.append(o.param_groups[0]["lr"]))
    optimizer.register_load_state_dict_pre_hook(to(0.25))
    optimizer.load_state_dict(state)
    optimizer.register_load_state_dict_pre_hook(to(0.5), prepend=True)
    optimizer.load_state_dict(state)
    assert loaded == [0.25, 0.25]
    assert state["param_groups"][0]["lr"] == lr


@pytest.mark.parametrize("named", [(False, True), (True, False), (True, True)], ids=str)
@each
def test_named_parameters(name: str, named: tuple[bool, bool]) -> None:
    """States move between optimizers with and without names. Kills: kept vectors told apart by name, names that are lost."""

    def given(params: list[Parameter], with_names: bool) -> Any:
        return [(f"p{i}", p) for i, p in enumerate(params)] if with_names else params

    params = parameters(name)
    optimizer = make(name, given(params, named[0]))
    for _ in range(3):
        optimizer.step(closure_of(optimizer, params))
    others = copy.deepcopy(params)
    other = make(name, given(others, named[1]))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        optimizer.step(closure_of(optimizer, params))
        other.step(closure_of(other, others))
    assert same(params, others)
    assert other.state_dict()["param_groups"][0]["param_names"] == ["p0", "p1"]


@each
def test_loading_leaves_the_given_state_alone(name: str) -> None:
    """Kills: a state that shares its tensors with the optimizer that loaded it."""
    for settings in settings_of(name):
        params = parameters(name)
        optimizer = make(name, params, **settings)
        for _ in range(2):
            optimizer.step(closure_of(optimizer, params))
        state = copy.deepcopy(optimizer.state_dict())
        given = copy.deepcopy(state)
        others = copy.deepcopy(params)
        other = make(name, others, **settings)
        other.load_state_dict(given)
        for _ in range(3):
            other.step(closure_of(other, others))
        assert same(given["arsam"], state["arsam"]), settings


@each
def test_states_of_older_torches_load(name: str) -> None:
    """Without the flags that came later, and with step counts as numbers. Kills: groups rebuilt from the state alone."""
    for settings in settings_of(name):
        params = parameters(name)
        optimizer = make(name, params, **settings)
        for _ in range(3):
            optimizer.step(closure_of(optimizer, params))
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            for flag in INFOS[name].not_og_supported_flags:
                group.pop(flag, None)
        for own in state["state"].values():
            if torch.is_tensor(own.get("step")):
                own["step"] = own["step"].item()
        optimizer.load_state_dict(state)
        optimizer.step(closure_of(optimizer, params))
        assert optimizer.stats["steps"] == 4


@each
def test_a_copy_has_every_public_attribute(name: str) -> None:
    """Kills: an attribute that is left out of copies and pickles."""

    def public(x: object) -> set[str]:
        return {k for k in vars(x) if not k.startswith("_")}

    params = parameters(name)
    optimizer = make(name, params)
    optimizer.step(closure_of(optimizer, params))
    assert public(copy.deepcopy(optimizer)) == public(optimizer) == public(pickle.loads(pickle.dumps(optimizer)))


class Counting(ARSAM):
    """A subclass with an attribute of its own."""

    note = ""


@each
def test_a_subclass_keeps_its_attributes(name: str) -> None:
    """Kills: a __getstate__ that knows the class's own attributes alone."""
    optimizer = Counting(INFOS[name].optim_cls(parameters(name)), sampling=sampling.Always(), reuse=reuse.Nothing())
    optimizer.note = "mine"
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is Counting and other.note == "mine"


@each
def test_it_can_be_printed(name: str) -> None:
    """Kills: a repr that says nothing of the base or of rho."""
    for settings in settings_of(name):
        printed = repr(make(name, parameters(name), **settings))
        assert name in printed and "0.05" in printed and "Periodic" in printed


@each
def test_a_base_that_has_stepped_goes_on(name: str) -> None:
    """Kills: state of the base that is dropped when it is wrapped."""
    params, others = parameters(name), parameters(name)
    base, plain = INFOS[name].optim_cls(params), INFOS[name].optim_cls(others)
    for _ in range(3):
        base.step(closure_of(base, params))
    optimizer = wrap(base, "never", "nothing")
    for _ in range(3):
        plain.step(closure_of(plain, others))
    for _ in range(3):
        optimizer.step(closure_of(optimizer, params))
        plain.step(closure_of(plain, others))
    assert same(params, others)


@each
def test_closures_run_with_gradients_on(name: str) -> None:
    """Under no_grad too, and the loss of the first pass comes back. Kills: a second pass without a graph."""
    params = parameters(name)
    optimizer = make(name, params, "always")
    expected = float(loss_of(params).detach())
    with torch.no_grad():
        assert float(optimizer.step(closure_of(optimizer, params)).detach()) == expected
    assert optimizer.stats["ascents"] == 1


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@each
def test_another_default_dtype(name: str, default: torch.dtype) -> None:
    """Kills: a constant that takes the default dtype and casts weights, gradients or kept vectors with it."""
    params = parameters(name)
    torch.set_default_dtype(default)
    try:
        optimizer = make(name, params)
        replay = Replay(optimizer, INFOS[name].optim_cls)
        for _ in range(4):
            optimizer.step(closure_of(optimizer, params))
    finally:
        torch.set_default_dtype(torch.float32)
    replay.check()
    assert all(x.dtype == torch.float32 for x in [*params, *optimizer.state_dict()["arsam"]["kept"].values()])


@each
def test_mixed_dtypes_in_a_group(name: str) -> None:
    """Kills: one dtype for all kept vectors, a norm in the first one's."""
    for settings in settings_of(name):
        single, double = parameters(name), parameters(name, torch.float64)
        mixed = [single[0], double[1]]
        runs = []
        for params in (mixed, parameters(name, torch.float64)):
            optimizer = make(name, params, **settings)

            def closure(params: list[Parameter] = params, optimizer: ARSAM = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = (params[0].mv(INPUT.to(params[0].dtype)) + params[1].flatten()).square().sum()
                loss.backward()
                return loss

            for _ in range(4):
                optimizer.step(closure)
            runs.append([p.detach().double() for p in params])
        assert [p.dtype for p in mixed] == [torch.float32, torch.float64]
        torch.testing.assert_close(
            *runs, atol=2e-3 if name == "Muon" else 1e-4, rtol=1e-4, msg=lambda m, s=settings: f"{s}: {m}"
        )


@each
def test_loss_scaling(name: str) -> None:
    """Every implementation. Kills: a kept vector or a gradient in units of the scaled loss."""
    for settings in settings_of(name):
        runs = []
        for scale in (1.0, 2.0**14):
            params = parameters(name)
            optimizer = make(name, params, **settings)
            scaler = GradScaler("cpu", init_scale=scale)

            def closure(params: list[Parameter] = params, optimizer: ARSAM = optimizer, scaler: GradScaler = scaler) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(params)
                scaler.scale(loss).backward()  # type: ignore[union-attr]
                return loss

            for _ in range(4):
                scaled_step(optimizer, closure, scaler)
            runs.append(params)
        assert same(*runs), settings
