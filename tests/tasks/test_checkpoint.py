"""Checkpoints: damage, code inside, and writes that fail."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import checkpoint
from tasks.errors import UserError
from tests.tasks import toy


def test_damaged_checkpoints(tmp_path: Path) -> None:
    """Torn, of another kind, or of another model: one error that names the file."""
    toy.run(tmp_path, epochs=1)
    whole = (tmp_path / "last.pt").read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        (tmp_path / "torn.pt").write_bytes(content)
        with pytest.raises(UserError, match=r"torn\.pt: not a readable checkpoint"):
            checkpoint.load(tmp_path / "torn.pt")
    with pytest.raises(UserError, match=r"last\.pt: does not fit the model .*size mismatch for 0\.weight"):
        checkpoint.load_weights(toy.Toy(width=5).build(), tmp_path / "last.pt")


def test_a_checkpoint_is_written_from_where_it_lies(tmp_path: Path) -> None:
    """Kills: a copy of the weights in memory, which a large network has no room for."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not tell the peak of memory")

    def resident(field: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) // 1024

    weights = {str(i): torch.ones(1_000_000) for i in range(50)}  # 200 MB
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before = resident("VmRSS")
    checkpoint.save(tmp_path / "large.pt", weights)
    assert resident("VmHWM") - before < 60
    assert (tmp_path / "large.pt").stat().st_size > 200e6


class Bomb:
    """Runs code when unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/arsam-bomb",)


def test_a_checkpoint_runs_no_code(tmp_path: Path) -> None:
    """weights_only."""
    marker = Path("/tmp/arsam-bomb")
    marker.unlink(missing_ok=True)
    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        checkpoint.load(tmp_path / "bomb.pt")
    assert not marker.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """Kills: writing in place."""
    checkpoint.save(tmp_path / "a.pt", {"x": torch.ones(2)})
    with pytest.raises(Exception, match="pickle"):
        checkpoint.save(tmp_path / "a.pt", {"x": threading.Lock()})
    assert torch.equal(checkpoint.load(tmp_path / "a.pt")["x"], torch.ones(2))


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    """Kills: an evaluation of a network that has diverged, and its traceback."""
    model = toy.Toy().build()
    state = model.state_dict()
    state["3.bias"] = torch.full_like(state["3.bias"], float("nan"))
    checkpoint.save(tmp_path / "bad.pt", dict(state))
    with pytest.raises(UserError, match=r"bad\.pt: holds NaN or inf, first in 3\.bias"):
        checkpoint.load_weights(toy.Toy().build(), tmp_path / "bad.pt")


def test_one_file_with_two_names(tmp_path: Path) -> None:
    """Twice too, and where there are no hard links. Kills: a leftover of renaming a file to itself."""
    checkpoint.save(tmp_path / "last.pt", {"x": torch.ones(2)})
    for _ in range(2):
        checkpoint.share(tmp_path / "last.pt", tmp_path / "best.pt")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["best.pt", "last.pt"]
    checkpoint.save(tmp_path / "last.pt", {"x": torch.zeros(2)})
    assert torch.equal(checkpoint.load(tmp_path / "best.pt")["x"], torch.ones(2)), "a new last.pt is another file"
