"""Cost of a step beside SGD with as many passes, and beside other packages' SAM."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.optim import SGD

from arsam import ARSAM, reuse, sampling
from benchmarks.speed import timing
from benchmarks.speed.timing import EVERY, Closure, Step
from tasks import log


class TextbookSAM:
    """SAM as commonly published: the norm of the norms, a copy of the weights, two explicit half-steps."""

    def __init__(self, parameters: list[nn.Parameter], rho: float = 0.05) -> None:
        self.parameters = parameters
        self.base = SGD(parameters, lr=0.01, momentum=0.9)
        self.rho = rho
        self.saved: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Closure) -> None:
        """Two passes and an update."""
        with torch.enable_grad():
            closure()
        norm = torch.stack([p.grad.norm() for p in self.parameters if p.grad is not None]).norm()
        self.saved = [p.detach().clone() for p in self.parameters]
        for p in self.parameters:
            if p.grad is not None:
                p.add_(p.grad * (self.rho / (norm + 1e-12)))
        with torch.enable_grad():
            closure()
        for p, w in zip(self.parameters, self.saved, strict=True):
            p.data = w
        self.base.step()


def _contenders(model: nn.Module, batch: Tensor, labels: Tensor) -> dict[str, Step]:
    """Name -> one training step, each on its own copy of the model. A name's group sets what it is compared with."""

    def closure_of(model: nn.Module) -> Closure:
        def closure() -> Tensor:
            model.zero_grad()
            loss = nn.functional.cross_entropy(model(batch), labels)
            loss.backward()
            return loss

        return closure

    def plain(passes: Callable[[int], int]) -> Step:
        own = copy.deepcopy(model)
        optimizer, closure, steps = SGD(own.parameters(), lr=0.01, momentum=0.9), closure_of(own), iter(range(10**9))

        def step() -> None:
            for _ in range(passes(next(steps))):
                closure()
            optimizer.step()

        return step

    def stepped(build: Callable[[nn.Module], Any]) -> Step:
        own = copy.deepcopy(model)
        optimizer, closure = build(own), closure_of(own)
        return lambda: optimizer.step(closure)

    def arsam(rule: sampling.Sampling, after: reuse.Reuse) -> Step:
        def build(own: nn.Module) -> ARSAM:
            base = SGD(own.parameters(), lr=0.01, momentum=0.9)
            return ARSAM(base, sampling=rule, reuse=after, model=own)

        return stepped(build)

    steps = {
        "SGD, 1 pass": plain(lambda _: 1),
        f"SGD, 1 + 1/{EVERY} passes": plain(lambda step: 1 + (step % EVERY == 0)),
        f"ARSAM, every {EVERY}th step": arsam(sampling.Periodic(EVERY), reuse.Decayed("auto", None)),
        "SGD, 2 passes": plain(lambda _: 2),
        "ARSAM as SAM": arsam(sampling.Always(), reuse.Nothing()),
        "textbook SAM": stepped(lambda own: TextbookSAM(list(own.parameters()))),
    }
    try:
        from pytorch_optimizer import SAM
    except ImportError:
        print("pytorch-optimizer is not installed: its SAM is left out (pip install pytorch-optimizer)")
    else:
        own = copy.deepcopy(model)
        sam, closure = SAM(list(own.parameters()), SGD, rho=0.05, lr=0.01, momentum=0.9), closure_of(own)

        def step() -> None:
            closure()  # its step() runs the second pass only
            sam.step(closure)  # pyright: ignore[reportArgumentType]

        steps["pytorch-optimizer SAM"] = step
    return steps


def overhead(device: torch.device, rounds: int) -> dict[str, Any]:
    """Time per step against plain SGD with as many passes, interleaved in one process on one thread; what is recorded."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=10).to(device)
    batch, labels = torch.randn(16, 3, 64, 64, device=device), torch.randint(10, (16,), device=device)
    steps = _contenders(model, batch, labels)
    baseline = {name: "SGD, 2 passes" for name in steps if "SAM" in name}
    baseline[f"ARSAM, every {EVERY}th step"] = f"SGD, 1 + 1/{EVERY} passes"
    rows = timing.rows(timing.interleaved(steps, rounds, device), baseline)
    kept = _kept(copy.deepcopy(model), batch, labels)
    timing.show(rows)
    print(f"kept between steps: {kept:.2f} x the parameters")
    print(f"{rounds} rounds of {EVERY} steps each, timm resnet18, batch 16 of 64x64, one thread")
    return {"rows": rows, "kept": kept, "rounds": rounds, **log.environment(device)}


def _kept(model: nn.Module, batch: Tensor, labels: Tensor) -> float:
    """Elements that ARSAM keeps after an ascent, over those of the parameters."""
    optimizer = ARSAM(SGD(model.parameters(), lr=0.01), sampling=sampling.Always(), model=model)

    def closure() -> Tensor:
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(batch), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    kept = sum(x.numel() for x in optimizer.state_dict()["arsam"]["kept"].values())
    return kept / sum(p.numel() for p in model.parameters())
