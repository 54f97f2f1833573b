"""Where the lines of metrics.jsonl go besides: TensorBoard, Weights & Biases, MLflow, each if it is installed."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tasks.errors import UserError


class Logger(Protocol):
    """Takes numbers with a step, and is closed at the end."""

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Log numbers of a step."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        self._writer = _module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(out))

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """As scalars."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """A run of the project "arsam", whose files lie in the run's folder."""

    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        self._run = _module("wandb", "wandb").init(project="arsam", name=out.name, dir=str(out), config=config)

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """As metrics."""
        self._run.log(numbers, step=step)

    def close(self) -> None:
        """Upload what is left."""
        self._run.finish()


class MLflow:
    """A run of the experiment that MLflow's own environment variables name."""

    def __init__(self, out: Path, config: dict[str, Any]) -> None:
        self._mlflow = _module("mlflow", "mlflow")
        self._mlflow.start_run(run_name=out.name)
        self._mlflow.log_dict(config, "config.json")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """As metrics."""
        self._mlflow.log_metrics(numbers, step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


_KINDS: dict[str, type[TensorBoard] | type[WandB] | type[MLflow]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
}
_AWAY = {
    "tensorboard": "log_to=None trains without",
    "wandb": "`wandb login` once, or WANDB_MODE=offline, or log_to=None",
    "mlflow": "MLFLOW_TRACKING_URI=sqlite:///FILE or a server's address, or log_to=None",
}


class _Lasting:
    """A logger whose service may go away, which costs no training."""

    def __init__(self, kind: str, logger: Logger, warn: Callable[[str], None]) -> None:
        self._kind, self._logger, self._warn = kind, logger, warn

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Log, or warn."""
        self._try(lambda: self._logger.write(step, numbers))

    def close(self) -> None:
        """Finish, or warn."""
        self._try(self._logger.close)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            self._warn(f"log_to={self._kind}: not logged ({_told(error)}); the run goes on")


def start(kind: str, out: Path, config: dict[str, Any], warn: Callable[[str], None]) -> Logger:
    """A logger of a kind, ready to write.

    Args:
        kind: of `check`.
        out: the run's folder.
        config: in plain containers.
        warn: called with a sentence where something could not be logged, which is no error.

    Raises:
        UserError: it is not installed, or its service or its folder is not to be had.
    """
    try:
        return _Lasting(kind, _KINDS[kind](out, config), warn)
    except UserError:
        raise
    except Exception as error:  # of a package of others, and of what is at the other end of a network
        raise UserError(f"log_to={kind}: cannot be started ({_told(error)}); {_AWAY[kind]}") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__} {' '.join(str(error).split())[:200]}"


def check(kind: str) -> None:
    """See that a kind of logger is installed.

    Raises:
        UserError: it is not.
    """
    _module({"tensorboard": "torch.utils.tensorboard"}.get(kind, kind), kind)


def numbers(line: dict[str, Any]) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl, those of an evaluation among them."""
    flat = {**line, **line.get("metrics", {})}
    return {
        name: float(value)
        for name, value in flat.items()
        if isinstance(value, (int, float)) and name != "step" and math.isfinite(value)
    }


def _module(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"log_to: needs the package {package}, which is not installed: pip install {package}") from error
