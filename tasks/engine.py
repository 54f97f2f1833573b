"""The one training loop. Every optimizer is stepped with a closure, and the task owns the loss of a batch."""

from __future__ import annotations

import inspect
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from arsam import ARSAM
from tasks import checkpoint, log
from tasks.base import Batch, UserError
from tasks.config import Config, describe, in_steps


@dataclass
class Progress:
    """Where a run stands, between two steps. All of it is in the checkpoint."""

    step: int = 0
    passes: int = 0  # forward-backward passes so far
    epoch_loss: float = 0.0  # sum over the steps of the present epoch
    epoch_passes: int = 0
    epoch_seconds: float = 0.0
    seconds: float = 0.0  # spent in training steps, evaluation left out
    waiting_seconds: float = 0.0  # of these, until a batch was there
    best: float | None = None


def train(config: Config, out: Path, *, device: torch.device, resume: bool = False, name: str = "") -> dict[str, Any]:
    """Train and evaluate one config, and write the run's files into a folder.

    Args:
        config: what to run.
        out: folder for run.json, metrics.jsonl, last.pt, best.pt, result.json and curves.png.
        device: where to run.
        resume: go on from ``out/last.pt``.
        name: of the config, for the records.

    Returns:
        What result.json holds.

    Raises:
        UserError: something the user can put right.
        KeyboardInterrupt: SIGINT or SIGTERM came, and last.pt has been written.
    """
    task = config.task
    torch.manual_seed(config.seed)
    data = task.dataset("train")
    batches = Batches(len(data), config.batch_size, config.epochs, config.seed)  # type: ignore[arg-type]
    model = task.build().to(device).to(memory_format=memory_format(config))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True) if config.ema else None
    evaluated = average.module if average is not None else model
    optimizer = build_optimizer(config, model, batches.per_epoch)
    factor = partial(in_steps(config.schedule, batches.per_epoch), total_steps=batches.total)
    schedule = LambdaLR(optimizer, factor)
    clip = _clipping(optimizer, model, config.clip_norm)

    state = Progress()
    if resume:
        state = _restore(out, config, model, average, optimizer, schedule)
        batches.start = state.step
    out.mkdir(parents=True, exist_ok=True)
    records = {"name": name, "config": describe(config), **log.environment(device)}
    log.write_json(out / "run.json", records)
    metrics = log.Metrics(out / "metrics.jsonl", state.step // batches.per_epoch)
    last: dict[str, float] = next((line["metrics"] for line in reversed(metrics.lines) if "metrics" in line), {})

    loss_sum = torch.full((), state.epoch_loss, dtype=torch.float64, device=device)

    def save(path: Path) -> None:
        state.epoch_loss = loss_sum.item()
        checkpoint.save(path, _state(config, state, model, average, optimizer, schedule))

    bar = tqdm(total=batches.total, initial=state.step, unit="step", disable=not sys.stdout.isatty(), dynamic_ncols=True)
    loader = _loader(Seeded(data, config.seed), config, device, batch_sampler=batches)
    model.train()
    with _interruptible() as interrupted, bar:
        clock = time.perf_counter()
        for cpu_batch in loader:
            state.waiting_seconds += time.perf_counter() - clock
            batch = _moved(cpu_batch, device)

            def closure(batch: Batch = batch) -> Tensor:
                optimizer.zero_grad()
                with _autocast(config, device):
                    loss = task.loss(model, batch)
                loss.backward()
                clip()
                state.passes += 1
                state.epoch_passes += 1
                return loss

            rate = optimizer.param_groups[0]["lr"]
            loss_sum += optimizer.step(closure).detach()  # type: ignore[union-attr]
            schedule.step()
            if average is not None:
                average.update_parameters(model)
            state.step += 1
            steps_done = (state.step - 1) % batches.per_epoch + 1
            if steps_done == batches.per_epoch and device.type == "cuda":
                torch.cuda.synchronize(device)  # the clock must not stop before the work does
            now = time.perf_counter()
            state.seconds += now - clock
            state.epoch_seconds += now - clock
            clock = now
            if not bar.disable and bar.update():
                speed = steps_done * batches.size / state.epoch_seconds
                ascents = state.passes - state.step
                bar.set_postfix_str(f"loss {loss_sum.item() / steps_done:.4g}, {speed:.0f} images/s, {ascents} ascents")

            if steps_done == batches.per_epoch:
                epoch = state.step // batches.per_epoch
                line = {
                    "epoch": epoch,
                    "step": state.step,
                    "loss": loss_sum.item() / steps_done,
                    "lr": rate,
                    "passes_per_step": state.epoch_passes / steps_done,
                    "images_per_second": steps_done * batches.size / state.epoch_seconds,
                    "seconds": state.seconds,
                }
                metrics.write(line)
                text = "epoch {epoch:3d}  loss {loss:.5g}  passes/step {passes_per_step:.2f}  {images_per_second:.0f} images/s"
                if epoch % config.eval_every == 0 or epoch == config.epochs:
                    last = evaluate(config, evaluated, device, out)
                    metrics.write({"epoch": epoch, "step": state.step, "metrics": last})
                    text += f"  {task.metric} {last[task.metric]:.4f}"
                bar.write(text.format(**line)) if not bar.disable else print(text.format(**line), flush=True)
                loss_sum.zero_()
                state.epoch_passes, state.epoch_seconds = 0, 0.0
                if last and (state.best is None or last[task.metric] > state.best):
                    state.best = last[task.metric]
                    save(out / "best.pt")
                save(out / "last.pt")
                log.draw_curves(out / "curves.png", metrics.lines, task.metric)
                clock = time.perf_counter()
            if interrupted():
                save(out / "last.pt")
                raise KeyboardInterrupt
    result = {
        "task": task.name,
        "metrics": last,
        "steps": state.step,
        "ascents": state.passes - state.step,
        "passes_per_step": state.passes / state.step,
        "train_seconds": state.seconds,
        "images_per_second": state.step * batches.size / state.seconds,
        "waiting": state.waiting_seconds / state.seconds,
        "peak_memory_mb": _peak_memory(device),
        "seed": config.seed,
        "config": name,
    }
    log.write_json(out / "result.json", result)
    return result


def evaluate(config: Config, model: nn.Module, device: torch.device, out: Path | None = None) -> dict[str, float]:
    """The task's metrics over its "val" split, its pictures in `out`; the model is left in the mode it came in."""
    data = config.task.dataset("val")
    keys = [(0, index) for index in range(len(data))]  # type: ignore[arg-type]
    loader = _loader(Seeded(data, config.seed), config, device, batch_size=config.batch_size, sampler=keys)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _autocast(config, device):
            return config.task.evaluate(model, (_moved(batch, device) for batch in loader), out)
    finally:
        model.train(training)


def memory_format(config: Config) -> torch.memory_format:
    """Of the config's model."""
    return torch.channels_last if config.channels_last else torch.preserve_format


def build_optimizer(config: Config, model: nn.Module, steps_per_epoch: int) -> Optimizer:
    """The config's optimizer, sharpness-aware where the config says so.

    `sampling` and `reuse` come as partials and are built here: rules that take ``total_steps`` are given it.

    Raises:
        UserError: an argument is missing or out of range.
    """
    try:
        optimizer = config.optimizer(config.task.parameters(model))
        return optimizer if config.sharpness is None else _sharpened(config, optimizer, model, steps_per_epoch)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer or sharpness: {error}") from error


def _sharpened(config: Config, optimizer: Optimizer, model: nn.Module, steps_per_epoch: int) -> ARSAM:
    sharpness = in_steps(config.sharpness, steps_per_epoch)
    rules: dict[str, Any] = {}
    for name in ("sampling", "reuse"):
        rule = sharpness.keywords.get(name) if isinstance(sharpness, partial) else None
        if rule is not None:
            rule = in_steps(rule, steps_per_epoch)
            takes_total = "total_steps" in inspect.signature(rule).parameters
            rules[name] = rule(total_steps=steps_per_epoch * config.epochs) if takes_total else rule()
    return sharpness(optimizer, model=model, **rules)


class Batches(Sampler[list[tuple[int, int]]]):
    """(epoch, index) keys of every batch of a run, from step `start` on: a function of the seed and the step alone.

    Args:
        items: in the training split.
        size: of a batch; a smaller split makes one smaller batch, a remainder waits for another epoch's order.
        epochs: of the run.
        seed: of the order.
    """

    def __init__(self, items: int, size: int, epochs: int, seed: int) -> None:
        self.items = items
        self.size = min(size, items)
        self.per_epoch = items // self.size
        self.total = self.per_epoch * epochs
        self.start = 0
        self._seed = seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order: list[int] = []
        for step in range(self.start, self.total):
            epoch, place = divmod(step, self.per_epoch)
            if not order or place == 0:
                order = np.random.default_rng([self._seed, epoch]).permutation(self.items).tolist()
            yield [(epoch, index) for index in order[place * self.size : (place + 1) * self.size]]

    def __len__(self) -> int:
        return self.total - self.start


class Seeded(Dataset[Any]):
    """A dataset whose random choices depend on (seed, epoch, index) alone, whatever process loads the item.

    So the number of workers changes nothing, and a resumed run sees the very items that it would have seen.
    """

    def __init__(self, data: Dataset[Any], seed: int) -> None:
        self._data = data
        self._seed = seed

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        word = int(np.random.SeedSequence([self._seed, epoch, index]).generate_state(1)[0])
        before = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=()):
            random.seed(word)
            np.random.seed(word)
            torch.manual_seed(word)
            try:
                return self._data[index]
            finally:
                random.setstate(before[0])
                np.random.set_state(before[1])


def _clipping(optimizer: Optimizer, model: nn.Module, norm: float | None) -> Callable[[], None]:
    """Clip the gradient that the update sees: what a closure calls after its backward pass."""

    def clip(*_: Any) -> None:
        if norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), norm)

    if isinstance(optimizer, ARSAM):
        # The passes must not be clipped one by one: that would bend their difference. The base sees the mixed gradient.
        optimizer.base.register_step_pre_hook(clip)
        return lambda: None
    return clip


def _loader(data: Dataset[Any], config: Config, device: torch.device, **batching: Any) -> DataLoader[Batch]:
    # A generator of its own: without one a loader draws from the global one, and a resumed run would be a draw ahead.
    generator = torch.Generator().manual_seed(config.seed)
    workers = min(config.num_workers, os.cpu_count() or 1)
    return DataLoader(data, num_workers=workers, pin_memory=device.type == "cuda", generator=generator, **batching)


def _autocast(config: Config, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}


def _peak_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _state(
    config: Config,
    state: Progress,
    model: nn.Module,
    average: AveragedModel | None,
    optimizer: Optimizer,
    schedule: LambdaLR,
) -> dict[str, Any]:
    return {
        "config": describe(config),
        "progress": asdict(state),
        "model": model.state_dict(),
        "average": average.module.state_dict() if average is not None else None,
        "averaged": int(average.n_averaged) if average is not None else 0,
        "optimizer": optimizer.state_dict(),
        "schedule": {"last_epoch": schedule.last_epoch, "lr": schedule.get_last_lr()},
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(
    out: Path, config: Config, model: nn.Module, average: AveragedModel | None, optimizer: Optimizer, schedule: LambdaLR
) -> Progress:
    path = out / "last.pt"
    saved = checkpoint.load(path)
    if "progress" not in saved:
        raise UserError(f"{path}: holds weights only; a run goes on from its own last.pt")
    differences = list(_differences(saved["config"], describe(config)))
    if differences:
        raise UserError(f"{path}: made with another config: {'; '.join(differences[:5])}")
    model.load_state_dict(saved["model"])
    if average is not None:
        average.module.load_state_dict(saved["average"])
        average.n_averaged.fill_(saved["averaged"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.last_epoch = saved["schedule"]["last_epoch"]
    schedule._last_lr = saved["schedule"]["lr"]  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    torch.set_rng_state(saved["rng"])
    if torch.cuda.is_available() and saved["cuda_rng"]:
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
    return Progress(**saved["progress"])


def _differences(old: Any, new: Any, name: str = "") -> Iterator[str]:
    """Where two described configs differ, save in what changes no result."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old.keys() | new.keys():
            if key != "num_workers":
                yield from _differences(old.get(key), new.get(key), f"{name}.{key}".lstrip("."))
    elif old != new:
        yield f"{name} was {old}, is {new}"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """SIGINT and SIGTERM are noted, for the loop to act on between two steps; a second SIGINT stops at once."""
    received: list[int] = []

    def note(number: int, _frame: Any) -> None:
        received.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
