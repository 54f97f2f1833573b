"""The one training loop. Every optimizer is stepped with a closure, and the task owns the loss of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks import cache, distributed, preflight, signals
from tasks.config import Config
from tasks.errors import UserError
from tasks.loading import Batches, load
from tasks.records import Records
from tasks.signals import Signals, Stopped
from tasks.state import State
from tasks.step import Step, autocast, floats

LOOK_EVERY = 100  # steps between two looks for NaN and inf


def train(
    config: Config, out: Path | None = None, *, device: torch.device, resume: bool = False, name: str = ""
) -> dict[str, Any]:
    """Train and evaluate one config, and write the run's files into a folder.

    Args:
        config: what to run.
        out: folder for run.json, metrics.jsonl, last.pt, best.pt, result.json and curves.png; while the run is not finished,
            also previous.pt, the checkpoint before the last. None: nothing is written and nothing is shown.
        device: where to run.
        resume: go on from ``out/last.pt``.
        name: of the config, for the records.

    Returns:
        What result.json holds.

    Raises:
        UserError: something the user can put right.
        Stopped: SIGINT, SIGTERM or SIGHUP came, and last.pt has been written.
    """
    if config.epochs < 1:
        raise UserError(
            f"epochs must be >= 1 to train, got {config.epochs}; 0 is for tools/quantize.py, which then calibrates alone"
        )
    with cache.beside(out):
        return _train(config, out, device, resume, name)


def _train(config: Config, out: Path | None, device: torch.device, resume: bool, name: str) -> dict[str, Any]:
    torch.manual_seed(config.seed)
    data, items = preflight.split(config, "train")
    batches = Batches(items, config.batch_size, config.epochs, config.seed)
    distributed.check(batches.size)
    state = State(config, batches, device)
    records = Records(config, state, batches, out, name)
    with signals.noted() as stopping, records.opened(resume):
        preflight.check(config, data, state.model, device)
        cache.keep()  # the folder is there now
        records.start_logging()
        step = Step(config, state)
        try:
            _evaluate_if_due(config, state, records, stopping, out)
            while state.progress.step < batches.total:
                _take_steps(config, data, batches, step, state, records, stopping, out)
        except Stopped as stop:
            stop.state = records.explain_state()
            raise
        except UserError:
            # An item that cannot be read, a loader process that is gone: what has been trained is kept.
            if step.whole and distributed.world() == 1 and step.sound():
                records.keep()
            raise
        return records.finish()


def _take_steps(
    config: Config, data: Any, batches: Batches, step: Step, state: State, records: Records, stopping: Signals, out: Path | None
) -> None:
    """Train to the end, or until the run had to go back to its last checkpoint."""
    progress = state.progress
    state.trained.train()
    for batch in records.time(load(data, config, state.device, batches.after(progress.step))):
        state.set_rate()
        step(batch)
        records.count_step()
        stop, overdue = distributed.anywhere(bool(stopping), records.overdue())
        ended, lost = progress.step % batches.per_epoch == 0, progress.skipped_in_a_row > config.patience
        if not (ended or stop or overdue or lost or progress.step % LOOK_EVERY == 0):
            continue
        if not step.sound():
            return records.go_back()
        with stopping.sheltered():
            if ended:
                records.end_epoch()
            elif stop or overdue or lost:
                records.save()
        if lost:
            raise UserError(records.explain_divergence())
        if stop:
            stopping.raise_()
        _evaluate_if_due(config, state, records, stopping, out)
    return None


def _evaluate_if_due(config: Config, state: State, records: Records, stopping: Signals, out: Path | None) -> None:
    if records.wants_evaluation():
        with stopping.at_once():
            metrics = evaluate(config, state.evaluated, state.device, out if distributed.rank() == 0 else None)
        with stopping.sheltered():
            records.evaluated(metrics)


def evaluate(config: Config, model: nn.Module, device: torch.device, out: Path | None = None) -> dict[str, float]:
    """The task's metrics over its "val" split, its pictures in `out`; the model is left in the mode it came in.

    Raises:
        UserError: the network answers NaN or inf, which the metrics make nothing of.
    """
    data = config.task.dataset("val")
    own = distributed.share(np.arange(len(data)))  # type: ignore[arg-type]
    parts = [(0, own[i : i + config.batch_size]) for i in range(0, len(own), config.batch_size)]
    batches = load(data, config, device, parts)
    training = model.training
    distributed.same_buffers(model)
    model.eval()
    finite: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, answer: finite.extend(x.isfinite().all() for x in floats(answer)))
    try:
        with torch.no_grad(), autocast(config, device):
            moved = ({name: value.to(device, non_blocking=True) for name, value in batch.items()} for batch in batches)
            return config.task.evaluate(model, moved, out)
    except UserError:
        raise
    except Exception as error:
        if all(finite):
            raise
        what = f"{type(error).__name__} {' '.join(str(error).split())[:150]}"
        raise UserError(
            f"the network answers NaN or inf to the val split, which cannot be evaluated ({what}): its weights have blown up;"
            " lower optimizer.lr or sharpness.rho, or set clip_norm"
        ) from error
    finally:
        hook.remove()
        model.train(training)
