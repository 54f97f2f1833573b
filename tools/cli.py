"""What the tools share: the repository on the import path, arguments in any order, and exit codes."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tasks import config as configs
from tasks.base import UserError

_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the arguments that every tool on configs has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("words", nargs="*", metavar="CONFIG | name=value", help="a config file, and overrides of its fields")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    return parser


def load_config(words: list[str], *, sample: bool = False) -> tuple[str, configs.Config]:
    """The config file named among the words, and its config with the overrides among the words."""
    paths = [word for word in words if not _OVERRIDE.match(word)]
    if len(paths) != 1:
        raise UserError(f"expected one config file, such as configs/pose/hrnet_small_arsam.py, got {paths or 'none'}")
    config = configs.load(paths[0], sample=sample)
    return paths[0], configs.override(config, [word for word in words if _OVERRIDE.match(word)])


def device(name: str) -> torch.device:
    """The device of this name, if it is here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
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
        main()
    except UserError as error:
        # From a loader process the message comes wrapped in that process's traceback.
        print(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
