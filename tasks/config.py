"""Configs: a frozen dataclass in a Python module, loaded by path, changed by `name=value` overrides.

What is built later is a `functools.partial`, so a config can be read, compared and printed without building anything.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
import inspect
import os
import sys
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import typeguard
from torch.optim import Optimizer

import arsam
from tasks import schedule as schedules
from tasks.errors import UserError
from tasks.task import Task


class Epochs(int):
    """A whole number of epochs, where steps are expected: the engine turns it into steps."""

    def __repr__(self) -> str:
        return f"Epochs({int(self)})"


@dataclass(frozen=True)
class Config:
    """One training run.

    Args:
        task: what is learned and how it is measured.
        optimizer: called with the parameters.
        sharpness: called with the optimizer and the model: ``partial(ARSAM, rho=...)``; None is the baseline.
        schedule: called with (step, total steps), returns the factor of the learning rate.
        epochs: passes over the training split, >= 1.
        batch_size: items per step, >= 1, over all processes and micro-batches: neither changes what a run does.
        accumulate: micro-batches that a batch is cut into, to save memory, >= 1.
        seed: of initialisation, order and augmentation.
        num_workers: loader processes, at most one per core; 0 loads in the training process.
        eval_every: epochs between evaluations; the last epoch is always evaluated.
        precision: "fp32", or "bf16" or "fp16" for autocast; "fp16" scales the loss.
        channels_last: memory format of the model.
        clip_norm: the update's gradient (with ARSAM: the mixed one) is scaled down to this L2 norm; None: not clipped.
        patience: steps in a row that may be left out because of NaN or inf, >= 0; then the run stops.
        ema: decay per step of the averaged weights that are evaluated; None: no average.
        pretraining: the run whose weights this one starts from, where a tool is given none; its task's data and model are
            this config's.
    """

    task: Task
    optimizer: Callable[..., Optimizer]
    sharpness: Callable[..., arsam.ARSAM] | None = None
    schedule: Callable[..., float] = schedules.cosine
    epochs: int = 1
    batch_size: int = 32
    accumulate: int = 1
    seed: int = 0
    num_workers: int = 2
    eval_every: int = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = True
    clip_norm: float | None = None
    patience: int = 10
    ema: float | None = None
    pretraining: Config | None = None

    def __post_init__(self) -> None:
        leasts = {"epochs": 1, "batch_size": 1, "accumulate": 1, "num_workers": 0, "eval_every": 1, "patience": 0, "seed": 0}
        for name, least in leasts.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be >= {least}, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema must lie in (0, 1), got {self.ema}; None switches it off")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be > 0, got {self.clip_norm}; None switches it off")


def load(path: str, *, sample: bool = False) -> Config:
    """The `config` of a config file, or its `sample`: the same run shrunk to the embedded sample data.

    Raises:
        UserError: no such file, the file raises, or it has no such variable.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such config file; see configs/")
    spec = importlib.util.spec_from_file_location(f"config {path}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: a config is a Python file, *.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where a dataclass of the config's own looks for its annotations
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from error
    name = "sample" if sample else "config"
    config = getattr(module, name, None)
    if not isinstance(config, Config):
        raise UserError(f"{path}: expected a variable `{name}` that is a tasks.config.Config")
    return config


def override(config: Config, assignments: list[str]) -> Config:
    """Apply ``name=value`` overrides, names with dots, values as Python literals.

    A value may also be a call of one of arsam's rules or optimizers, such as ``sharpness.sampling=Tail(fraction=0.3)``.

    Raises:
        UserError: unknown name, wrong type, or a value out of range.
    """
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        try:
            config = _replace(config, name.split("."), text, assignment)
        except (ValueError, TypeError) as error:
            raise UserError(f"{assignment}: {error}") from error
    return config


def _replace(node: Any, path: list[str], text: str, assignment: str) -> Any:
    """A copy of a dataclass or partial with one value, deep inside, replaced."""
    name, rest = path[0], path[1:]
    hints, present = _fields(node)
    if not hints:
        hint = "; start from sharpness=ARSAM(rho=0.05)" if assignment.startswith("sharpness.") else ""
        raise UserError(f"{assignment}: there is nothing named {name} inside {node!r}{hint}")
    if name not in hints:
        close = difflib.get_close_matches(name, hints, n=1)
        known = f"did you mean {close[0]}?" if close else f"known names: {', '.join(hints)}"
        raise UserError(f"{assignment}: unknown name {name}; {known}")
    value = _replace(present.get(name), rest, text, assignment) if rest else _value(text, hints[name], assignment)
    if isinstance(node, functools.partial):
        return functools.partial(node.func, *node.args, **{**node.keywords, name: value})
    return dataclasses.replace(node, **{name: value})


def _fields(node: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Names that may be set, with their types, and the present values, of a dataclass or a callable given as partial."""
    if dataclasses.is_dataclass(node):
        hints = typing.get_type_hints(type(node))
        names = [f.name for f in dataclasses.fields(node)]
        return {n: hints[n] for n in names}, {n: getattr(node, n) for n in names}
    function = node.func if isinstance(node, functools.partial) else node
    if not callable(function):
        return {}, {}
    parameters = inspect.signature(function).parameters
    target = function.__init__ if inspect.isclass(function) else function
    try:
        hints = typing.get_type_hints(target)
    except NameError:  # a library's annotation that exists for type checkers only
        hints = {}
    present = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    if isinstance(node, functools.partial):
        present |= node.keywords
    return {n: hints.get(n, Any) for n in parameters}, present


# what ast says to text that is no literal; MemoryError and RecursionError are for hundreds of open brackets
_NO_LITERAL = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)


def _value(text: str, hint: Any, assignment: str) -> Any:
    candidates: list[Any] = []
    try:
        candidates.append(ast.literal_eval(text))
    except _NO_LITERAL:
        candidates.append(_call(text, assignment))
    candidates.append(text)  # a path or a name needs no quotes
    expected = _resolved(hint)
    for value in candidates:
        if value is None and not (hint is Any or type(None) in typing.get_args(expected) or expected is type(None)):
            continue
        if isinstance(value, bool) and expected in (int, float):
            continue
        try:
            return typeguard.check_type(value, expected)
        except typeguard.TypeCheckError:
            continue
    name = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
    raise UserError(f"{assignment}: expected {name}, got {text}")


def _resolved(hint: Any) -> Any:
    """The hint as a config gives the value: where a rule object is expected, a config holds what builds it."""
    rules = (arsam.sampling.Sampling, arsam.reuse.Reuse)
    if hint in rules or any(rule in typing.get_args(hint) for rule in rules):
        return Callable[..., Any] | None
    return hint


def _names() -> dict[str, Any]:
    """What an override may call."""
    rules = {c.__name__: c for c in (*arsam.sampling.RULES, *arsam.reuse.RULES)}
    optimizers = {n: c for n, c in vars(torch.optim).items() if inspect.isclass(c) and issubclass(c, Optimizer)}
    factors = {n: f for n, f in vars(schedules).items() if inspect.isfunction(f) and not n.startswith("_")}
    return {**optimizers, **rules, **factors, "ARSAM": arsam.ARSAM, "Epochs": Epochs}


def _call(text: str, assignment: str) -> Any:
    """``Tail(fraction=0.3)`` as partial(Tail, fraction=0.3), safely; plain text stays text."""
    try:
        node = ast.parse(text, mode="eval").body
    except _NO_LITERAL:
        return text
    return _built(node, assignment) if isinstance(node, (ast.Call, ast.Name)) else text


def _built(node: ast.expr, assignment: str) -> Any:
    if isinstance(node, ast.Name):
        return functools.partial(_names()[node.id]) if node.id in _names() else node.id
    if isinstance(node, (ast.Tuple, ast.List)):
        return tuple(_built(element, assignment) for element in node.elts)
    if not isinstance(node, ast.Call):
        return ast.literal_eval(node)
    if not isinstance(node.func, ast.Name):
        raise UserError(f"{assignment}: call a plain name, such as Tail(fraction=0.3)")
    name, arguments = node.func.id, node.args
    if name == "partial" and arguments and isinstance(arguments[0], ast.Name):
        name, arguments = arguments[0].id, arguments[1:]
    if name not in _names():
        close = difflib.get_close_matches(name, _names(), n=1)
        raise UserError(f"{assignment}: unknown name {name}" + (f"; did you mean {close[0]}?" if close else ""))
    keywords = {k.arg: _built(k.value, assignment) for k in node.keywords if k.arg is not None}
    positional = [_built(a, assignment) for a in arguments]
    function = _names()[name]
    if function is Epochs:
        return Epochs(*positional)
    known = inspect.signature(function).parameters
    for keyword in keywords:
        if keyword not in known:
            raise UserError(f"{assignment}: {name} has no argument {keyword}; it takes {', '.join(known)}")
    return functools.partial(function, *positional, **keywords)


def in_steps(value: Any, steps_per_epoch: int) -> Any:
    """Replace every `Epochs` in a partial's arguments, or in a tuple, by steps."""
    if isinstance(value, Epochs):
        return int(value) * steps_per_epoch
    if isinstance(value, tuple):
        return tuple(in_steps(v, steps_per_epoch) for v in value)
    if isinstance(value, functools.partial):
        keywords = {k: in_steps(v, steps_per_epoch) for k, v in value.keywords.items()}
        return functools.partial(value.func, *(in_steps(a, steps_per_epoch) for a in value.args), **keywords)
    return value


def describe(value: Any) -> Any:
    """A config as plain containers for run.json."""
    if isinstance(value, Epochs):
        return repr(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if dataclasses.is_dataclass(value):
        return {"type": type(value).__name__, **{f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}}
    if isinstance(value, functools.partial):
        arguments = {str(i): describe(a) for i, a in enumerate(value.args)}
        return {"call": value.func.__name__, **arguments, **{k: describe(v) for k, v in value.keywords.items()}}
    if isinstance(value, (list, tuple)):
        return [describe(v) for v in value]
    return getattr(value, "__name__", repr(value))


def data_path(root: str) -> Path:
    """The folder `root`; where ARSAM_DATA is set, it stands for a leading ``data``."""
    path = Path(root).expanduser()
    replacement = os.environ.get("ARSAM_DATA")
    if replacement and not path.is_absolute() and path.parts[:1] == ("data",):
        return Path(replacement).joinpath(*path.parts[1:])
    return path
