"""The line that a terminal shows while a run trains: it fits the width, and what matters least goes first where it does not."""

from __future__ import annotations

import shutil
import sys
from typing import Any

from tqdm import tqdm

_CELLS = 2  # of the bar itself, at least


class Bar:
    """A bar over the steps of a run.

    Args:
        total: steps.
        initial: steps that are done.
        shown: False shows nothing: there is no terminal, or another process has it.
    """

    def __init__(self, total: int, initial: int, shown: bool) -> None:
        shown = shown and sys.stdout.isatty()
        self._bar = tqdm(total=total, initial=initial, disable=not shown, dynamic_ncols=True)

    def advance(self, step: int) -> bool:
        """Go to a step; is it time to say how things are?"""
        if self._bar.disable:
            return False
        return bool(self._bar.update(step - self._bar.n)) if step >= self._bar.n else self._return_to(step)

    def _return_to(self, step: int) -> bool:
        self._bar.n = self._bar.last_print_n = step
        return True

    def show(self, left: str, parts: list[tuple[str, str]]) -> None:
        """Say how things are.

        Args:
            left: of the bar.
            parts: right of it, each long and short; where even the short ones are too wide, the last of them go.
        """
        known = self._bar.format_dict
        rate = known["rate"] or (known["n"] - known["initial"]) / max(known["elapsed"], 1e-9)
        time = tqdm.format_interval((known["total"] - known["n"]) / rate) if rate else "?"
        head = f"{left} {100 * known['n'] / known['total']:.0f}%"
        width = shutil.get_terminal_size().columns - len(head) - len("|| ") - _CELLS
        self._bar.bar_format = f"{head}|{{bar}}| {fit(parts, time, width)}"
        self._bar.refresh()

    def write(self, text: str, error: bool = False) -> None:
        """A line above the bar, on stdout or stderr."""
        stream = sys.stderr if error else sys.stdout
        if self._bar.disable:
            print(text, file=stream, flush=True)
        else:
            self._bar.write(text, file=stream)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()


def fit(parts: list[tuple[str, str]], time: str, width: int) -> str:
    """What fits of the parts, and the time that is left."""
    for number in range(len(parts), 0, -1):
        for form, gap, last in ((0, ", ", f"{time} left"), (1, " ", time)):
            text = gap.join([*(part[form] for part in parts[:number]), last])
            if len(text) <= width:
                return text
    return time
