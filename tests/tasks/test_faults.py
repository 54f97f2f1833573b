"""Kills, full disks, damaged files and two runs in one folder: nothing is lost, and what went wrong is said."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import checkpoint, engine, folder, log
from tasks.errors import UserError
from tests import faults

CPU = torch.device("cpu")


def run(out: Path, *, resume: bool = False) -> dict[str, Any]:
    return engine.train(faults.CONFIG, out, device=CPU, resume=resume, name="toy")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run(out)
    return out


@pytest.mark.parametrize(("write", "after"), [(2, False), (4, True), (5, False)])
def test_killed_and_resumed(whole: Path, tmp_path: Path, write: int, after: bool) -> None:
    """Before the first checkpoint, after best.pt, before a last.pt. Kills: metrics.jsonl with a line twice or not at all."""
    assert faults.killed_and_resumed(whole, tmp_path / "run", None, faults.at_write(write, after)) == []


def test_writes_that_fail_cost_nothing(whole: Path, tmp_path: Path) -> None:
    """Kills: a run that ends at the first full disk, a dropped line, a silent failure, leftovers."""
    assert faults.finish(faults.start(tmp_path / "run", faults.failing(seed=1, share=0.4))) == 0
    assert [d for d in faults.differences(whole, tmp_path / "run") if "best" not in d] == []
    assert not list((tmp_path / "run").glob(".*")), "nothing half-written is left"
    assert "not written (No space left on device); the run goes on" in (tmp_path / "run.err").read_text()


def test_no_room_is_said_before_training(tmp_path: Path) -> None:
    """The system's own refusal, which torch's writer turns into an error of its own. Kills: a run without checkpoints."""
    assert faults.finish(faults.start(tmp_path / "run", faults.no_file_above(3000))) == 2
    assert "last.pt: cannot be written (File too large); make room" in (tmp_path / "run.err").read_text()
    assert not list((tmp_path / "run").glob(".*"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file: cannot be written"):
        run(tmp_path / "file")


def test_a_last_write_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: exit code 0 for a run whose weights are lost."""
    save = checkpoint.save

    def fail(path: Path, state: dict[str, Any], previous: Path | None = None) -> None:
        if state["progress"]["step"] > 10:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, state, previous)

    monkeypatch.setattr(checkpoint, "save", fail)
    with pytest.raises(UserError, match=r"last\.pt: cannot be written \(No space left on device\)"):
        run(tmp_path / "run")
    assert checkpoint.load(tmp_path / "run/last.pt")["progress"]["step"] == 10
    assert not (tmp_path / "run/result.json").exists()


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty", "gone"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    whole: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """One flipped bit is damage too, which torch.load does not see. Kills: a run that goes on from wrong weights."""
    out = tmp_path / "run"
    faults.finish(faults.start(out, faults.at_write(7, after=True)))
    assert {"last.pt", "previous.pt"} <= {path.name for path in out.iterdir()}
    content = bytearray((out / "last.pt").read_bytes())
    place = content.index(bytes(checkpoint.load(out / "last.pt")["model"]["0.weight"].numpy().tobytes())) + 5
    content[place] ^= 1
    changed = {"torn": content[: len(content) // 2], "flipped": content, "empty": b"", "gone": None}[damage]
    (out / "last.pt").unlink() if changed is None else (out / "last.pt").write_bytes(changed)
    capsys.readouterr()
    run(out, resume=True)
    error = capsys.readouterr().err
    assert "last.pt: " in error and "going on from the one before it, previous.pt" in error
    assert list(faults.differences(whole, out)) == []


def test_both_damaged(whole: Path, tmp_path: Path) -> None:
    """An error, and neither file is touched."""
    shutil.copytree(whole, tmp_path / "run")
    for name in ("last.pt", "previous.pt"):
        (tmp_path / "run" / name).write_text(name)
    with pytest.raises(UserError, match=r"previous\.pt: not a readable checkpoint"):
        run(tmp_path / "run", resume=True)
    assert [(tmp_path / "run" / name).read_text() for name in ("last.pt", "previous.pt")] == ["last.pt", "previous.pt"]


def test_a_torn_last_line(tmp_path: Path) -> None:
    """Is left out; a broken one before it is an error that names it."""
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"epoch": 1}\n{"epoch": 2, "lo\xff')
    assert log.read(file) == [{"epoch": 1}]
    file.write_bytes(b'{"epo\n{"epoch": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is not JSON"):
        log.read(file)


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    """And free again once its process is killed, even while a process that it forked lives on. Kills: a lock inherited."""
    out = tmp_path / "run"
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with folder.held(out):
            if child := os.fork():
                os.write(write, str(child).encode())
            signal.pause()
    child = int(os.read(read, 20))
    with pytest.raises(UserError, match=r"run: in use by another process; wait for it to end, or name another --out"):
        run(out)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    try:
        with folder.held(out):
            assert list(out.iterdir()) == []
    finally:
        os.kill(child, signal.SIGKILL)
