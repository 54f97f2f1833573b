"""`name=value` overrides of a config: names with dots, values as Python literals or calls of what a config may hold."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import typeguard
from torch.optim import Optimizer

import arsam
from tasks import schedule as schedules
from tasks.errors import UserError
from tasks.schedule import Epochs

C = TypeVar("C")


def override(config: C, assignments: list[str]) -> C:
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


def read(config: Any, name: str) -> Any:
    """The present value of a name with dots.

    Raises:
        UserError: unknown name.
    """
    node = config
    for part in name.split("."):
        hints, present = settable(node)
        if part not in hints:
            raise _unknown(node, part, hints, name)
        node = present.get(part)
    return node


def _unknown(node: Any, name: str, hints: dict[str, Any], assignment: str) -> UserError:
    if not hints:
        hint = "; start from sharpness=ARSAM(rho=0.05)" if assignment.startswith("sharpness.") else ""
        return UserError(f"{assignment}: there is nothing named {name} inside {node!r}{hint}")
    close = difflib.get_close_matches(name, hints, n=1)
    known = f"did you mean {close[0]}?" if close else f"known names: {', '.join(hints)}"
    return UserError(f"{assignment}: unknown name {name}; {known}")


def _replace(node: Any, path: list[str], text: str, assignment: str) -> Any:
    """A copy of a dataclass or partial with one value, deep inside, replaced."""
    name, rest = path[0], path[1:]
    hints, present = settable(node)
    if name not in hints:
        raise _unknown(node, name, hints, assignment)
    value = _replace(present.get(name), rest, text, assignment) if rest else _value(text, hints[name], assignment)
    if isinstance(node, functools.partial):
        return functools.partial(node.func, *node.args, **{**node.keywords, name: value})
    return dataclasses.replace(node, **{name: value})


def settable(node: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Names that may be set, with their types, and the present values, of a dataclass or a callable given as partial."""
    if dataclasses.is_dataclass(node):
        hints = typing.get_type_hints(node if isinstance(node, type) else type(node))
        names = [f.name for f in dataclasses.fields(node)]
        return {n: hints[n] for n in names}, {n: getattr(node, n) for n in names if hasattr(node, n)}
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
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{assignment}: must be finite")
        if value is None and not (hint is Any or type(None) in typing.get_args(expected) or expected is type(None)):
            continue
        if isinstance(value, bool) and expected in (int, float):
            continue
        try:
            typeguard.check_type(value, expected)
        except typeguard.TypeCheckError:
            continue
        return _number(value, expected, assignment)
    name = expected.__name__ if isinstance(expected, type) else str(expected).replace("typing.", "")
    raise UserError(f"{assignment}: expected {name}, got {text}")


def _number(value: Any, expected: Any, assignment: str) -> Any:
    """A float where any number will do, since Python's whole ones have no largest and torch's do; all else as it is."""
    kinds = (expected, *typing.get_args(expected))
    if not isinstance(value, int) or isinstance(value, bool) or float not in kinds or int in kinds:
        return value
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{assignment}: must be finite") from None


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
    factors = {f.__name__: f for f in schedules.FACTORS}
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
