"""A suite's records: one file of JSON lines, each a run, a run of the search, or what a suite was run with.

Fields of a line: "kind" ("suite", "tune", "run" or "ageing"), "loop" (1: made by the study's own loop of before, 2: by
`tasks.engine`), and for runs "row", "seed", "settings", the metric, "training_loss", "steps", "ascents", "passes_per_step" and
"cpu_seconds". A line is appended when its run is done, so that a study goes on where it stopped.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tasks import distributed
from tasks.errors import UserError

FOLDER = Path(__file__).parents[1] / "records"
LOOP = 2

Line = dict[str, Any]
Runs = dict[str, dict[int, Line]]  # row -> seed -> the run's line


def read(path: Path) -> list[Line]:
    """The lines of a file; a last one that was cut off is left out, and no file has none.

    Raises:
        UserError: not a file of records.
    """
    whole = path.read_bytes() if path.exists() else b""
    try:
        lines = [json.loads(line) for line in whole[: whole.rfind(b"\n") + 1].splitlines()]
        if all({"kind", "loop"} <= line.keys() for line in lines):
            return lines
    except (ValueError, AttributeError, RecursionError):
        pass
    raise UserError(f"{path}: not the records of a study; name another --out")


def of(lines: list[Line], kind: str, loop: int) -> list[Line]:
    """The lines of a kind that a loop made."""
    return [line for line in lines if line["kind"] == kind and line["loop"] == loop]


def loops(lines: list[Line]) -> list[int]:
    """The loops that have runs, the newest first."""
    return sorted({line["loop"] for line in lines if line["kind"] == "run"}, reverse=True)


def loop(lines: list[Line], rows: Collection[str]) -> int:
    """The loop whose runs count: the newest that has each of these rows that an older one has.

    So a study that is under way does not take the place of a finished one.
    """
    for newest in loops(lines):
        older = {line["row"] for line in lines if line["kind"] == "run" and line["loop"] < newest}
        if older & set(rows) <= runs(lines, newest).keys():
            return newest
    return LOOP


def runs(lines: list[Line], loop: int) -> Runs:
    """The runs on the test images that a loop made."""
    by_row: Runs = {}
    for line in of(lines, "run", loop):
        by_row.setdefault(line["row"], {})[line["seed"]] = line
    return by_row


class Book:
    """The file of a suite, open for a study that appends to it.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines = read(path)

    def write(self, line: Line) -> Line:
        """Append a line; where several processes train together, the first one does."""
        if distributed.rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
        self.lines.append(line)
        return line

    def find(self, kind: str, **fields: Any) -> Line | None:
        """The line of this loop with these fields, if there is one."""
        found = (line for line in of(self.lines, kind, LOOP) if all(line.get(k) == v for k, v in fields.items()))
        return next(found, None)


@contextmanager
def held(path: Path) -> Iterator[Book]:
    """Keep a suite's file from other studies while one writes to it; a line that was cut off is removed.

    Raises:
        UserError: another process has it.
    """
    if distributed.rank():
        yield Book(path)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{path}: in use by another process; wait for it to end, or name another --out") from None
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        yield Book(path)
