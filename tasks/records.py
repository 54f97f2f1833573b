"""A run's folder and what its terminal shows: the only place that writes.

run.json metrics.jsonl last.pt best.pt result.json curves.png, and while the run is not finished previous.pt, the
checkpoint before the last. At an epoch's end last.pt is written first, and then the epoch is evaluated: nothing in an
evaluation costs the epoch, and a run that is resumed there begins with the evaluation.
"""

from __future__ import annotations

import copy
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from tasks import checkpoint, distributed, folder, log
from tasks.config import Config, describe, differences
from tasks.errors import UserError
from tasks.loading import Batches
from tasks.state import State
from tasks.task import Batch

_DRAW_EVERY = 60.0  # seconds between two pictures of the curves
_KEEP_EVERY = 1000  # steps between two checkpoints of a run that keeps them in memory


class Records:
    """Keep the records of one run.

    Args:
        config: of the run.
        state: of the run.
        batches: of the run.
        out: the run's folder; None: nothing is written or shown, and the last checkpoint is kept in memory.
        name: of the config.
    """

    def __init__(self, config: Config, state: State, batches: Batches, out: Path | None, name: str) -> None:
        self._config = config
        self._state = state
        self._batches = batches
        self._out = out
        self._name = name
        self._writes = out is not None and distributed.rank() == 0
        self._metrics = log.Metrics(None)
        self._kept: dict[str, Any] = {}  # the last checkpoint of a run without a folder
        self._epoch = ""  # the text of the epoch that is to be evaluated
        self._clock = self._saved = time.perf_counter()
        self._saved_step = -1  # the step of the state in last.pt
        self._drawn: float | None = None
        self._bar = tqdm(disable=True)

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Hold the folder, go on from its last.pt or write a first one, and show a bar.

        Raises:
            UserError: in use, not to be written, or nothing of this config to go on from.
        """
        with ExitStack() as until_the_end:
            if self._out is not None:
                resume = resume and self._anything_to_resume(self._out)
                if self._writes and (not resume or self._out.is_dir()):
                    until_the_end.enter_context(folder.held(self._out))
                    for leftover in self._out.glob("*.tmp"):  # of a process that was killed
                        leftover.unlink()
            if resume and self._out is not None:
                if self._writes:
                    checkpoint.recover(self._out / "last.pt", self._out / "previous.pt")
                distributed.first(None)  # the others wait for it
                self.restore()
            elif distributed.rank():
                # dropout of its own, after the same initialisation
                torch.manual_seed(self._config.seed + 1_000_003 * distributed.rank())
            if self._writes and self._out is not None:
                with folder.required(self._out / "run.json"):
                    log.write_json(self._out / "run.json", self._describe())
                self._metrics = log.Metrics(self._out / "metrics.jsonl", self._metrics.lines)
                if not resume:
                    (self._out / "previous.pt").unlink(missing_ok=True)  # of another run
            if not resume:
                self.save(folder.required)  # shows that there is room for one before time is spent
            self._bar = until_the_end.enter_context(
                tqdm(
                    total=self._batches.total,
                    initial=self._state.progress.step,
                    unit="step",
                    disable=not (self._writes and sys.stdout.isatty()),
                    dynamic_ncols=True,
                )
            )
            yield

    def _anything_to_resume(self, out: Path) -> bool:
        if any((out / name).is_file() for name in ("last.pt", "previous.pt")) or not (out / "run.json").is_file():
            return True
        if self._writes:
            print(f"warning: {out}: the run wrote no checkpoint; it starts from the beginning", file=sys.stderr, flush=True)
        return False

    def _describe(self) -> dict[str, Any]:
        return {"name": self._name, "config": describe(self._config), **log.environment(self._state.device)}

    def restore(self) -> None:
        """Go on from the last checkpoint.

        Raises:
            UserError: it is damaged, or of another run.
        """
        path = Path("memory") if self._out is None else self._out / "last.pt"
        saved = copy.deepcopy(self._kept) if self._out is None else checkpoint.load(path)
        if "progress" not in saved or "config" not in saved:
            raise UserError(f"{path}: holds weights only; a run goes on from its own last.pt")
        found = list(differences(saved["config"], describe(self._config)))
        if found:
            raise UserError(f"{path}: made with another config: {'; '.join(found[:5])}")
        try:
            lines = [line for line in saved["metrics"] if line["epoch"] >= 1]
            self._state.load_state_dict(saved)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            what = " ".join(str(error).split())[:300]
            raise UserError(f"{path}: not the checkpoint of a run of this version: {type(error).__name__} {what}") from error
        self._metrics.replace(lines)
        self._saved_step = self._state.progress.step

    def save(self, written: Callable[[Path], AbstractContextManager[None]] = folder.tolerated) -> None:
        """Write last.pt; the one before it stays as previous.pt."""
        step = self._state.progress.step
        if self._out is None:
            if not self._kept or step - self._saved_step >= _KEEP_EVERY:
                self._kept, self._saved_step = copy.deepcopy(self._whole()), step
        else:
            whole = self._whole()
            if self._writes:
                with written(self._out / "last.pt"):
                    checkpoint.save(self._out / "last.pt", whole, self._out / "previous.pt" if step else None)
                    self._saved_step = step
        self._clock = self._saved = time.perf_counter()

    def _unsaved(self) -> bool:
        """Could last.pt not be written?"""
        return any(distributed.anywhere(self._writes and self._saved_step < self._state.progress.step))

    def _whole(self) -> dict[str, Any]:
        """What a checkpoint holds; the generators of all processes go into it, so all of them call this."""
        return {**self._state.state_dict(), "metrics": self._metrics.lines}

    def go_back(self) -> None:
        """Return to the last checkpoint; the time that has passed since stays counted."""
        progress = self._state.progress
        times = {name: getattr(progress, name) for name in ("seconds", "epoch_seconds", "epoch_seconds_waiting")}
        step = progress.step
        self.restore()
        progress = self._state.progress
        for name, value in times.items():
            setattr(progress, name, value)
        self._bar.n = progress.step
        if self._writes:
            self._warn(
                f"NaN or inf in steps {progress.step + 1} to {step}; going back to step {progress.step}, to leave it out"
            )

    def time(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Pass batches on, and count the seconds of waiting for them."""
        self._clock = time.perf_counter()
        for batch in batches:
            self._state.progress.epoch_seconds_waiting += time.perf_counter() - self._clock
            yield batch

    def count_step(self) -> None:
        """Count the seconds of the step that has been taken, and show it."""
        progress = self._state.progress
        if progress.step % self._batches.per_epoch == 0 and self._state.device.type == "cuda":
            torch.cuda.synchronize(self._state.device)  # the clock must not stop before the work does
        now = time.perf_counter()
        progress.seconds += now - self._clock
        progress.epoch_seconds += now - self._clock
        self._clock = now
        if not self._bar.disable and self._bar.update():
            self._bar.set_postfix_str(f"{_show(self._line())}, {progress.passes - progress.step} ascents")

    def overdue(self) -> bool:
        """Is it time for a checkpoint in the midst of an epoch?"""
        return False

    def _line(self) -> dict[str, Any]:
        """The present epoch so far, as metrics.jsonl has it."""
        progress, per_epoch = self._state.progress, self._batches.per_epoch
        steps = (progress.step - 1) % per_epoch + 1
        taken = steps - progress.epoch_skipped
        return {
            "epoch": (progress.step - 1) // per_epoch + 1,
            "step": progress.step,
            "loss": self._state.loss_sum.item() / taken if taken else None,
            "passes_per_step": progress.epoch_passes / steps,
            "images_per_second": steps * self._batches.size / progress.epoch_seconds,
            "seconds_waiting": progress.epoch_seconds_waiting,  # for data
            "skipped": progress.epoch_skipped,
        }

    def end_epoch(self) -> None:
        """Write the line of the epoch that ends here, and the checkpoint."""
        loss = self._state.loss_sum
        if distributed.world() > 1:
            loss.fill_(sum(distributed.gathered([loss.item()])) / distributed.world())
        line = self._line()
        rate = self._state.optimizer.param_groups[0]["lr"]
        self._metrics.write({**line, "lr": rate, "seconds": self._state.progress.seconds})
        self._epoch = f"epoch {line['epoch']:3d}  {_show(line)}"
        self._state.new_epoch()
        self.save()
        if not self.wants_evaluation():
            self._say(self._epoch)

    def wants_evaluation(self) -> bool:
        """Does an epoch end here whose evaluation is due and not yet in the records?"""
        epoch, steps = divmod(self._state.progress.step, self._batches.per_epoch)
        due = epoch > 0 and steps == 0 and (epoch % self._config.eval_every == 0 or epoch == self._config.epochs)
        return due and not any("metrics" in line and line["epoch"] == epoch for line in self._metrics.lines)

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Take in an epoch's metrics; if they are the best so far, last.pt is best.pt too."""
        progress, metric = self._state.progress, self._config.task.metric
        epoch = progress.step // self._batches.per_epoch
        self._metrics.write({"epoch": epoch, "step": progress.step, "metrics": metrics})
        self._say(f"{self._epoch or f'epoch {epoch:3d}'}  {metric} {metrics[metric]:.4f}")
        if progress.best is None or metrics[metric] > progress.best:
            whole = self._whole() if self._unsaved() else None
            if self._writes and self._out is not None:
                with folder.tolerated(self._out / "best.pt"):
                    if whole is None:
                        checkpoint.share(self._out / "last.pt", self._out / "best.pt")
                    else:
                        checkpoint.save(self._out / "best.pt", whole)
            progress.best = metrics[metric]
        if self._drawn is None or time.perf_counter() - self._drawn >= _DRAW_EVERY:
            self._draw()
        self._clock = time.perf_counter()

    def _draw(self) -> None:
        if self._writes and self._out is not None:
            with folder.tolerated(self._out / "curves.png"):
                log.draw_curves(self._out / "curves.png", self._metrics.lines, self._config.task.metric)
        self._drawn = time.perf_counter()

    def finish(self) -> dict[str, Any]:
        """Write what has not been written, and result.json; what it holds."""
        progress = self._state.progress
        result = {
            "task": self._config.task.name,
            "metrics": next((line["metrics"] for line in reversed(self._metrics.lines) if "metrics" in line), {}),
            "steps": progress.step,
            "ascents": progress.passes - progress.step,
            "passes_per_step": progress.passes / progress.step,
            "train_seconds": progress.seconds,
            "images_per_second": progress.step * self._batches.size / progress.seconds,
            "peak_memory_mb": _peak_memory(self._state.device),
            "seed": self._config.seed,
            "config": self._name,
            **({"skipped": progress.skipped} if progress.skipped else {}),
        }
        if self._unsaved():
            self.save(folder.required)
        if self._writes and self._out is not None:
            self._draw()
            with folder.required(self._out / "result.json"):
                self._metrics.flush()
                log.write_json(self._out / "result.json", result)
                (self._out / "previous.pt").unlink(missing_ok=True)
        return result

    def explain_divergence(self) -> str:
        """What went wrong, where, and what to try."""
        progress = self._state.progress
        epoch, indices = self._batches.whole(progress.step - 1)
        items = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        return (
            f"{self._out}: NaN or inf in the loss or a gradient on {progress.skipped_in_a_row} steps in a row, lastly step"
            f" {progress.step - 1} (epoch {epoch + 1}, training items {items}); last.pt holds the weights before them;"
            " lower optimizer.lr or sharpness.rho, set clip_norm, or look at these items"
        )

    def _warn(self, text: str) -> None:
        self._bar.write(f"warning: {text}", file=sys.stderr)

    def _say(self, text: str) -> None:
        if self._writes:
            self._bar.write(text) if not self._bar.disable else print(text, flush=True)


def _show(line: dict[str, Any]) -> str:
    loss = "none" if line["loss"] is None else f"{line['loss']:.5g}"
    text = f"loss {loss}  passes/step {line['passes_per_step']:.2f}  {line['images_per_second']:.0f} images/s"
    return text + (f"  {line['skipped']} steps skipped (NaN or inf)" if line["skipped"] else "")


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
