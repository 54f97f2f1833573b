"""One setting of a config chosen by short runs on held-out training data: successive halving on a ladder of values.

The first round trains every value for the fewest epochs, and goes on beyond an end of the ladder while the best value lies
there. Each further round trains the better half for twice the epochs. A run's schedule spans its own epochs.
"""

from __future__ import annotations

import json
import math
import re
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tasks import distributed, engine, folder, log, search
from tasks.config import Config, describe
from tasks.errors import UserError
from tasks.override import override, read

RECORD = "tune.json"
ROUNDS = 2


@dataclass(frozen=True)
class Trial:
    """One short run.

    Args:
        value: of the setting, as it stands behind the name in an override.
        epochs: of the run.
        score: the task's metric on the held-out data, or on "val"; NaN where the run was lost.
        loss: training loss of the last epoch; NaN where every step was left out.
        passes: forward-backward passes of the run.
        skipped: steps that were left out because of NaN or inf.
    """

    value: str
    epochs: int
    score: float
    loss: float
    passes: int
    skipped: int = 0


@dataclass(frozen=True)
class Plan:
    """What is tuned, and how.

    Args:
        config: of the whole run.
        path: of the config, for the records.
        name: of the setting, with dots, as in an override.
        values: candidates, as in an override; empty: five around the present value, each sqrt(2) times the one before.
        share: of the config's epochs that the longest of the short runs get, in (0, 1].
        held_out: share of the training data that is measured on, in [0, 1); 0: the split "val".
    """

    config: Config
    path: str
    name: str
    values: tuple[str, ...] = ()
    share: float = 0.5
    held_out: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UserError(f"--share must lie in (0, 1], got {self.share}")
        if not 0 <= self.held_out < 1:
            raise UserError(f"--held-out must lie in [0, 1), got {self.held_out}")

    @property
    def longest(self) -> int:
        """Epochs of the last round."""
        return max(1, round(self.share * self.config.epochs))

    def trial(self, value: str, epochs: int) -> Config:
        """The config of a short run.

        Raises:
            UserError: no such setting, no such value, or a task that holds nothing out.
        """
        config = override(self.config, [f"{self.name}={value}"])
        changes = [f"epochs={epochs}", f"eval_every={epochs}", f"patience={10**9}"]
        if self.held_out:
            if not hasattr(config.task, "held_out"):
                raise UserError(
                    f"the task {config.task.name} has no field held_out, the share of its training data to choose settings on:"
                    ' give it one, or measure on its split "val" by --held-out 0'
                )
            changes.append(f"task.held_out={self.held_out}")
        return override(config, changes)

    def first(self) -> tuple[float, int]:
        """The smallest value of the ladder around the present one, and how many values to start with."""
        present = read(self.config, self.name)
        if isinstance(present, bool) or not isinstance(present, (int, float)) or not present > 0:
            raise UserError(f"{self.name}: is {present!r}, no number > 0 to search around; give --values")
        return present / 2, 5

    def describe(self) -> dict[str, Any]:
        """What a record of other trials is told by."""
        own = {"name": self.name, "values": list(self.values), "share": self.share, "held_out": self.held_out}
        return {**own, "config": describe(self.config)}


def tune(plan: Plan, out: Path, device: torch.device, anew: bool = False) -> list[Trial]:
    """Run the trials that have not been run, and write tune.json and tune.png.

    Args:
        plan: what is tuned.
        out: folder of the records, and while a trial runs of its checkpoint.
        device: where.
        anew: what the folder holds does not count.

    Returns:
        All trials, the longest last; `best` picks among them.

    Raises:
        UserError: the folder is another plan's, or something of the config's.
    """
    done = {} if anew else _begun(plan, out)
    for value in plan.values:
        plan.trial(value, plan.longest)  # says now what is wrong with it
    ladder = plan.first() if not plan.values else (0.0, 0)
    with folder.held(out) if distributed.rank() == 0 else nullcontext():
        if distributed.rank() == 0:
            folder.mark(out, "tune", {"config": plan.path, "name": plan.name})
        return _halve(plan, out, device, done, ladder)


def _halve(
    plan: Plan, out: Path, device: torch.device, done: dict[tuple[str, int], Trial], ladder: tuple[float, int]
) -> list[Trial]:
    def trial(value: str, epochs: int) -> Trial:
        if (value, epochs) not in done:
            done[value, epochs] = _train(plan, value, epochs, out, device)
            if distributed.rank() == 0:
                _write(plan, out, list(done.values()))
                print(_line(plan, done[value, epochs]), flush=True)
        return done[value, epochs]

    epochs = max(1, round(plan.longest / 2 ** (ROUNDS - 1)))
    if plan.values:
        scores = {value: trial(value, epochs).score for value in plan.values}
    else:
        found = search.climb(lambda value: trial(f"{value:g}", epochs).score, *ladder)
        scores = {f"{value:g}": score for value, score in found.items()}
    while epochs < plan.longest and len(scores) > 1:
        epochs = min(plan.longest, 2 * epochs)
        ranked = sorted(scores, key=lambda value: scores[value] if not math.isnan(scores[value]) else -math.inf, reverse=True)
        scores = {value: trial(value, epochs).score for value in ranked[: math.ceil(len(ranked) / 2)]}
    if distributed.rank() == 0:
        _draw(plan, out / "tune.png", list(done.values()))
    return list(done.values())


def best(trials: list[Trial]) -> Trial:
    """The best of the longest trials, the first of equals.

    Raises:
        UserError: every one was lost.
    """
    longest = [t for t in trials if t.epochs == max(t.epochs for t in trials) and not math.isnan(t.score)]
    if not longest:
        raise UserError("every trial ended with NaN: try smaller values, by --values")
    return max(longest, key=lambda t: t.score)


def cost(plan: Plan, trials: list[Trial]) -> str:
    """What the trials cost, in passes and in whole runs."""
    spent, trial = sum(t.passes for t in trials), best(trials)
    whole = trial.passes / trial.epochs * plan.config.epochs
    if plan.held_out:
        whole /= 1 - plan.held_out
    return f"{len(trials)} short runs, {spent} forward-backward passes: {spent / whole:.1f} times those of the whole run"


def _begun(plan: Plan, out: Path) -> dict[tuple[str, int], Trial]:
    """The trials that the folder holds."""
    path = out / RECORD
    if not path.exists():
        return {}
    try:
        saved = json.loads(path.read_text())
        rows: list[dict[str, Any]] = [{k: math.nan if v is None else v for k, v in row.items()} for row in saved["trials"]]
        trials = [Trial(**row) for row in rows]
        for trial in trials:
            _line(plan, trial)  # of the types that a line has
        other = saved["plan"] != json.loads(json.dumps(plan.describe()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not written by this tool ({error}); name another --out") from error
    if other:
        raise UserError(f"{path}: of another config, setting or share; name another --out")
    return {(trial.value, trial.epochs): trial for trial in trials}


def _train(plan: Plan, value: str, epochs: int, out: Path, device: torch.device) -> Trial:
    config = plan.trial(value, epochs)
    run = out / re.sub(r"[^\w.()=-]", "_", f"{value}-{epochs}")
    resume = distributed.first((run / "last.pt").exists())
    result = engine.train(config, run, device=device, resume=resume, name=plan.path)
    lines = distributed.first([line for line in log.read(run / "metrics.jsonl") if "loss" in line])
    if distributed.rank() == 0:
        for checkpoint in run.glob("*.pt"):
            checkpoint.unlink()
    loss = lines[-1]["loss"] if lines and lines[-1]["loss"] is not None else math.nan
    passes = result["steps"] + result["ascents"]
    return Trial(value, epochs, result["metrics"][config.task.metric], loss, passes, result.get("skipped", 0))


def _write(plan: Plan, out: Path, trials: list[Trial]) -> None:
    rows = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(t).items()} for t in trials]
    log.write_json(out / RECORD, {"plan": plan.describe(), "trials": rows})


def table(plan: Plan, trials: list[Trial]) -> str:
    """A line per trial, from the smallest value on where values are numbers."""
    lines = [f"{plan.name:>16}  epochs  {plan.config.task.metric:>10}  {'train loss':>10}  {'passes':>8}  skipped"]
    return "\n".join([*lines, *(_line(plan, trial) for trial in _sorted(trials))])


def _line(plan: Plan, trial: Trial) -> str:
    width = max(16, len(plan.name))
    numbers = f"{trial.epochs:6}  {trial.score:10.4f}  {trial.loss:10.4g}  {trial.passes:8}  {trial.skipped:7}"
    return f"{trial.value:>{width}}  {numbers}"


def _sorted(trials: list[Trial]) -> list[Trial]:
    try:
        return sorted(trials, key=lambda t: (t.epochs, float(t.value)))
    except ValueError:
        return sorted(trials, key=lambda t: t.epochs)


def _draw(plan: Plan, path: Path, trials: list[Trial]) -> None:
    """Metric and training loss against the value, a line per length of the runs."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    try:
        place = {trial.value: float(trial.value) for trial in trials}
    except ValueError:
        place = dict.fromkeys(trial.value for trial in trials)
        place = {value: float(number) for number, value in enumerate(place)}
    for epochs in sorted({trial.epochs for trial in trials}):
        own = [trial for trial in _sorted(trials) if trial.epochs == epochs]
        xs = [place[trial.value] for trial in own]
        left.plot(xs, [trial.score for trial in own], marker="o", markersize=3, label=f"{epochs} epochs")
        right.plot(xs, [trial.loss for trial in own], marker="o", markersize=3)
    left.set(ylabel=f"{plan.config.task.metric}" + (" on held-out training data" if plan.held_out else ""))
    right.set(ylabel="training loss of the last epoch")
    for panel in (left, right):
        numeric = all(x > 0 for x in place.values()) and all(_is_number(value) for value in place)
        panel.set(xlabel=plan.name, xscale="log" if numeric else "linear")
        panel.grid(alpha=0.3)
        if not numeric:
            panel.set_xticks(list(place.values()), list(place))
    left.legend()
    figure.savefig(folder.fresh(path), dpi=110)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
