"""Benchmarks: python tools/bench.py overhead | quant | compare SUITE | readme"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cli
import timm
import torch
from torch import Tensor, nn
from torch.optim import SGD

from arsam import ARSAM, reuse, sampling
from benchmarks.compare import study as suites
from benchmarks.compare import tables
from benchmarks.speed.memory import Live
from tasks import log
from tasks.classification.task import Classification
from tasks.errors import UserError
from tasks.quant.calibrate import calibrate

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


def _interleaved(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds per step of each contender in each round, EVERY steps a round.

    Step by step in turn, so that a drift of the machine meets all alike; the first round warms up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for turn in range(rounds + 1):
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
    return seconds


def _rows(seconds: dict[str, list[float]], baseline: dict[str, str]) -> list[dict[str, Any]]:
    """Median milliseconds, and the median and quartiles of the ratio to the baseline's step of the same round."""
    rows: list[dict[str, Any]] = []
    for name in seconds:
        row: dict[str, Any] = {"name": name, "against": baseline.get(name), "ms": 1e3 * statistics.median(seconds[name])}
        if name in baseline:
            ratios = sorted(a / b for a, b in zip(seconds[name], seconds[baseline[name]], strict=True))
            row["ratio"] = statistics.median(ratios)
            row["quartiles"] = [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]]
        rows.append(row)
    return rows


def _print_rows(rows: list[dict[str, Any]]) -> None:
    width = max(len(row["name"]) for row in rows)
    print(f"{'':{width}}  {'ms/step':>8}  {'ratio':>6}  quartiles      against")
    for row in rows:
        ratio = f"{row['ratio']:6.3f}  {row['quartiles'][0]:.3f}-{row['quartiles'][1]:.3f}    " if "ratio" in row else " " * 24
        print(f"{row['name']:{width}}  {row['ms']:8.1f}  {ratio}{row['against'] or ''}")


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
    rows = _rows(_interleaved(steps, arguments.rounds, device), baseline)
    kept = _kept(copy.deepcopy(model), batch, labels)
    _print_rows(rows)
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


def _brevitas(model: nn.Module, bits: int) -> nn.Module:
    """The model with the quantized layers of brevitas, weights per channel and inputs per tensor."""
    import brevitas.nn as qnn  # pyright: ignore[reportMissingImports]
    from brevitas.quant import Int8ActPerTensorFloat, Int8WeightPerChannelFloat  # pyright: ignore[reportMissingImports]

    how = {
        "weight_quant": Int8WeightPerChannelFloat, "weight_bit_width": bits,
        "input_quant": Int8ActPerTensorFloat, "input_bit_width": bits,
    }  # fmt: skip
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            bias = getattr(child, "bias", None) is not None
            if isinstance(child, nn.Conv2d):
                geometry = {k: getattr(child, k) for k in ("stride", "padding", "dilation", "groups")}
                new = qnn.QuantConv2d(
                    child.in_channels, child.out_channels, child.kernel_size, bias=bias, **geometry, **how
                )  # fmt: skip
            elif isinstance(child, nn.Linear):
                new = qnn.QuantLinear(child.in_features, child.out_features, bias=bias, **how)
            else:
                continue
            new.load_state_dict(child.state_dict(), strict=False)
            setattr(parent, name, new)
    return model


def _torchao(model: nn.Module, bits: int) -> nn.Module:
    """The model as torchao prepares it for training: it has no fake-quantized convolution, so its linear layers alone."""
    from torchao.quantization import quantize_  # pyright: ignore[reportMissingImports]
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig  # pyright: ignore[reportMissingImports]

    dtype = getattr(torch, f"int{bits}")
    weight = IntxFakeQuantizeConfig(dtype, granularity="per_channel")
    quantize_(
        model,
        QATConfig(
            activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
            weight_config=weight,
            step="prepare",
        ),
    )
    return model


def quant(arguments: argparse.Namespace) -> None:
    """Cost and saved memory of a W4A4 training step against float, beside brevitas and torchao where installed."""
    torch.set_num_threads(1)
    device = cli.device(arguments.device)
    batch, labels = torch.randn(32, 3, 32, 32, device=device), torch.randint(10, (32,), device=device)
    records: list[dict[str, Any]] = []
    for task in (Classification(), Classification(stem="small"), Classification(model="mobilenetv2_100")):
        task = replace(task, weight_bits=4, act_bits=4)
        torch.manual_seed(0)
        model = replace(task, weight_bits=None, act_bits=None).build()
        ours = task.quantize(model)
        calibrate(ours, [batch.cpu()])
        models = {"float": model, "arsam": ours}
        for rival, make in (("brevitas", _brevitas), ("torchao", _torchao)):
            try:
                models[rival] = make(copy.deepcopy(model), 4)
            except ImportError as error:
                print(f"{rival} is left out: {error}")
        steps: dict[str, Step] = {}
        memory: dict[str, float] = {}
        for label, each in models.items():
            each.to(device).train()
            optimizer = SGD(each.parameters(), lr=1e-3, momentum=0.9)

            def step(each: nn.Module = each, optimizer: SGD = optimizer) -> None:
                optimizer.zero_grad()
                nn.functional.cross_entropy(each(batch), labels).backward()
                optimizer.step()

            step()
            steps[label] = step
            with Live() as live:
                output = each(batch)
            memory[label] = live.now() / 1e6
            del output
        rows = _rows(_interleaved(steps, arguments.rounds, device), {label: "float" for label in steps if label != "float"})
        for row in rows:
            row["saved_mb"], row["saved_ratio"] = memory[row["name"]], memory[row["name"]] / memory["float"]
        print(f"\n{task.model}" + (", 3x3 stem" if task.stem == "small" else ""))
        _print_rows(rows)
        print(
            "kept for the backward pass: "
            + ", ".join(f"{k} {v:.1f} MB ({v / memory['float']:.2f}x)" for k, v in memory.items())
        )
        records.append({"model": task.model, "stem": task.stem, "rows": rows})
    print(
        f"\nW4A4, batch 32 of 32x32, one thread, {arguments.rounds} rounds of {EVERY} steps each; torchao: linear layers only"
    )
    if arguments.out is not None:
        log.write_json(arguments.out, {"models": records, "rounds": arguments.rounds, **log.environment(device)})


def compare(arguments: argparse.Namespace) -> None:
    """Optimizers x seeds on one small workload; a finished run is kept, so that a call goes on where the last one stopped."""
    torch.set_num_threads(1)
    suite = suites.SUITES[arguments.suite]
    out = arguments.out or Path("benchmarks") / suite.name
    seeds = suite.seeds if arguments.seeds is None else arguments.seeds
    if seeds < 1:
        raise UserError(f"--seeds must be >= 1, got {seeds}")
    suites.compare(suite, out, seeds, cli.device(arguments.device), arguments.only, arguments.rho)
    print((out / "table.md").read_text())


def readme(arguments: argparse.Namespace) -> None:
    """Put the results of the recorded comparisons into the README."""
    path = Path(__file__).parents[1] / "README.md"
    path.write_text(tables.readme(path.read_text(), path.parent / "benchmarks"))


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    for function in (overhead, quant):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
        command.add_argument("--device", default="cpu", help="default: %(default)s")
        command.add_argument("--out", type=Path, help="also write the table and the environment as JSON")
        command.set_defaults(function=function)
    command = commands.add_parser("compare", help=compare.__doc__)
    command.add_argument("suite", choices=suites.SUITES, metavar="SUITE", help=" or ".join(suites.SUITES))
    command.add_argument("--seeds", type=int, help="default: the suite's")
    command.add_argument("--only", nargs="+", metavar="ROW", help="these rows, and those that they are compared with")
    command.add_argument("--rho", type=float, help="of all rows; default: chosen for each on held-out images")
    command.add_argument("--device", default="cpu", help="default: %(default)s")
    command.add_argument("--out", type=Path, help="default: benchmarks/SUITE")
    command.set_defaults(function=compare)
    commands.add_parser("readme", help=readme.__doc__).set_defaults(function=readme)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    cli.run(main)
