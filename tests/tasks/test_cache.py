"""What is looked up once and kept in the run's folder."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tasks import cache, engine, folder
from tasks.cache import Arrays
from tests.tasks.toy import CPU, Points, Toy, config


class Source:
    """A folder that is looked up, and how often that was done."""

    def __init__(self, root: Path) -> None:
        self.root, self.times, self.changed = root, 0, 1_000_000_000
        (root / "a").mkdir(parents=True)
        self.settle()

    def settle(self) -> None:
        """As if it had last been changed long ago, though later than the last time."""
        self.changed += 1
        for path in (self.root / "a", self.root):
            os.utime(path, (self.changed, self.changed))

    def make(self) -> tuple[Arrays, list[Path]]:
        self.times += 1
        return {"names": np.array(sorted(os.listdir(self.root / "a")))}, [self.root, self.root / "a"]

    def look(self, out: Path | None) -> list[str]:
        with cache.beside(out):
            return cache.arrays(self.root, self.make)["names"].tolist()


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "data")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder.mark(tmp_path / "run", "train", {})
    return tmp_path / "run"


def test_a_change_is_noticed(source: Source, out: Path) -> None:
    """Without looking into the folders. Kills: a listing of yesterday, one that is made anew each time."""
    assert source.look(out) == source.look(out) == []
    assert source.times == 1
    (source.root / "a/x").touch()
    assert source.look(out) == ["x"]
    source.settle()
    assert source.look(out) == source.look(out) == ["x"]
    assert source.times == 3
    (source.root / "a").rename(source.root / "b")
    (source.root / "b").rename(source.root / "a")
    assert source.look(out) == ["x"] and source.times == 4
    (source.root / "a/x").unlink()
    (source.root / "a").rmdir()
    with pytest.raises(FileNotFoundError):
        source.look(out)


def test_what_has_just_changed_may_change_again(source: Source, out: Path) -> None:
    """Kills: trust in a time stamp that is as coarse as the disk's clock."""
    (source.root / "a/x").touch()
    source.look(out)
    assert not list(out.glob("*.npz"))


def test_where_it_lies(source: Source, out: Path, tmp_path: Path) -> None:
    """In the outermost run's own folder alone. Kills: files beside the data, in a stranger's folder, one per inner run."""
    source.look(None)
    source.look(tmp_path / "strange")
    assert not (tmp_path / "strange").exists()
    with cache.beside(out), cache.beside(tmp_path / "inner"):
        cache.arrays(source.root, source.make)
    assert [path.suffix for path in out.iterdir() if path.name != folder.MARKER] == [".npz"]
    assert not (tmp_path / "inner").exists()
    assert sorted(os.listdir(source.root)) == ["a"]
    other = Source(tmp_path / "deep/data")
    assert other.look(out) == [] and other.times == 1  # of the same name


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04]q\x00.", None])
def test_a_damaged_file_is_no_listing(source: Source, out: Path, content: bytes | None) -> None:
    """Kills: a traceback, or a pickle that is run."""
    source.look(out)
    (path,) = out.glob("*.npz")
    path.write_bytes(path.read_bytes()[:-30] if content is None else content)
    assert source.look(out) == [] and source.times == 2


@dataclass(frozen=True)
class Listed(Toy):
    """The toy, with a listing."""

    source: Any = None

    def dataset(self, split: str) -> Points:
        cache.arrays(self.source.root, self.source.make)
        return super().dataset(split)


def test_a_run_that_goes_on_looks_nothing_up(source: Source, tmp_path: Path) -> None:
    """The listing is made before there is a folder. Kills: one that is never written, or not read by --resume."""
    run = replace(config, task=Listed(source=source), epochs=1)
    engine.train(run, tmp_path / "run", device=CPU)
    before = source.times
    assert len(list((tmp_path / "run").glob("listing-data-*.npz"))) == 1
    engine.train(run, tmp_path / "run", device=CPU, resume=True)
    assert source.times == before
