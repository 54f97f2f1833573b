"""What the tools share: the repository on the import path, arguments in any order, the folder, streams and exit codes."""

from __future__ import annotations

import argparse
import ast
import contextlib
import errno
import os
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import interrupt  # noqa: F401
import torch

import arsam
from tasks import config as configs
from tasks import distributed, fields, folder, signals
from tasks.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")
VERSION = f"arsam {arsam.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}"
_AGAIN = ("eval", "export", "predict")  # what these tools wrote before, they may write again
_REPORT = (
    "this is a fault of arsam's own: please report it to the project, where you have it from, with the command and the lines"
    " above"
)


class Parser(argparse.ArgumentParser):
    """argparse's, whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        """One line, as of every other mistake."""
        raise UserError(f"{message}; see {self.prog} --help")


class _Help(argparse.Action):
    """--help: the arguments, and the fields of the config that is named, or of any."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        parser.print_help()
        named = [word for word in sys.argv[1:] if word.endswith(".py") and Path(word).is_file()]
        config = configs.load(named[0], sample="--sample" in sys.argv) if named else configs.Config
        print(f"\nfields of {named[0] if named else 'a config (name one to see those of its task)'}, as name=value:")
        print("\n".join(f"  {line}" for line in fields.explain(config)))
        sys.exit(0)


class _List(argparse.Action):
    """--list: the configs, each with the first line of its docstring."""

    def __call__(self, *_: Any) -> None:
        for path in sorted((ROOT / "configs").rglob("[!_]*.py")):
            first = (ast.get_docstring(ast.parse(path.read_text())) or "").partition("\n")[0]
            print(f"{os.path.relpath(path)}\n    {first}")
        sys.exit(0)


def parser(description: str, *, inputs: str = "") -> argparse.ArgumentParser:
    """A parser with the arguments that every tool on configs has, and those that it is given besides."""
    parser = Parser(description=description, add_help=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = "a config file, and overrides of its fields" + (f"; {inputs}" if inputs else "")
    parser.add_argument("words", nargs="*", metavar="CONFIG | name=value" + (" | INPUT" if inputs else ""), help=words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where to compute: cpu, cuda, cuda:1, ...; default: %(default)s")
    parser.add_argument("--overwrite", action="store_true", help="write into --out whatever it holds")
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="this, and the fields that the config has")
    parser.add_argument("--list", action=_List, nargs=0, help="the configs that there are")
    parser.add_argument("--version", action="version", version=VERSION)
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


def path(text: str) -> Path:
    """The path that an argument names.

    Raises:
        ArgumentTypeError: the text is empty, or a user's home that there is not.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("a path is needed, got an empty text")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def inputs(path: str, config: configs.Config, *others: Path | None) -> list[Path]:
    """The files and folders that a tool reads: the config's file, what the config names, and others.

    Args:
        path: of the config.
        config: whose texts may be paths, deep inside too.
        others: None: not given.
    """
    names = _texts(configs.describe(config))
    return [Path(path), *(other for other in others if other is not None), *map(configs.data_path, names)]


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from (value,) if value.strip() else ()
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def run_folder(
    path: str,
    sample: bool,
    out: Path | None,
    *,
    resume: bool,
    holds: str = "run.json",
    overwrite: bool = False,
    inputs: Iterable[Path] = (),
) -> Path:
    """The folder that was asked for, or runs/NAME, runs/NAME-2, ...: the first free one, or the last one to resume.

    Args:
        path: of the config, which gives the name.
        sample: is it the config's sample?
        out: asked for.
        resume: a run that is there goes on.
        holds: the file by which a run of this tool is known.
        overwrite: whatever the folder holds.
        inputs: files and folders that are read.

    Raises:
        UserError: taken, not the tool's own, or nothing to resume.
    """
    return distributed.first(_run_folder(path, sample, out, resume, holds, overwrite, inputs))


def _run_folder(
    path: str, sample: bool, out: Path | None, resume: bool, holds: str, overwrite: bool, inputs: Iterable[Path]
) -> Path:
    tool = Path(sys.argv[0]).stem
    if out is not None:
        if (out / holds).exists() and not (resume or overwrite or (tool in _AGAIN and folder.owner(out) == tool)):
            ways = ("--resume, " if tool not in _AGAIN else "") + "or --overwrite"
            raise UserError(f"{out}: already holds a run; name another --out, {ways}")
        if not resume:
            folder.check(out, tool, overwrite=overwrite, inputs=inputs)
        elif folder.owner(out) not in (None, tool):
            folder.check(out, tool)
        return out
    name = Path(path).stem + ("-sample" if sample else "")
    folders = [Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000)]
    taken = [folder for folder in folders if (folder / holds).exists()]
    if resume and not taken:
        raise UserError(f"{folders[0]}: holds no run to resume; name its folder with --out")
    return taken[-1] if resume else next(folder for folder in folders if not os.path.lexists(folder))


def going_on(out: Path) -> str:
    """The command line that goes on with the run of this one."""
    if distributed.world() > 1:
        return f"start it as before, with --resume --out {shlex.quote(str(out))}"
    left_out = {"--resume", "--overwrite"}
    command = [word for word in sys.orig_argv if word not in left_out]
    named = any(word == "--out" or word.startswith("--out=") for word in command)
    return shlex.join([*command, *([] if named else ["--out", str(out)]), "--resume"])


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


class _Lasting:
    """A stream whose reader may go away: what cannot be written is dropped."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.error: OSError | ValueError | None = None

    def write(self, text: str) -> int:
        """Write, or drop."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        with self._dropping():
            self._stream.flush()

    @contextlib.contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            first, self.error = self.error is None, error
            with contextlib.suppress(OSError, ValueError):  # what is still in the buffer goes nowhere, at the exit too
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            if first and sys.stderr is not self and isinstance(error, OSError):
                print(f"warning: the output cannot be written ({error}); it is dropped", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _lasting_streams() -> Iterator[None]:
    """Streams that may be closed, go away, or not know a letter."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed stream's number must not be a checkpoint's
            pass
        os.close(descriptor)
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Lasting(stream))
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def run(main: Callable[[], None]) -> None:
    """Call a tool's main, and exit with its code.

    0 done, 1 a fault of ours, 2 the user's mistake (one line), 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
    """
    with _lasting_streams():
        code = _code(main)
        stdout: Any = sys.stdout
        stdout.flush()
        if code == 0 and stdout.error is not None and not isinstance(stdout.error, BrokenPipeError):
            code = 2  # what was asked for has not arrived
    if code:
        sys.exit(code)


def _code(main: Callable[[], None]) -> int:
    try:
        with signals.ending():
            distributed.start()
            main()
            distributed.stop()
    except UserError as error:
        # From a loader process the message comes wrapped in that process's traceback.
        message = str(error).rsplit("UserError: ", 1)[-1].strip()
        print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        return 128 + getattr(stop, "number", int(signal.SIGINT))
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # a file or a folder that the system keeps from us
            name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else error.filename
            print(f"error: {name}: {error.strerror}", file=sys.stderr)
            return 2
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            print(f"error: {error.strerror}; make room, or name another --out", file=sys.stderr)
            return 2
        if isinstance(error, RuntimeError) and "DataLoader worker" in str(error):  # torch tells of it wherever we are
            print(
                "error: num_workers: a loader process was killed; fewer workers or a smaller batch_size will do",
                file=sys.stderr,
            )
            return 2
        if _out_of_memory(error):
            first = " ".join(str(error).split())[:200]
            print(f"error: out of memory; lower batch_size, or raise accumulate ({first})", file=sys.stderr)
            return 2
        traceback.print_exc()
        print(_REPORT, file=sys.stderr)
        return 1
    return 0


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)
