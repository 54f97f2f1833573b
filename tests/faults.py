"""Kill training runs without warning and fail their writes, and see that nothing is lost: python tests/faults.py [KILLS].

Every run is a fork of this process, which has imported everything, and draws no curves and asks git nothing, so that a kill
and a resume take a second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tasks import checkpoint, engine, log
from tasks.config import Config
from tasks.errors import UserError
from tests.tasks import toy

CONFIG = dataclasses.replace(toy.config, epochs=3, ema=0.9)
FILES = {"run.json", "metrics.jsonl", "last.pt", "best.pt", "result.json", "curves.png"}


def start(out: Path, before: Callable[[], None] = lambda: None, config: Config = CONFIG) -> int:
    """Fork a run, which resumes where there is something to resume; the child's process id.

    Args:
        out: the run's folder.
        before: called in the child first.
        config: of the run.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        sys.stderr = open(out.with_suffix(".err"), "a")  # noqa: SIM115
        log.draw_curves = lambda path, *_: path.write_text("no picture")
        log._commit = lambda: None
        before()
        engine.train(config, out, device=torch.device("cpu"), resume=(out / "run.json").exists(), name="toy")
        code = 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(pid: int) -> int:
    """Wait for a child; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def at_write(number: int, after: bool) -> Callable[[], None]:
    """Makes the process kill itself at its n-th rename, from 0: just before it, or just after."""

    def arm() -> None:
        rename, calls = os.replace, iter(range(10**9))

        def replace(*paths: Any) -> None:
            mine = next(calls) == number
            if mine and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*paths)
            if mine:
                os.kill(os.getpid(), signal.SIGKILL)

        os.replace = replace

    return arm


def failing(seed: int, share: float) -> Callable[[], None]:
    """Makes that share of the renames fail as on a full disk, once the run is under way."""

    def arm() -> None:
        rename, draw, calls = os.replace, random.Random(seed), iter(range(10**9))

        def replace(source: Any, target: Any) -> None:
            # run.json, metrics.jsonl and last.pt at the start, and result.json at the end, are told from the rest.
            if next(calls) >= 3 and Path(target).name != "result.json" and draw.random() < share:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            rename(source, target)

        os.replace = replace

    return arm


def no_file_above(size: int) -> Callable[[], None]:
    """Makes the system refuse longer files, in the midst of writing."""

    def arm() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return arm


def nobody_reads() -> None:
    """Makes the run print into a pipe that is closed."""
    read, write = os.pipe()
    os.close(read)
    sys.stdout = os.fdopen(write, "w")


def full_at_evaluation() -> None:
    """Makes the second evaluation find no room for what it writes."""
    evaluate, calls = engine.evaluate, iter(range(10**9))

    def fail(*arguments: Any) -> dict[str, float]:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return evaluate(*arguments)

    engine.evaluate = fail


def differences(whole: Path, other: Path) -> Iterator[str]:
    """Where a run's records and weights differ from the uninterrupted run's, times aside."""
    names = {path.name for path in other.iterdir()}
    if names != FILES:
        yield f"files {sorted(names ^ FILES)}"
        return
    for name in ("last.pt", "best.pt"):
        yield from _different(checkpoint.load(whole / name), checkpoint.load(other / name), name)
    yield from _different(log.read(whole / "metrics.jsonl"), log.read(other / "metrics.jsonl"), "metrics.jsonl")
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, other)]
    yield from _different(*results, "result.json")


def _different(a: Any, b: Any, where: str) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        for key in a:
            if "second" not in str(key) and key != "peak_memory_mb":
                yield from _different(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from _different(*pair, f"{where}[{i}]")
    elif not (torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b):
        yield where


def killed_and_resumed(
    whole: Path,
    out: Path,
    seconds: float | None,
    before: Callable[[], None] = lambda: None,
    number: int = signal.SIGKILL,
    config: Config = CONFIG,
) -> list[str]:
    """What differs after a signal, `seconds` after the start or by the child itself, and a resume to the end."""
    pid = start(out, before, config)
    if seconds is not None:
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    finish(pid)
    if (code := finish(start(out, config=config))) != 0:
        return [f"the resumed run ended with {code}: {out.with_suffix('.err').read_text()}"]
    return list(differences(whole, out))


def main(kills: int) -> int:
    """Run all; the number of runs that lost something."""
    draw, bad = random.Random(0), 0

    def judge(title: str, found: list[str]) -> bool:
        if found:
            print(f"  {title}: differs in {', '.join(found[:5])}", flush=True)
        return not found

    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        finish(start(root / "warm"))
        begin = time.monotonic()
        assert finish(start(root / "whole")) == 0
        duration = time.monotonic() - begin
        moments = [draw.random() * duration for _ in range(kills)]
        good = sum(judge(f"killed after {s:.3f} s", killed_and_resumed(root / "whole", root / f"{i}", s))
                   for i, s in enumerate(moments))  # fmt: skip
        print(f"{good} of {kills}: killed at random moments of {duration:.2f} s, resumed, bitwise the same", flush=True)
        bad += kills - good

        # run.json and metrics.jsonl and last.pt at the start, one or two checkpoints an epoch, result.json
        boundaries = [(n, after) for n in range(9) for after in (False, True)][: max(kills, 1)]
        good = sum(judge(f"killed {'after' if late else 'before'} rename {n}",
                         killed_and_resumed(root / "whole", root / f"write-{n}-{late}", None, at_write(n, late)))
                   for n, late in boundaries)  # fmt: skip
        print(f"{good} of {len(boundaries)}: killed just before or after a rename, resumed, bitwise the same", flush=True)
        bad += len(boundaries) - good

        often = dataclasses.replace(CONFIG, save_every=1e-9)
        assert finish(start(root / "often", config=often)) == 0
        trials = max(kills // 3, 1)
        for title, number, config, reference in (("hung up", signal.SIGHUP, CONFIG, "whole"), ("killed between two of many"
                                                 " checkpoints", signal.SIGKILL, often, "often")):  # fmt: skip
            good = sum(judge(f"{title} after {s:.3f} s",
                             killed_and_resumed(root / reference, root / f"{number}-{i}", s, number=number, config=config))
                       for i, s in enumerate(moments[:trials]))  # fmt: skip
            print(f"{good} of {trials}: {title} at random moments, resumed, bitwise the same", flush=True)
            bad += trials - good
        for act in (nobody_reads, full_at_evaluation):
            lost = not judge(act.__name__, killed_and_resumed(root / "whole", root / act.__name__, None, act))
            print(f"{int(not lost)} of 1: {act.__name__.replace('_', ' ')}, resumed, bitwise the same", flush=True)
            bad += lost

        good = 0
        for seed in range(trials):
            out = root / f"full-{seed}"
            code = finish(start(out, failing(seed, 0.3)))
            if code == 2:  # the last writes failed, which the run cannot go on without: room is made, and it is resumed
                code = finish(start(out))
            # A best.pt that could not be written is of an earlier epoch, which is no loss of the run.
            # A last.pt that could only be written after the last evaluation has a line more, which is none either.
            found = [f"exit code {code}"] if code else [d for d in differences(root / "whole", out) if "best" not in d]
            if found == ["last.pt.metrics"]:
                fewer, more = (checkpoint.load(folder / "last.pt")["metrics"] for folder in (root / "whole", out))
                found = list(_different(fewer, more[: len(fewer)], "last.pt.metrics"))
            good += judge(f"failing writes, seed {seed}", found)
        print(f"{good} of {trials}: 3 of 10 writes failed during the run, nothing lost", flush=True)
        bad += trials - good

        code = finish(start(root / "tiny", no_file_above(3000)))
        refused = code == 2 and "cannot be written" in (root / "tiny.err").read_text()
        print(f"{int(refused)} of 1: no room for a checkpoint, refused before training", flush=True)
        bad += not refused
    return bad


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 30) > 0)
