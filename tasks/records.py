"""A run's folder and what its terminal shows: the only place that writes.

run.json metrics.jsonl last.pt best.pt result.json curves.png, and while the run is not finished previous.pt, the
checkpoint before the last. At an epoch's end last.pt is written first, and then the epoch is evaluated: nothing in an
evaluation costs the epoch, and a run that is resumed there begins with the evaluation.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from tasks import checkpoint, distributed, figures, folder, log, loggers
from tasks.bar import Bar
from tasks.config import Config, describe, differences
from tasks.errors import UserError
from tasks.loading import Batches
from tasks.state import State
from tasks.task import Batch

_DRAW_EVERY = 60.0  # seconds between two pictures of the curves
_OF_A_RUN = ("previous.pt", "best.pt", "result.json", "curves.png")  # what a new run in its folder removes
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
        self._bar = Bar(0, 0, shown=False)
        self._logger: loggers.Logger | None = None

    @contextmanager
    def opened(self, resume: bool) -> Iterator[None]:
        """Hold the folder, go on from its last.pt or write a first one, and show a bar.

        Raises:
            UserError: in use, not to be written, or nothing of this config to go on from.
        """
        if self._config.log_to is not None:
            loggers.check(self._config.log_to)
        with ExitStack() as until_the_end:
            if self._out is not None:
                resume = resume and checkpoint.resumable(self._out, tell=self._writes)
                if self._writes and (not resume or self._out.is_dir()):
                    until_the_end.enter_context(folder.held(self._out))
                    folder.clear(self._out, "train", *(() if resume else _OF_A_RUN))
            if resume and self._out is not None:
                if self._writes:
                    checkpoint.recover(self._out / "last.pt", self._out / "previous.pt")
                distributed.first(None)  # the others wait for it
                self.restore()
            elif distributed.rank():
                # dropout of its own, after the same initialisation
                torch.manual_seed(self._config.seed + 1_000_003 * distributed.rank())
            if self._writes and self._out is not None:
                folder.mark(self._out, "train", self._describe())
                self._metrics = log.Metrics(self._out / "metrics.jsonl", self._metrics.lines)
            if not resume:
                self.save(folder.required)  # shows that there is room for one before time is spent
            done = self._state.progress.step
            self._bar = until_the_end.enter_context(Bar(self._batches.total, done, self._writes))
            try:
                yield
            except UserError:
                if not resume and self._writes and self._out is not None and self._state.progress.step == 0:
                    # so that the same command does, once the mistake is mended
                    folder.leave(self._out, folder.MARKER, "metrics.jsonl", "last.pt")
                raise
            finally:
                if self._logger is not None:
                    self._logger.close()

    def _describe(self) -> dict[str, Any]:
        return {"name": self._name, "config": describe(self._config), **log.environment(self._state.device)}

    def start_logging(self) -> None:
        """Begin to log where the config says.

        Raises:
            UserError: it cannot be done.
        """
        if self._writes and self._out is not None and self._config.log_to is not None:
            self._logger = loggers.start(self._config.log_to, self._out, describe(self._config), self._warn)

    def restore(self) -> None:
        """Go on from the last checkpoint.

        Raises:
            UserError: it is damaged, or of another run.
        """
        path = self._path("last.pt")
        saved = copy.deepcopy(self._kept) if self._out is None else checkpoint.load(path)
        if "progress" not in saved or "config" not in saved:
            raise UserError(f"{path}: holds weights only; a run goes on from its own last.pt")
        found = list(differences(saved["config"], describe(self._config)))
        if found:
            raise UserError(f"{path}: made with another config: {'; '.join(found[:5])}")
        with checkpoint.trusted(path):
            lines = [line for line in saved["metrics"] if line["epoch"] >= 1]
            self._state.load_state_dict(saved)
            self._see_epochs(path, saved["config"]["epochs"])
        self._metrics.replace(lines)
        self._saved_step = self._state.progress.step

    def _path(self, name: str) -> Path:
        return Path("memory") if self._out is None else self._out / name

    def _see_epochs(self, path: Path, before: int) -> None:
        """More epochs go on, and a word says what that does; fewer than are done cannot be."""
        epochs, done = self._config.epochs, self._state.progress.step / self._batches.per_epoch
        if done > epochs:
            raise UserError(f"{path}: has done {done:g} epochs already, epochs={epochs} asks for fewer")
        if before != epochs and self._writes:
            self._warn(figures.more_epochs(before, epochs))

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

    def keep(self) -> None:
        """Write last.pt, unless it holds this step already."""
        if self._saved_step < self._state.progress.step:
            self.save()

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
        self._bar.advance(progress.step)
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
        if self._bar.advance(progress.step):
            parts = figures.bar_parts(self._line(), progress.passes - progress.step)
            self._bar.show(f"epoch {self._line()['epoch']}/{self._config.epochs}", parts)

    def overdue(self) -> bool:
        """Is it time for a checkpoint in the midst of an epoch?"""
        return self._out is not None and time.perf_counter() - self._saved >= 60 * self._config.save_every

    def _line(self) -> dict[str, Any]:
        return figures.epoch_line(self._state.progress, self._batches, self._state.loss_sum.item())

    def end_epoch(self) -> None:
        """Write the line of the epoch that ends here, and the checkpoint."""
        loss = self._state.loss_sum
        if distributed.world() > 1:
            loss.fill_(sum(distributed.gathered([loss.item()])) / distributed.world())
        line = self._line()
        optimizer = self._state.optimizer
        also = {"lr": optimizer.param_groups[0]["lr"], "seconds": self._state.progress.seconds, **figures.signs(optimizer)}
        self._write_line({**line, **also})
        self._epoch = f"epoch {line['epoch']:3d}  {figures.show(line)}"
        self._state.new_epoch()
        self.save()
        if not self.wants_evaluation():
            self._say(self._epoch)

    def _write_line(self, line: dict[str, Any]) -> None:
        self._metrics.write(line)
        if self._logger is not None:
            self._logger.write(line["step"], loggers.numbers(line))

    def wants_evaluation(self) -> bool:
        """Does an epoch end here whose evaluation is due and not yet in the records?"""
        epoch, steps = divmod(self._state.progress.step, self._batches.per_epoch)
        due = epoch > 0 and steps == 0 and (epoch % self._config.eval_every == 0 or epoch == self._config.epochs)
        return due and not any("metrics" in line and line["epoch"] == epoch for line in self._metrics.lines)

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Take in an epoch's metrics; if they are the best so far, last.pt is best.pt too."""
        progress, metric = self._state.progress, self._config.task.metric
        epoch = progress.step // self._batches.per_epoch
        self._write_line({"epoch": epoch, "step": progress.step, "metrics": metrics})
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
            **figures.totals(progress, self._batches, self._state.device),
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

    def explain_state(self) -> str:
        """What has been saved, and where."""
        if self._out is None:
            return ""
        return f"step {self._saved_step} of {self._batches.total} is saved in {self._out / 'last.pt'}"

    def explain_divergence(self) -> str:
        """What went wrong, where, and what to try."""
        return f"{self._path('last.pt').parent}: {figures.divergence(self._state.progress, self._batches)}"

    def _warn(self, text: str) -> None:
        self._bar.write(f"warning: {text}", error=True)

    def _say(self, text: str) -> None:
        if self._writes:
            self._bar.write(text)
