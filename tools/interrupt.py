"""Ctrl-C in the seconds in which torch is loaded needs no traceback; imported before torch is."""

from __future__ import annotations

import sys
from types import TracebackType


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _show
