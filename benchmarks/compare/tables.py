"""What a comparison came to: tables and figures from the files of its runs, and the README's part of them."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks import log

if TYPE_CHECKING:
    from benchmarks.compare.study import Suite

TITLES = {
    "base": "SGD (lspet: AdamW)",
    "sam": "SAM",
    "arsam": "ARSAM, the published rule",
    "looksam": "LookSAM, every 5th step",
    "periodic-1.2": "SAM on every 5th step, no reuse",
    "bernoulli-1.2": "SAM on random steps, no reuse",
    "late-1.2": "SAM on the last fifth of the steps",
    "budget-1.05": "ARSAM, `Budget(1.05)`",
    "budget-1.2": "ARSAM, `Budget(1.2)`",
    "budget-1.2-beta1.0": "ARSAM, `Budget(1.2)`, no decay",
}
_BLOCK = re.compile(r"(<!-- results: (.+?) -->\n).*?(<!-- /results -->)", re.DOTALL)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; NaN from one value."""
    from scipy.stats import t

    if len(values) < 2:
        return statistics.fmean(values), math.nan
    return statistics.fmean(values), float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))


Runs = dict[str, dict[int, dict[str, Any]]]  # row -> seed -> what is in the run's file


def _runs(out: Path) -> Runs:
    by_row: Runs = {}
    for path in sorted((out / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        by_row.setdefault(run["row"], {})[run["seed"]] = run
    return by_row


def table(suite: Suite, out: Path) -> list[dict[str, Any]]:
    """A line per row that has runs, from the runs' files. Differences and ratios are taken seed by seed."""
    by_row = _runs(out)
    lines: list[dict[str, Any]] = []
    for row in suite.rows:
        own = by_row.get(row.name)
        if not own:
            continue
        mean, half = interval([run[suite.metric] for run in own.values()])
        line = {"row": row.name, "seeds": len(own), suite.metric: mean, "half": half}
        for name in ("passes_per_step", "ascents", "peak_memory_mb"):
            line[name] = statistics.fmean(run[name] for run in own.values())
        line["rho"] = next(iter(own.values()))["rho"]
        for rival in ("base", "sam"):
            pairs = [(run, by_row[rival][seed]) for seed, run in own.items() if seed in by_row.get(rival, {})]
            if not pairs:
                continue
            line[f"minus_{rival}"] = interval([a[suite.metric] - b[suite.metric] for a, b in pairs])
            for clock in ("seconds", "cpu_seconds"):
                line[f"{clock}_over_{rival}"] = statistics.median(a[clock] / b[clock] for a, b in pairs)
        lines.append(line)
    return lines


def _percent(value: tuple[float, float] | None, sign: str = "") -> str:
    if value is None:
        return ""
    return f"{100 * value[0]:{sign}.2f}" + ("" if math.isnan(value[1]) else f" ± {100 * value[1]:.2f}")


def write(suite: Suite, out: Path) -> None:
    """table.md, table.json and the figures, from the runs. Controls and the rows of other packages are not drawn."""
    lines = table(suite, out)
    text = [
        f"| row | seeds | {suite.metric}, % | minus base | minus SAM | passes/step | ascents"
        " | time / base | time / SAM | MB | rho |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in lines:
        ratios = [f"{line[k]:.2f}" if k in line else "" for k in ("cpu_seconds_over_base", "cpu_seconds_over_sam")]
        cells = [
            line["row"], str(line["seeds"]), _percent((line[suite.metric], line["half"])),
            _percent(line.get("minus_base"), "+"), _percent(line.get("minus_sam"), "+"),
            f"{line['passes_per_step']:.3f}", f"{line['ascents']:.0f}", *ratios,
            f"{line['peak_memory_mb']:.1f}", "" if line["rho"] is None else f"{line['rho']:g}",
        ]  # fmt: skip
        text.append(f"| {' | '.join(cells)} |")
    text += [
        "",
        "Mean and 95 % interval by Student's t; differences, taken seed by seed, likewise. Time: seconds of the processor, one"
        " thread, median of the ratios seed by seed; table.json has those of the wall clock too. MB: peak of a step's tensors.",
        "",
    ]
    (out / "table.md").write_text("\n".join(text))
    log.write_json(out / "table.json", lines)
    _draw(suite, lines, out)


def _draw(suite: Suite, lines: list[dict[str, Any]], out: Path) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 6), layout="constrained")
    panel = figure.subplots()
    drawn = [line for line in lines if not line["row"].startswith(("control-", "pytorch-optimizer-"))]  # far off, or at 2
    heights = [100 * line[suite.metric] for line in drawn]
    gap = (max(heights) - min(heights)) / 40
    free: dict[float, float] = {}  # passes per step, to a tenth -> where the next label may stand
    for line in sorted(drawn, key=lambda line: line[suite.metric]):
        half = 0.0 if math.isnan(line["half"]) else 100 * line["half"]
        x, y = line["passes_per_step"], 100 * line[suite.metric]
        panel.errorbar(x, y, half, fmt="o", markersize=4, capsize=2)
        label = max(y, free.get(round(x, 1), y))
        free[round(x, 1)] = label + gap
        panel.annotate(line["row"], (x, label), xytext=(5, 0), textcoords="offset points", fontsize=7, va="center")
    panel.set(xlabel="passes per step", ylabel=f"{suite.metric}, %")
    panel.grid(alpha=0.3)
    figure.savefig(out / "pareto.png", dpi=110)

    figure = matplotlib.figure.Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for path in sorted((out / "runs").glob("arsam*.json")):
        run = json.loads(path.read_text())
        left.plot(range(1, len(run["rate"]) + 1), run["rate"], label=path.stem)
    left.set(title="S, ascents per window of 50", xlabel="epoch")
    if left.lines:
        left.legend(fontsize=7)
    if (out / "ageing.json").exists():
        aged = json.loads((out / "ageing.json").read_text())
        for start, values in zip(aged["starts"], aged["cosine_by_start"], strict=True):
            right.plot(aged["ages"], values, alpha=0.4, label=f"from step {start}")
        right.plot(aged["ages"], aged["cosine"], color="black", label="mean")
        right.legend(fontsize=7)
        right.set_ylim(bottom=min(0.0, min(min(v) for v in aged["cosine_by_start"])))
    right.set(title="cosine of a PSF with the one j steps before", xlabel="j")
    for panel in (left, right):
        panel.grid(alpha=0.3)
    figure.savefig(out / "ageing.png", dpi=110)


def readme(text: str, folder: Path) -> str:
    """A text with its blocks ``<!-- results: SUITE SUITE ... -->`` filled from the records of those suites.

    Args:
        text: of the README.
        folder: with a folder per suite.
    """

    def filled(block: re.Match[str]) -> str:
        names = block[2].split()
        lines = {name: json.loads((folder / name / "table.json").read_text()) for name in names}
        answers = _answers({name: _runs(folder / name) for name in names})
        return "\n\n".join([block[1] + _beside(lines), answers, *_costs(lines)]) + f"\n{block[3]}"

    return _BLOCK.sub(filled, text)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], ["---"] * len(rows[0]), *rows[1:]))


def _beside(suites: dict[str, list[dict[str, Any]]]) -> str:
    """A row per optimizer, a column per suite: the metric in percent, its interval, and the passes per step."""
    rows = [["", *suites]]
    for name, title in TITLES.items():
        lines = [next((line for line in table if line["row"] == name), None) for table in suites.values()]
        if any(lines):
            cells = [f"{_percent((_metric(x), x['half']))} at {x['passes_per_step']:.2f}" if x else "" for x in lines]
            rows.append([title, *cells])
    shown = [[line["seeds"] for line in table if line["row"] in TITLES] for table in suites.values()]
    rows.append(["seeds", *(f"{min(x)}" if min(x) == max(x) else f"{min(x)} to {max(x)}" for x in shown)])
    return _markdown(rows)


def _costs(suites: dict[str, list[dict[str, Any]]]) -> list[str]:
    """For each suite that has them all: `Budget` and its rivals without reuse, a row each, a column per passes per step."""
    rules = {
        "budget": "ARSAM, `Budget`",
        "periodic": "evenly spaced, no reuse",
        "bernoulli": "random, no reuse",
        "late": "late",
    }
    costs = ("1.05", "1.1", "1.2", "1.4")
    texts: list[str] = []
    for name, lines in suites.items():
        by_row = {line["row"]: _percent((_metric(line), line["half"])) for line in lines}
        rows = [[title, *(by_row.get(f"{rule}-{cost}", "") for cost in costs)] for rule, title in rules.items()]
        if all(cell for row in rows for cell in row):
            texts.append(_markdown([[f"{name}, passes per step", *costs], *rows]))
    return texts


def _metric(line: dict[str, Any]) -> float:
    return line.get("accuracy", line.get("pck"))  # type: ignore[return-value]


def _answers(suites: dict[str, Runs]) -> str:
    """Yes or no to the questions that a new optimizer is asked, with the difference, seed by seed, that says so."""
    rows = [["", *suites]]
    at_arsam = [("periodic", "evenly spaced"), ("bernoulli", "random"), ("late", "late")]
    questions: list[tuple[str, str, str, bool]] = [("SAM beats its base", "sam", "base", True)]
    for row, title in (("arsam", "The published rule"), ("budget-1.2", "`Budget(1.2)`")):
        questions.append((f"{title} is within SAM's interval or above it", row, "sam", False))
        rivals = [(f"{rival}-{row.removeprefix('budget-')}", f"as many {name} ascents") for rival, name in at_arsam]
        questions += [(f"{title} beats {name}", row, rival, True) for rival, name in rivals]
    questions += [
        ("`Budget(1.2)` beats LookSAM", "budget-1.2", "looksam", True),
        ("`Budget(1.2)` without decay is within SAM's interval or above it", "budget-1.2-beta1.0", "sam", False),
        ("`Budget(1.2)` without decay beats LookSAM", "budget-1.2-beta1.0", "looksam", True),
        ("`Budget(1.05)` is within SAM's interval or above it", "budget-1.05", "sam", False),
    ]
    for question, row, rival, beats in questions:
        rows.append([question, *(_answer(runs, row, rival, beats) for runs in suites.values())])
    return _markdown(rows)


def _answer(runs: Runs, row: str, rival: str, beats: bool) -> str:
    one, other = runs.get(row, {}), runs.get(rival, {})
    seeds = sorted(one.keys() & other.keys())
    if len(seeds) < 2:
        return "not run"
    mean, half = interval([_metric(one[seed]) - _metric(other[seed]) for seed in seeds])
    yes = mean - half > 0 if beats else mean + half >= 0
    return f"{'yes' if yes else 'no'}, {_percent((mean, half), '+')}"
