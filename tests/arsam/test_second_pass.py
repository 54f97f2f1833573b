"""Both passes are one function: what the model or the closure draws, what it counts, and whose gradients it touches."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.optim import SGD

from arsam import ARSAM, reuse, sampling

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
RHO = 0.3


class OwnGenerator(nn.Module):
    """Noise from a generator of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(x.shape, generator=self.generator)


class Checkpointed(nn.Module):
    """Its inner part runs forward once more in the backward pass."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)  # type: ignore[return-value]


def network(kind: str = "dropout") -> nn.Module:
    torch.manual_seed(0)
    noise = OwnGenerator() if kind == "own generator" else nn.Dropout(0.5)
    net = nn.Sequential(nn.Linear(6, 16), noise, nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 2))
    return Checkpointed(net) if kind == "checkpointed" else net


def make(model: nn.Module, given: nn.Module | None, **settings: Any) -> ARSAM:
    rules: dict[str, Any] = {"sampling": sampling.Periodic(2), "reuse": reuse.Decayed(0.9, None), **settings}
    return ARSAM(SGD(model.parameters(), lr=0.0), given, rho=RHO, **rules)


def loss_of(call: Callable[[Tensor], Tensor], x: Tensor = X) -> Tensor:
    return call(x).square().mean()


def by_closure(optimizer: ARSAM, call: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(call)
        loss.backward()
        return loss

    optimizer.step(closure)


def by_hand(optimizer: ARSAM, call: Any) -> None:
    optimizer.zero_grad()
    loss_of(call).backward()
    if optimizer.due:
        with optimizer.perturb():
            loss_of(call).backward()
    optimizer.step()


def in_micro_batches(optimizer: ARSAM, call: Any) -> None:
    def backward() -> None:
        for part in X.chunk(2):
            (loss_of(call, part) / 2).backward()

    optimizer.zero_grad()
    backward()
    if optimizer.due:
        with optimizer.perturb():
            backward()
    optimizer.step()


def by_a_closure_that_perturbs(optimizer: ARSAM, call: Any) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(call)
        loss.backward()
        if optimizer.due:
            with optimizer.perturb():
                loss_of(call).backward()
        return loss

    optimizer.step(closure)


def with_mixup(optimizer: ARSAM, call: Any) -> None:
    """Drawn inside the closure, by numpy and by torch."""

    def closure() -> Tensor:
        optimizer.zero_grad()
        share, order = float(np.random.rand()), torch.randperm(len(X))
        loss = loss_of(call, share * X + (1 - share) * X[order])
        loss.backward()
        return loss

    optimizer.step(closure)


def steps(count: int, loop: Callable[..., None], optimizer: ARSAM, call: Any) -> None:
    for _ in range(count):
        loop(optimizer, call)


LOOPS = [by_closure, by_hand, in_micro_batches, by_a_closure_that_perturbs, with_mixup]


def psf(optimizer: ARSAM) -> Tensor:
    return torch.cat([x.flatten() for x in optimizer.state_dict()["arsam"]["kept"].values()])


def expected(kind: str, loop: Callable[..., None], state: Tensor) -> tuple[Tensor, Tensor]:
    """(g_s - g with the generators set back by hand, what the next draw is after one pass)."""
    gradients = []
    drawn = torch.zeros(())
    for shift in (0, 1):
        model = network(kind)
        if shift:
            norm = gradients[0].norm()
            parts = gradients[0].split([p.numel() for p in model.parameters()])
            with torch.no_grad():
                for p, g in zip(model.parameters(), parts, strict=True):
                    p.add_(RHO * g.view_as(p) / norm)
        optimizer = ARSAM(SGD(model.parameters(), lr=0.0), model, sampling=sampling.Never())
        torch.set_rng_state(state)
        np.random.seed(4)
        loop(optimizer, model)
        if not shift:
            drawn = torch.rand(3)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    return gradients[1] - gradients[0], drawn


@pytest.mark.parametrize("kind", ["dropout", "own generator", "checkpointed", "compiled"])
@pytest.mark.parametrize("loop", LOOPS)
def test_random_numbers_are_those_of_the_first_pass(kind: str, loop: Callable[..., None]) -> None:
    """And afterwards the generators go on as after one pass. Kills: masks drawn anew, one mask for all micro-batches."""
    model = network(kind)
    call: Any = torch.compile(model, backend="eager") if kind == "compiled" else model
    optimizer = make(model, call)
    state = torch.get_rng_state()
    wanted, drawn = expected(kind, loop, state)
    torch.set_rng_state(state)
    np.random.seed(4)
    loop(optimizer, call)
    assert torch.equal(torch.rand(3), drawn)
    torch.testing.assert_close(psf(optimizer), wanted, atol=1e-6, rtol=1e-5)
    loop(optimizer, call)
    assert optimizer.stats["steps"] == 2 and optimizer.stats["ascents"] == 1


@pytest.mark.parametrize("loop", [by_closure, by_hand])
def test_the_passes_may_draw_apart(loop: Callable[..., None]) -> None:
    """For research. Kills: a switch that does nothing."""
    sizes = []
    for same in (True, False):
        model = network()
        optimizer = make(model, model, same_randomness=same)
        optimizer.param_groups[0]["sam_rho"] = 1e-3
        torch.manual_seed(5)
        loop(optimizer, model)
        sizes.append(optimizer.stats["psf_ratio"])
    assert sizes[1] > 0.5 > 0.1 > sizes[0]


def test_evaluation_between_steps_is_not_recorded() -> None:
    """Kills: a replay that is out of step with the passes."""
    model = network()
    optimizer = make(model, model, sampling=sampling.Always())
    optimizer.param_groups[0]["sam_rho"] = 1e-3
    for _ in range(3):
        by_hand(optimizer, model)
        with torch.no_grad():
            model.eval()(X)
        model.train()
    assert optimizer.stats["psf_ratio"] < 0.1


def test_calls_that_the_passes_do_not_share() -> None:
    """A metric, a teacher, an evaluation in the first pass only. Kills: the masks of another call, in silence."""

    def look(kind: str, model: nn.Module) -> None:
        torch.rand(5)
        if kind == "metric":
            with torch.no_grad():
                model(X)
        if kind == "evaluation":
            model.eval()
            model(X)
            model.train()

    for kind in ("", "metric", "evaluation"):
        model, seen = network(), []
        optimizer = make(model, model)
        model[1].register_forward_hook(lambda m, x, y, s=seen: s.append((m.training, torch.is_grad_enabled(), y != 0)))  # type: ignore[index]
        look(kind, model)
        loss_of(model).backward()
        look(kind, model)
        with optimizer.perturb():
            loss_of(model).backward()
        optimizer.step()
        masks = [mask for training, gradients, mask in seen if training and gradients]
        assert len(masks) == 2 and torch.equal(*masks), kind


def test_a_batch_that_was_skipped_is_told() -> None:
    """Without zero_grad after it, its call is still on record. Kills: its masks in the next second pass, silently."""
    model = network()
    optimizer = make(model, model, sampling=sampling.Always())
    by_hand(optimizer, model)
    loss_of(model)  # say, its loss was NaN
    loss_of(model).backward()
    with pytest.warns(UserWarning, match="also where the batch before was skipped"), optimizer.perturb():
        loss_of(model).backward()
    optimizer.step()
    for _ in range(3):
        loss_of(model)
        by_hand(optimizer, model)  # begins with zero_grad


@pytest.mark.parametrize(
    "draw", [torch.rand, lambda _: np.random.rand(), lambda _: random.random()], ids=["torch", "numpy", "python"]
)
def test_what_is_drawn_before_the_model_is_told(draw: Callable[[int], Any]) -> None:
    """MixUp in both passes of a loop that owns its backward. Kills: two passes over two batches, in silence."""
    model = network("plain").eval()
    optimizer = make(model, model)
    loss_of(model, X * float(draw(1))).backward()
    with pytest.warns(UserWarning, match="outside of it once"), optimizer.perturb():
        loss_of(model, X * float(draw(1))).backward()
    optimizer.step()


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_scripted_model() -> None:
    """It takes no hooks, and needs none in a closure. Kills: an error when the optimizer is built."""
    model: Any = torch.jit.script(network())
    optimizer = make(model, model, sampling=sampling.Always())
    optimizer.param_groups[0]["sam_rho"] = 1e-3
    by_closure(optimizer, model)
    assert optimizer.stats["psf_ratio"] < 0.1


@pytest.mark.parametrize("given", [False, True], ids=["no model", "another module called"])
def test_masks_that_cannot_be_had_are_told(given: bool) -> None:
    """Once, with what to write. Kills: a silent PSF of mask noise."""
    model = network()
    optimizer = make(model, model if given else None, sampling=sampling.Always())
    with pytest.warns(UserWarning, match="ARSAM\\(base, model\\)|the very module") as told:
        steps(3, by_hand, optimizer, model.forward)  # goes around the module's call
    assert len(told) == 1


def test_generators_go_on_as_after_one_pass() -> None:
    """Also where the second pass draws what it likes. Kills: a data order that depends on the number of ascents."""
    model = network()
    optimizer = make(model, None, sampling=sampling.Always())
    torch.manual_seed(5)
    loss_of(model)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="random numbers were drawn"):
        by_hand(optimizer, model)
    assert torch.equal(torch.rand(3), drawn)


def test_copies_of_the_model_leave_the_optimizer_behind() -> None:
    """As averages of weights are made. Kills: a hook that takes optimizer and PSF along, or answers for a copy."""
    model = network()
    optimizer = make(model, model)
    by_hand(optimizer, model)
    copied, pickled = copy.deepcopy(model), pickle.dumps(model)
    assert len(pickled) < 20_000
    assert all(hook._called is None for m in (copied, pickle.loads(pickled)) for hook in m._forward_pre_hooks.values())
    both = copy.deepcopy((model, optimizer))
    torch.manual_seed(1)
    for _ in range(2):
        by_hand(optimizer, model)
    torch.manual_seed(1)
    for _ in range(2):
        by_hand(both[1], both[0])
    assert torch.equal(psf(optimizer), psf(both[1]))
    del optimizer
    assert len(model._forward_pre_hooks) == 0


class Queue(nn.Module):
    """Buffers that a forward pass replaces, writes to, or leaves alone."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("queue", "count", "fixed"):
            self.register_buffer(name, torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.queue = self.queue + x.detach().mean()
        self.count.add_(1)  # type: ignore[operator]
        return x


def evonorm() -> nn.Module:
    from timm.layers import EvoNorm2dB0

    return nn.Sequential(nn.Unflatten(1, (6, 1, 1)), EvoNorm2dB0(6), nn.Flatten())


STATISTICS = {
    "queue": Queue,
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "EvoNorm": evonorm,
    "BatchNorm switched on by the pass": lambda: nn.BatchNorm1d(6).eval(),
}


@pytest.mark.parametrize("kind", STATISTICS)
def test_buffers_are_put_back(kind: str) -> None:
    """Whatever moves them. Kills: a list of classes in place of the effect."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), STATISTICS[kind](), nn.Linear(6, 2))
    other = copy.deepcopy(model)
    optimizer = make(model, model, sampling=sampling.Always())

    def call(x: Tensor) -> Tensor:
        return model.train()(x)

    by_closure(optimizer, call)
    other.train()(X)
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(a, b), name


def test_statistics_without_a_model_are_told() -> None:
    """Once. Kills: statistics that count the batches of ascents twice, silently."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    optimizer = make(model, None, sampling=sampling.Always())
    with pytest.warns(UserWarning, match="running statistics \\(BatchNorm1d\\).*ARSAM\\(base, model\\)") as told:
        steps(3, by_closure, optimizer, model)
    assert len(told) == 1


def test_statistics_of_another_module_are_told() -> None:
    """A head is trained, and the backbone before it counts. Kills: statistics that move though a model is given, silently."""
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    optimizer = make(model[2], model[2], sampling=sampling.Always())
    with pytest.warns(UserWarning, match="running statistics \\(BatchNorm1d\\).*holds all that the passes run") as told:
        steps(3, by_closure, optimizer, model)
    assert len(told) == 1


@pytest.mark.parametrize("zeroes", [False, True])
def test_another_optimizer_of_the_same_model_has_its_own_gradient(zeroes: bool) -> None:
    """A head beside a backbone. Kills: a gradient that the second pass doubles, or takes at w + e."""
    model = network("plain").eval()
    backbone, head = model[0], model[4]  # type: ignore[index]
    optimizer = ARSAM(SGD(backbone.parameters(), lr=0.0), model, rho=RHO, sampling=sampling.Always())
    loss_of(model).backward()
    wanted = head.weight.grad.clone()
    model.zero_grad()

    def closure() -> Tensor:
        (model if zeroes else optimizer).zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(head.weight.grad, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_around_both_passes(dtype: torch.dtype) -> None:
    """torch keeps half-precision copies of the weights until the block ends. Kills: a second pass at w."""
    ratios = []
    for around in (False, True):
        model = network().eval()
        optimizer = make(model, model, sampling=sampling.Always())
        with torch.autocast("cpu", dtype, enabled=around):
            for _ in range(2):
                by_closure(optimizer, lambda x, m=model: torch.autocast("cpu", dtype)(m)(x).float())
        ratios.append(optimizer.stats["psf_ratio"])
    assert ratios[0] == pytest.approx(ratios[1]) and ratios[0] > 0.1


def test_a_model_knows_of_the_second_pass() -> None:
    """By `perturbed`. Kills: a flag that is not set inside, or stays."""
    model = network()
    optimizer = make(model, model)
    seen: list[bool] = []

    def call(x: Tensor) -> Tensor:
        seen.append(optimizer.perturbed)
        return model(x)

    by_closure(optimizer, call)
    assert seen == [False, True] and not optimizer.perturbed
