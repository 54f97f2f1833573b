"""What the tools share: help, lists, streams that go away, and whose fault an error is."""

from __future__ import annotations

import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from tasks import folder, override
from tests.tasks import toy
from tests.tools.test_commands import ROOT, SMALL, inside

TOY = str(ROOT / "tests/tasks/toy.py")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module that the tools import."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import cli

    return cli


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--version"], ["arsam ", "torch ", "Python "]),
        (["--list"], ["hrnet_small_arsam.py", "resnet18_w4a4_arsam.py", "    "]),
        (["--help"], ["--overwrite", "epochs: int = 1", "save_every: float = 15.0", "passes over the training split"]),
        (["--help", SMALL], ["task.codec.sigma: float", "sharpness.rho", "optimizer.lr", "of the Gaussian in heatmap cells"]),
    ],
)
def test_what_there_is_to_know(
    arguments: list[str], words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: a --help that does not know the config's fields, a --version that needs a config."""
    assert inside("train", *arguments, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    shown = capsys.readouterr().out
    for word in words:
        assert word in shown


class Closed(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_a_stream_that_goes_away_costs_nothing(cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Kills: a run that ends with a traceback because nobody reads what it prints."""
    monkeypatch.setattr(sys, "stdout", Closed())
    done = []
    cli.run(lambda: [print("a line", flush=True), done.append(1), print("another")])
    assert done == [1]
    assert capsys.readouterr().err.count("the output cannot be written") == 1


def test_a_full_disk_under_stdout_is_no_success(cli: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Kills: exit code 0 for figures that arrived nowhere."""
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        with pytest.raises(SystemExit) as stop:
            cli.run(lambda: print("figures"))
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (PermissionError(13, "Permission denied", "data/secret"), 2, "error: data/secret: Permission denied"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device; make room"),
        (MemoryError(), 2, "error: out of memory; lower batch_size"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 2, "error: num_workers: a loader process"),
        (KeyError("ours"), 1, "this is a fault of arsam's own: please report it"),
    ],
)
def test_whose_fault_it_is(error: Exception, code: int, words: str, cli: Any, capsys: Any) -> None:
    """A traceback for ours alone. Kills: one for the user's, or none for ours."""

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    shown = capsys.readouterr().err
    assert stop.value.code == code
    assert words in shown
    assert ("Traceback" in shown) == (code == 1)


def test_the_command_that_goes_on(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quoted, with the folder, and not overwriting. Kills: a command that starts anew, or another folder's."""
    monkeypatch.setattr(sys, "orig_argv", ["python", "-u", "tools/train.py", "my config.py", "--overwrite", "seed=3"])
    command = shlex.split(cli.going_on(Path("runs/my run")))
    assert command == ["python", "-u", "tools/train.py", "my config.py", "seed=3", "--out", "runs/my run", "--resume"]
    monkeypatch.setattr(sys, "orig_argv", ["python", "tools/train.py", "c.py", "--out=r", "--resume"])
    assert shlex.split(cli.going_on(Path("r"))) == ["python", "tools/train.py", "c.py", "--out=r", "--resume"]


def test_overwrite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A user's folder is refused, untouched. Kills: every *.tmp deleted, files that are overwritten without a word."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("best.pt", "notes.tmp", "result.json"):
        (mine / name).write_text("mine")
    assert inside("train", TOY, "--sample", "--out", "mine", cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "holds files that tools/train.py did not write (best.pt, notes.tmp, result.json)" in capsys.readouterr().err
    assert {path.read_text() for path in mine.iterdir()} == {"mine"}
    assert inside("train", TOY, "--sample", "--out", "mine", "--overwrite", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert (mine / "notes.tmp").read_text() == "mine"
    assert json.loads((mine / "result.json").read_text())["steps"] == 10
    assert folder.owner(mine) == "train"
    assert inside("train", TOY, "--out", "", cwd=tmp_path, monkeypatch=monkeypatch) == 2


def test_numbers_are_finite() -> None:
    """Kills: 1e400, which Python reads as inf, in a config."""
    with pytest.raises(override.UserError, match=r"optimizer\.lr=1e400: must be finite"):
        override.override(toy.config, ["optimizer.lr=1e400"])
    with pytest.raises(override.UserError, match="must be finite"):
        override.override(toy.config, ["optimizer.eps=1" + 400 * "0"])
    whole = override.override(toy.config, ["optimizer.eps=100000000000000000000", "epochs=3", "ema=None"])
    assert isinstance(override.read(whole, "optimizer.eps"), float), "torch has no room for it"
    assert isinstance(whole.epochs, int)


def test_benchmarks_write_over_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is measured. Kills: a table written over a user's file, records among a user's files."""
    from benchmarks.compare import study

    def ran(*_: Any) -> None:
        raise study.UserError("the study ran")

    monkeypatch.setattr(study, "compare", ran)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/quick.jsonl").write_text("mine")
    for arguments, words in (
        (["overhead", "--out", "notes/quick.jsonl"], "quick.jsonl: is there already; name another --out, or --overwrite"),
        (["overhead", "--out", "notes"], "notes: cannot be written (it is no file)"),
        (["quant", "--out", "/dev/stdout"], "/dev/stdout: cannot be written"),
        (["overhead", "--out", ""], "a path is needed, got an empty text"),
        (["loop", "--rounds", "0"], "--rounds must be >= 1, got 0"),
        (["compare", "quick", "--out", "notes"], "notes: holds files that tools/bench.py did not write (quick.jsonl)"),
        (["compare", "quick", "--out", "new", "--only", "nobody"], "nobody: no row of the suite quick"),
        (["compare", "quick", "--out", "new"], "the study ran"),
        (["compare", "quick", "--out", "new"], "the study ran"),
        (["compare"], "the following arguments are required: SUITE; see bench.py compare --help"),
    ):
        assert inside("bench", *arguments, cwd=tmp_path, monkeypatch=monkeypatch) == 2, arguments
        shown = capsys.readouterr().err
        assert words in shown and shown.count("\n") == 1, shown
    assert (tmp_path / "notes/quick.jsonl").read_text() == "mine"
    assert folder.owner(tmp_path / "new") == "bench" and not (tmp_path / "notes/run.json").exists()


def test_a_tuning_looks_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: a bad value found after hours of good ones, a folder of others taken."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/tune.json").write_text("mine")
    some = ["--name", "optimizer.lr", "--held-out", "0", "--values", "0.1"]
    for arguments, words in (
        ([*some, "--out", "mine"], "mine: holds files that tools/tune.py did not write (tune.json)"),
        ([*some, "--out", str(tmp_path.parent), "--overwrite"], "an output is never an input"),
        ([*some, "banana", "--out", "new"], "optimizer.lr=banana"),
        (["--name", "optimizer.lrr", "--held-out", "0", "--out", "new"], "did you mean lr?"),
    ):
        (tmp_path / "toy.py").write_text(Path(TOY).read_text())
        assert inside("tune", "toy.py", *arguments, cwd=tmp_path, monkeypatch=monkeypatch) == 2, arguments
        assert words in capsys.readouterr().err
    behind = ["--name", "optimizer.lr", "--held-out", "0", "--out", "new", "--values", "0.1", "pear", "toy.py", "epochs=1"]
    assert inside("tune", *behind, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "optimizer.lr=pear" in capsys.readouterr().err, "in any order"
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "mine/tune.json").read_text() == "mine"


def test_what_is_read_is_never_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --overwrite, whatever the tool. Kills: a checkpoint, a config or data in the folder that is asked for."""
    (tmp_path / "toy.py").write_text(Path(TOY).read_text())
    (tmp_path / "best.pt").write_bytes(b"weights")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/link.pt").hardlink_to(tmp_path / "best.pt")
    given = ["--checkpoint", "best.pt", "--overwrite"]
    quant = str(ROOT / "configs/quant/resnet18_w4a4_arsam.py")
    for tool, arguments in (
        ("train", ["toy.py", "--out", ".", "--overwrite"]),
        ("eval", ["toy.py", *given, "--out", "."]),
        ("eval", [TOY, *given, "--out", "deep"]),
        ("quantize", [quant, "--sample", *given, "--out", "."]),
        ("quantize", [quant, "--sample", "task.teacher=best.pt", "--overwrite", "--out", "deep"]),
    ):
        assert inside(tool, *arguments, cwd=tmp_path, monkeypatch=monkeypatch) == 2, (tool, arguments)
        assert "an output is never an input" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "deep", "toy.py"]
