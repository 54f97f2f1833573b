"""Benchmarks: python tools/bench.py overhead"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli
import timm
import torch
from torch import Tensor, nn
from torch.optim import SGD

from arsam import ARSAM, reuse, sampling
from tasks import log

Step = Callable[[], object]
Closure = Callable[[], Tensor]

EVERY = 5  # one ascent per so many steps in the rows that sample


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
        f"ARSAM, every {EVERY}th step": arsam(sampling.Periodic(EVERY), reuse.Decayed()),
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


def overhead(arguments: argparse.Namespace) -> None:
    """Time per step against plain SGD with as many passes, interleaved in one process on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = cli.device(arguments.device)
    model = timm.create_model("resnet18", num_classes=10).to(device)
    batch, labels = torch.randn(16, 3, 64, 64, device=device), torch.randint(10, (16,), device=device)
    steps = _contenders(model, batch, labels)
    baseline = {name: "SGD, 2 passes" for name in steps if "SAM" in name}
    baseline[f"ARSAM, every {EVERY}th step"] = f"SGD, 1 + 1/{EVERY} passes"
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(arguments.rounds + 1):
        # Step by step in turn, so that a drift of the machine meets all alike; the first round warms up.
        spent = dict.fromkeys(names, 0.0)
        for step in range(EVERY):
            first = (turn + step) % len(names)
            for name in names[first:] + names[:first]:
                start = time.perf_counter()
                steps[name]()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                spent[name] += time.perf_counter() - start
        if turn:
            for name in names:
                seconds[name].append(spent[name] / EVERY)
    rows: list[dict[str, Any]] = []
    for name in names:
        row: dict[str, Any] = {"name": name, "against": baseline.get(name), "ms": 1e3 * statistics.median(seconds[name])}
        if name in baseline:
            ratios = sorted(a / b for a, b in zip(seconds[name], seconds[baseline[name]], strict=True))
            row["ratio"] = statistics.median(ratios)
            row["quartiles"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
        rows.append(row)
    kept = _kept(copy.deepcopy(model), batch, labels)
    print(f"{'':24}  {'ms/step':>8}  {'ratio':>6}  quartiles      against")
    for row in rows:
        ratio = f"{row['ratio']:6.3f}  {row['quartiles'][0]:.3f}-{row['quartiles'][1]:.3f}    " if "ratio" in row else " " * 24
        print(f"{row['name']:24}  {row['ms']:8.1f}  {ratio}{row['against'] or ''}")
    print(f"kept between steps: {kept:.2f} x the parameters")
    print(f"{arguments.rounds} rounds of {EVERY} steps each, timm resnet18, batch 16 of 64x64, one thread")
    if arguments.out is not None:
        record = {"rows": rows, "kept": kept, "rounds": arguments.rounds, **log.environment(device)}
        log.write_json(arguments.out, record)


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


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("overhead", help=overhead.__doc__)
    command.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    command.add_argument("--device", default="cpu", help="default: %(default)s")
    command.add_argument("--out", type=Path, help="also write the table and the environment as JSON")
    command.set_defaults(function=overhead)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    cli.run(main)
