"""The one training loop. Every optimizer is stepped with a closure, and the task owns the loss of a batch."""

from __future__ import annotations

import inspect
import math
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from arsam import ARSAM, functional, scaled_step
from tasks import checkpoint, distributed, folder, log
from tasks.config import Config, describe, in_steps
from tasks.errors import UserError
from tasks.loading import Batches, loader
from tasks.task import Batch


@dataclass
class Progress:
    """Where a run stands, between two steps. All of it is in the checkpoint."""

    step: int = 0
    passes: int = 0  # forward-backward passes so far
    skipped: int = 0  # steps left out because of NaN or inf
    skipped_in_a_row: int = 0
    epoch_loss: float = 0.0  # sum over the steps of the present epoch, those left out not counted
    epoch_passes: int = 0
    epoch_skipped: int = 0
    epoch_seconds: float = 0.0
    epoch_seconds_waiting: float = 0.0  # seconds in which the next batch was not there yet
    seconds: float = 0.0  # spent in training steps, evaluation left out
    best: float | None = None

    def skip(self) -> None:
        """The present step is left out."""
        self.skipped += 1
        self.skipped_in_a_row += 1
        self.epoch_skipped += 1

    def new_epoch(self) -> None:
        """Start the counts of an epoch."""
        self.epoch_passes = self.epoch_skipped = 0
        self.epoch_loss = self.epoch_seconds = self.epoch_seconds_waiting = 0.0


class NotFiniteError(Exception):
    """A pass gave a NaN or an inf, in the loss or in a gradient."""


def train(config: Config, out: Path, *, device: torch.device, resume: bool = False, name: str = "") -> dict[str, Any]:
    """Train and evaluate one config, and write the run's files into a folder.

    Args:
        config: what to run.
        out: folder for run.json, metrics.jsonl, last.pt, best.pt, result.json and curves.png; while the run is not finished,
            also previous.pt, the checkpoint before the last.
        device: where to run.
        resume: go on from ``out/last.pt``.
        name: of the config, for the records.

    Returns:
        What result.json holds.

    Raises:
        UserError: something the user can put right.
        KeyboardInterrupt: SIGINT or SIGTERM came, and last.pt has been written.
    """
    with ExitStack() as until_the_end:
        return _train(config, out, device, resume, name, until_the_end)


def _train(
    config: Config, out: Path, device: torch.device, resume: bool, name: str, until_the_end: ExitStack
) -> dict[str, Any]:
    task = config.task
    torch.manual_seed(config.seed)
    data = task.dataset("train")
    batches = Batches(len(data), config.batch_size, config.epochs, config.seed)  # type: ignore[arg-type]
    distributed.check(batches.size)
    model = task.build().to(device).to(memory_format=memory_format(config))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True) if config.ema else None
    evaluated = average.module if average is not None else model
    trained = distributed.parallel(model, device)
    optimizer = build_optimizer(config, trained, batches.per_epoch)
    factor = partial(in_steps(config.schedule, batches.per_epoch), total_steps=batches.total)
    scaler = GradScaler(device.type, enabled=config.precision == "fp16")
    clip = _clipping(optimizer, model, config)
    writes = distributed.rank() == 0

    state, lines = Progress(), None
    paths = out / "last.pt", out / "previous.pt"
    if resume and not any(path.is_file() for path in paths) and (out / "run.json").is_file():
        resume = False
        if writes:
            print(f"warning: {out}: the run wrote no checkpoint; it starts from the beginning", file=sys.stderr, flush=True)
    if writes and (not resume or out.is_dir()):
        until_the_end.enter_context(folder.held(out))
        for leftover in out.glob("*.tmp"):  # of a process that was killed
            leftover.unlink()
    if resume:
        if writes:
            checkpoint.recover(*paths)
        distributed.first(None)  # the others wait for it
        state, lines = _restore(out, config, model, average, optimizer, scaler)
        batches.start = state.step
    elif distributed.rank():
        torch.manual_seed(config.seed + 1_000_003 * distributed.rank())  # dropout of its own, after the same initialisation
    if writes:
        with folder.required(out / "run.json"):
            log.write_json(out / "run.json", {"name": name, "config": describe(config), **log.environment(device)})
    metrics = log.Metrics(out / "metrics.jsonl", state.step // batches.per_epoch, writes, lines)
    last: dict[str, float] = next((line["metrics"] for line in reversed(metrics.lines) if "metrics" in line), {})

    loss_sum = torch.full((), state.epoch_loss, dtype=torch.float64, device=device)

    def save(path: Path, written: Callable[[Path], AbstractContextManager[None]] = folder.tolerated) -> bool:
        state.epoch_loss = loss_sum.item()
        whole = {**_state(config, state, model, average, optimizer, scaler), "metrics": metrics.lines}
        done = not writes
        if writes:
            with written(path):
                checkpoint.save(path, whole, paths[1] if path == paths[0] and state.step else None)
                done = True
        return not distributed.anywhere(not done)

    bar = tqdm(
        total=batches.total, initial=state.step, unit="step", disable=not (writes and sys.stdout.isatty()), dynamic_ncols=True
    )
    trained.train()
    with _interruptible() as interrupted, bar:
        if not resume:
            if writes:
                paths[1].unlink(missing_ok=True)  # of another run
            save(paths[0], folder.required)  # shows that there is room for one before time is spent
        saved = True
        clock = time.perf_counter()
        for cpu_batch in loader(data, config, device, batch_sampler=batches):
            state.epoch_seconds_waiting += time.perf_counter() - clock
            batch = _moved(cpu_batch, device)

            def closure(batch: Batch = batch) -> Tensor:
                optimizer.zero_grad()
                loss = _forward_backward(config, trained, batch, scaler)
                state.passes += 1
                state.epoch_passes += 1
                if not scaler.is_enabled():  # it looks for infs itself
                    _check_finite(model, loss)
                clip()
                return loss

            for group in optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor(state.step)
            statistics = [buffer.clone() for buffer in model.buffers()]
            try:
                loss_sum += _stepped(optimizer, closure, scaler)
            except NotFiniteError:
                for buffer, value in zip(model.buffers(), statistics, strict=True):
                    buffer.copy_(value)
                state.skip()
            else:
                state.skipped_in_a_row = 0
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
                line = _epoch_line(state, loss_sum, batches)
                bar.set_postfix_str(f"{_shown(line)}, {state.passes - state.step} ascents")

            if state.skipped_in_a_row > config.patience:
                save(paths[0])
                raise UserError(_diverged(out, state, batches))
            if steps_done == batches.per_epoch:
                loss_sum.fill_(sum(distributed.gathered([loss_sum.item()])) / distributed.world())
                line = _epoch_line(state, loss_sum, batches)
                metrics.write({**line, "lr": optimizer.param_groups[0]["lr"], "seconds": state.seconds})
                text = f"epoch {line['epoch']:3d}  {_shown(line)}"
                if line["epoch"] % config.eval_every == 0 or line["epoch"] == config.epochs:
                    last = evaluate(config, evaluated, device, out if writes else None)
                    metrics.write({"epoch": line["epoch"], "step": state.step, "metrics": last})
                    text += f"  {task.metric} {last[task.metric]:.4f}"
                if writes:
                    bar.write(text) if not bar.disable else print(text, flush=True)
                loss_sum.zero_()
                state.new_epoch()
                if last and (state.best is None or last[task.metric] > state.best):
                    before, state.best = state.best, last[task.metric]
                    if not save(out / "best.pt"):
                        state.best = before
                saved = save(paths[0])
                if writes:
                    with folder.tolerated(out / "curves.png"):
                        log.draw_curves(out / "curves.png", metrics.lines, task.metric)
                clock = time.perf_counter()
            if distributed.anywhere(interrupted()):
                save(paths[0])
                raise KeyboardInterrupt
    if not saved:
        save(paths[0], folder.required)
    result = {
        "task": task.name,
        "metrics": last,
        "steps": state.step,
        "ascents": state.passes - state.step,
        "passes_per_step": state.passes / state.step,
        "train_seconds": state.seconds,
        "images_per_second": state.step * batches.size / state.seconds,
        "peak_memory_mb": _peak_memory(device),
        "seed": config.seed,
        "config": name,
        **({"skipped": state.skipped} if state.skipped else {}),
    }
    if writes:
        with folder.required(out / "result.json"):
            metrics.flush()
            log.write_json(out / "result.json", result)
            paths[1].unlink(missing_ok=True)
    return result


def _forward_backward(config: Config, model: nn.Module, batch: Batch, scaler: GradScaler) -> Tensor:
    """One pass over a batch, in micro-batches whose gradients add up; returns the mean loss."""
    sizes = [len(part) for part in next(iter(batch.values())).chunk(config.accumulate)]
    parts = [
        dict(zip(batch, values, strict=True)) for values in zip(*(value.split(sizes) for value in batch.values()), strict=True)
    ]
    losses: list[Tensor] = []
    for size, part in zip(sizes, parts, strict=True):
        # The processes' gradients are averaged once, after the last part.
        early = len(losses) + 1 < len(parts)
        with model.no_sync() if early and isinstance(model, DistributedDataParallel) else nullcontext():
            with _autocast(config, part[next(iter(part))].device):
                loss = config.task.loss(model, part) * (size / sum(sizes))
            scaled: Any = scaler.scale(loss)
            scaled.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def _check_finite(model: nn.Module, loss: Tensor) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if distributed.anywhere(not math.isfinite(functional.global_norm(gradients) + 0 * loss)):
        raise NotFiniteError


def _stepped(optimizer: Optimizer, closure: Callable[[], Tensor], scaler: GradScaler) -> Tensor:
    """A step with the kind of closure that the precision needs; the loss."""
    if not scaler.is_enabled():
        return optimizer.step(closure)  # type: ignore[return-value]
    scale = scaler.get_scale()
    loss = scaled_step(optimizer, closure, scaler)
    if scaler.get_scale() < scale:  # its own search for a scale that overflows nowhere leaves steps out too
        raise NotFiniteError
    return loss


def _epoch_line(state: Progress, loss_sum: Tensor, batches: Batches) -> dict[str, Any]:
    """The present epoch so far, as metrics.jsonl has it."""
    steps = (state.step - 1) % batches.per_epoch + 1
    taken = steps - state.epoch_skipped
    return {
        "epoch": (state.step - 1) // batches.per_epoch + 1,
        "step": state.step,
        "loss": loss_sum.item() / taken if taken else None,
        "passes_per_step": state.epoch_passes / steps,
        "images_per_second": steps * batches.size / state.epoch_seconds,
        "seconds_waiting": state.epoch_seconds_waiting,  # for data
        "skipped": state.epoch_skipped,
    }


def _shown(line: dict[str, Any]) -> str:
    loss = "none" if line["loss"] is None else f"{line['loss']:.5g}"
    text = f"loss {loss}  passes/step {line['passes_per_step']:.2f}  {line['images_per_second']:.0f} images/s"
    return text + (f"  {line['skipped']} steps skipped (NaN or inf)" if line["skipped"] else "")


def _diverged(out: Path, state: Progress, batches: Batches) -> str:
    keys = batches.keys(state.step - 1)
    items = ", ".join(str(index) for _, index in keys[:8]) + (", ..." if len(keys) > 8 else "")
    return (
        f"{out}: NaN or inf in the loss or a gradient on {state.skipped_in_a_row} steps in a row, lastly step"
        f" {state.step - 1} (epoch {keys[0][0] + 1}, training items {items}); last.pt holds the weights before them; lower"
        " optimizer.lr or sharpness.rho, set clip_norm, or look at these items"
    )


def evaluate(config: Config, model: nn.Module, device: torch.device, out: Path | None = None) -> dict[str, float]:
    """The task's metrics over its "val" split, its pictures in `out`; the model is left in the mode it came in."""
    data = config.task.dataset("val")
    keys = distributed.share([(0, index) for index in range(len(data))])  # type: ignore[arg-type]
    batches = loader(data, config, device, batch_size=config.batch_size, sampler=keys)
    training = model.training
    distributed.same_buffers(model)
    model.eval()
    try:
        with torch.no_grad(), _autocast(config, device):
            return config.task.evaluate(model, (_moved(batch, device) for batch in batches), out)
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
        optimizer = config.optimizer(config.task.parameters(getattr(model, "module", model)))
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


def _clipping(optimizer: Optimizer, model: nn.Module, config: Config) -> Callable[[], None]:
    """Clip the gradient that the update sees: what a closure calls after its backward pass."""

    def clip(*_: Any) -> None:
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)

    if isinstance(optimizer, ARSAM):
        # The passes must not be clipped one by one: that would bend their difference. The base sees the mixed gradient.
        optimizer.base.register_step_pre_hook(clip)
    elif config.precision == "fp16":
        optimizer.register_step_pre_hook(clip)  # by then the gradient is unscaled
    else:
        return clip
    return lambda: None


def _autocast(config: Config, device: torch.device) -> torch.autocast:
    half = torch.float16 if config.precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, half, enabled=config.precision != "fp32")


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
    scaler: GradScaler,
) -> dict[str, Any]:
    return {
        "config": describe(config),
        "progress": asdict(state),
        "model": model.state_dict(),
        "average": average.module.state_dict() if average is not None else None,
        "averaged": int(average.n_averaged) if average is not None else 0,
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "rng": distributed.gathered([torch.get_rng_state()]),
        "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(
    out: Path, config: Config, model: nn.Module, average: AveragedModel | None, optimizer: Optimizer, scaler: GradScaler
) -> tuple[Progress, list[dict[str, Any]] | None]:
    path = out / "last.pt"
    saved = checkpoint.load(path)
    if "progress" not in saved or "config" not in saved:
        raise UserError(f"{path}: holds weights only; a run goes on from its own last.pt")
    differences = list(_differences(saved["config"], describe(config)))
    if differences:
        raise UserError(f"{path}: made with another config: {'; '.join(differences[:5])}")
    try:
        return _restored(saved, model, average, optimizer, scaler)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = " ".join(str(error).split())[:300]
        raise UserError(f"{path}: not the checkpoint of a run of this version: {type(error).__name__} {what}") from error


def _restored(
    saved: dict[str, Any], model: nn.Module, average: AveragedModel | None, optimizer: Optimizer, scaler: GradScaler
) -> tuple[Progress, list[dict[str, Any]] | None]:
    """Where the run stands, and the lines of its metrics.jsonl, which may not have reached the file."""
    lines = saved.get("metrics")
    if lines is not None and not all(line["epoch"] >= 1 for line in lines):
        raise ValueError("metrics of no epoch")
    model.load_state_dict(saved["model"])
    if average is not None:
        average.module.load_state_dict(saved["average"])
        average.n_averaged.fill_(saved["averaged"])
    optimizer.load_state_dict(saved["optimizer"])
    scaler.load_state_dict(saved["scaler"])
    if distributed.rank() < len(saved["rng"]):
        torch.set_rng_state(saved["rng"][distributed.rank()])
    if torch.cuda.is_available() and saved["cuda_rng"]:
        torch.cuda.set_rng_state_all(saved["cuda_rng"])
    return Progress(**saved["progress"]), lines


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
