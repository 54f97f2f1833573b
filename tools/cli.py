"""What the tools share: the repository on the import path, arguments in any order, and exit codes."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tasks import config as configs
from tasks import distributed
from tasks.errors import UserError

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as of every other mistake."""
        raise UserError(f"{message}; see {self.prog} --help")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every tool on configs has."""
    parser = _Parser(description=description)
    parser.add_argument("words", nargs="*", metavar="CONFIG | name=value", help="a config file, and overrides of its fields")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser


def words(arguments: argparse.Namespace) -> list[str]:
    """Config and overrides, --seed among them."""
    return arguments.words + ([f"seed={arguments.seed}"] if arguments.seed is not None else [])


def paths(words: list[str]) -> list[str]:
    """The words that are no overrides."""
    return [word for word in words if not _OVERRIDE.match(word)]


def load_config(words: list[str], *, sample: bool = False) -> tuple[str, configs.Config]:
    """The config file named among the words, and its config with the overrides among the words."""
    named = paths(words)
    if len(named) != 1:
        raise UserError(f"expected one config file, such as configs/pose/hrnet_small_arsam.py, got {named or 'none'}")
    config = configs.load(named[0], sample=sample)
    return named[0], configs.override(config, [word for word in words if _OVERRIDE.match(word)])


def run_folder(path: str, sample: bool, out: Path | None, *, resume: bool, holds: str = "run.json") -> Path:
    """The folder that was asked for, or runs/NAME, runs/NAME-2, ...: the first free one, or the last one to resume.

    Args:
        path: of the config, which gives the name.
        sample: is it the config's sample?
        out: asked for.
        resume: a run that is there goes on.
        holds: the file by which a folder is known to be taken.

    Raises:
        UserError: taken, or nothing to resume.
    """
    return distributed.first(_run_folder(path, sample, out, resume, holds))


def _run_folder(path: str, sample: bool, out: Path | None, resume: bool, holds: str) -> Path:
    if out is not None:
        if (out / holds).exists() and not resume:
            raise UserError(
                f"{out}: already holds a run; name another --out" + (", or --resume" if holds == "run.json" else "")
            )
        return out
    name = Path(path).stem + ("-sample" if sample else "")
    folders = [Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000)]
    taken = [folder for folder in folders if (folder / holds).exists()]
    if resume and not taken:
        raise UserError(f"{folders[0]}: holds no run to resume; name its folder with --out")
    return taken[-1] if resume else next(folder for folder in folders if not folder.exists())


def device(name: str) -> torch.device:
    """The device of this name, if it is here; "cuda" is the process' own under torchrun."""
    try:
        device = torch.device(f"cuda:{distributed.local_rank()}" if name == "cuda" and distributed.world() > 1 else name)
        torch.zeros(1, device=device).item()  # "meta" has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def print_table(metrics: dict[str, float]) -> None:
    """Metrics in one table of two lines."""
    print("  ".join(f"{name:>6}" for name in metrics))
    print("  ".join(f"{value:6.3f}" for value in metrics.values()))


def run(main: Callable[[], None]) -> None:
    """Call a tool's main: exit with 2 and one line on the user's mistakes, with 130 on an interrupt."""
    try:
        distributed.start()
        main()
        distributed.stop()
    except UserError as error:
        # From a loader process the message comes wrapped in that process's traceback.
        message = str(error).rsplit("UserError: ", 1)[-1].strip()
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
