"""What a run leaves behind besides weights: run.json, metrics.jsonl, result.json and curves.png."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import arsam
from tasks import distributed, folder
from tasks.errors import UserError

_said: set[str] = set()


def say_once(line: str) -> None:
    """Print a line once per process, and of several processes in one."""
    if line not in _said and distributed.rank() == 0:
        print(line, flush=True)
    _said.add(line)


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write aside and rename, so that a reader never sees half a file; without an indent, a long one in a third of the time."""
    with folder.aside(path) as file:
        file.write((json.dumps(value, indent=indent) + "\n").encode())


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, git commit, machine, threads and command of this process."""
    packages = ("torch", "torchvision", "timm", "numpy", "albumentations", "pycocotools", "faster-coco-eval")
    versions = {"arsam": arsam.__version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": sys.argv,
        "commit": _commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def _commit() -> str | None:
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if changed else "")


class Metrics:
    """metrics.jsonl: one line per epoch and one per evaluation, in order; a line is appended.

    Args:
        path: the file, which is written anew; None: the lines are kept and not written.
        lines: so far.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path | None, lines: list[dict[str, Any]] | None = None) -> None:
        self._path = path
        self._whole = False  # the file holds all lines and nothing else
        self.lines = [] if lines is None else lines
        if path is not None:
            with folder.required(path):
                self.flush()

    def write(self, line: dict[str, Any]) -> None:
        """Append a line. One that cannot be written waits for the next."""
        self.lines.append(line)
        if self._path is not None:
            with folder.tolerated(self._path):
                if not self._whole:
                    self.flush()
                    return
                self._whole = False
                with open(self._path, "ab") as file:
                    file.write((json.dumps(line) + "\n").encode())
                self._whole = True

    def replace(self, lines: list[dict[str, Any]]) -> None:
        """Hold these lines instead, and write them."""
        self.lines, self._whole = lines, False
        if self._path is not None:
            with folder.tolerated(self._path):
                self.flush()

    def flush(self) -> None:
        """Write all lines anew, if the file does not hold them all: after a write that failed part of one may be there."""
        if self._path is not None and not self._whole:
            with folder.aside(self._path) as file:
                file.write("".join(json.dumps(line) + "\n" for line in self.lines).encode())
            self._whole = True


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, but for a last one that was cut off.

    Raises:
        UserError: a line before the last is no JSON.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path}: line {number} is not JSON ({error}); remove the file, or the line") from error
    return found


def draw_curves(path: Path, lines: list[dict[str, Any]], metric: str) -> None:
    """Loss, metric and passes per step over the same epochs, the best metric marked, as a PNG."""
    import matplotlib.figure

    epochs = [line for line in lines if "loss" in line]
    evaluations = [line for line in lines if "metrics" in line]
    figure = matplotlib.figure.Figure(figsize=(12, 3.5), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True)
    x = [line["epoch"] for line in epochs]
    curves = (
        (panels[0], "training loss", x, [line["loss"] for line in epochs]),
        (panels[1], metric, [e["epoch"] for e in evaluations], [e["metrics"].get(metric) for e in evaluations]),
        (panels[2], "passes per step, per epoch", x, [line["passes_per_step"] for line in epochs]),
    )
    for panel, title, xs, ys in curves:
        panel.plot(xs, ys, marker="o" if len(xs) < 30 else None, markersize=3)
        panel.set(title=title, xlabel="epoch")
        panel.grid(alpha=0.3)
    scored = [(e["metrics"][metric], e["epoch"]) for e in evaluations if e["metrics"].get(metric) is not None]
    if scored:
        best, epoch = max(scored, key=lambda found: found[0])
        panels[1].plot(epoch, best, marker="D", color="tab:orange", linestyle="none", label=f"best: {best:.4g}, epoch {epoch}")
        panels[1].legend()
    panels[2].set_ylim(0.95, 2.05)
    figure.savefig(folder.fresh(path), dpi=110)
