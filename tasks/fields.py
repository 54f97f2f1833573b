"""What may be set in a config: names, types, values and meanings, as --help shows them."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator
from typing import Any

from tasks.config import Config
from tasks.override import settable
from tasks.schedule import Epochs


def explain(config: Config | type[Config]) -> Iterator[str]:
    """The lines that list every field: its name with dots, its type, its value and what its docstring says of it.

    Args:
        config: the fields of its task, optimizer and rules too, with its values; of the class: its own, with defaults.
    """
    yield from _explain(config, "")


def _explain(node: Any, prefix: str) -> Iterator[str]:
    hints, present = settable(node)
    meanings = _meanings(node.func if isinstance(node, functools.partial) else node if inspect.isclass(node) else type(node))
    for name, hint in hints.items():
        value = present.get(name)
        inner = dataclasses.is_dataclass(value) or isinstance(value, functools.partial)
        shown = "" if name not in present else f" = {_show(value)}"
        yield f"{prefix}{name}: {_type(hint)}{shown}"
        if meanings.get(name):
            yield from textwrap.wrap(meanings[name], 112, initial_indent="    ", subsequent_indent="    ")
        if inner and not isinstance(value, type) and not isinstance(value, Config):
            yield from _explain(value, f"{prefix}{name}.")


def _meanings(owner: Any) -> dict[str, str]:
    """The Args of a Google docstring, of the class and of those that it derives from."""
    found: dict[str, str] = {}
    for source in reversed(getattr(owner, "__mro__", (owner,))):
        text = inspect.getdoc(source) or ""
        arguments = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", text, re.MULTILINE)
        if arguments and source is not object:
            for item in re.finditer(r"^ {4}(\w+): (.*(?:\n {8,}.*)*)", arguments[1], re.MULTILINE):
                found[item[1]] = " ".join(item[2].split())
    return found


def _type(hint: Any) -> str:
    text = hint.__name__ if inspect.isclass(hint) and not hasattr(hint, "__args__") else str(hint)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)


def _show(value: Any) -> str:
    if isinstance(value, functools.partial):
        return f"{value.func.__name__}(...)"
    if isinstance(value, (str, int, float, tuple, list, dict, Epochs)) or value is None:
        return repr(value)
    return getattr(value, "__name__", type(value).__name__)
