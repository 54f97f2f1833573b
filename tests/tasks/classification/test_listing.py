"""Which pictures a data set has, and of which class."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tasks import cache, folder
from tasks.classification import listing
from tasks.errors import UserError


def picture(path: Path, value: int) -> None:
    """A grey picture of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), value).save(path)


def tree(root: Path) -> None:
    """Classes with numbers in their names, a folder in a folder, one without pictures, a stranger."""
    for value, name in enumerate(("c2/a10.png", "c2/a2.png", "c10/x.png", "c10/deep/y.png", "C1/z.PNG")):
        picture(root / name, value)
    (root / "empty").mkdir()
    (root / "c2/notes.txt").write_text("no picture")


def test_class_folders(tmp_path: Path) -> None:
    """In the order of their numbers; what is empty is no class. Kills: a label that shifts by an empty folder, 10 before 2."""
    tree(tmp_path)
    found = listing.of_folder(tmp_path)
    assert found.classes == ("C1", "c2", "c10")
    assert [found.name(i) for i in range(5)] == ["C1/z.PNG", "c2/a2.png", "c2/a10.png", "c10/x.png", "c10/deep/y.png"]
    assert [found[i][1] for i in range(5)] == [0, 1, 1, 2, 2]
    assert [int(np.asarray(found[i][0])[0, 0]) for i in range(5)] == [4, 1, 0, 2, 3]
    assert found.names()[1] == str(tmp_path / "c2/a2.png")


def test_pictures_without_classes(tmp_path: Path) -> None:
    """No labels, and nothing of folders below."""
    for value in range(3):
        picture(tmp_path / f"{value}.png", value)
    (tmp_path / "folder.png").mkdir()
    found = listing.of_folder(tmp_path)
    assert found.classes is None
    assert [found[i][1] for i in range(3)] == [-1, -1, -1]
    with pytest.raises(UserError, match="no pictures in it"):
        (tmp_path / "none").mkdir()
        listing.of_folder(tmp_path / "none")


def test_links(tmp_path: Path) -> None:
    """To folders are followed, but not in a circle. Kills: pictures that are listed forty times."""
    picture(tmp_path / "all/a/x.png", 1)
    (tmp_path / "all/a/again").symlink_to("../a")
    (tmp_path / "all/b").symlink_to("a")
    found = listing.of_folder(tmp_path / "all")
    assert [found.name(i) for i in range(len(found))] == ["a/x.png", "b/x.png"]


def test_names_in_any_bytes(tmp_path: Path) -> None:
    """Kills: a listing that is kept as text."""
    name = os.fsdecode(b"\xff\n.png")
    picture(tmp_path / "a.png", 7)
    (tmp_path / "tree" / os.fsdecode(b"cl\xe9")).mkdir(parents=True)
    (tmp_path / "a.png").rename(tmp_path / "tree" / os.fsdecode(b"cl\xe9") / name)
    os.utime(tmp_path / "tree", (1, 1))
    os.utime(tmp_path / "tree" / os.fsdecode(b"cl\xe9"), (1, 1))
    folder.mark(tmp_path / "run", "train", {})
    for _ in range(2):
        with cache.beside(tmp_path / "run"):
            found = listing.of_folder(tmp_path / "tree")
        assert found.classes == (os.fsdecode(b"cl\xe9"),)
        assert int(np.asarray(found[0][0])[0, 0]) == 7


def test_tar(tmp_path: Path) -> None:
    """The same pictures, read by where they lie: nothing stays open. Kills: a place in the file that processes share."""
    tree(tmp_path / "tree")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "tree", "train")
    found = listing.of_tar(tmp_path / "a.tar")
    assert found.classes == ("C1", "c2", "c10", "deep")
    values = {found.name(i): int(np.asarray(found[i][0])[0, 0]) for i in range(5)}
    assert values == {
        "train/C1/z.PNG": 4,
        "train/c2/a2.png": 1,
        "train/c2/a10.png": 0,
        "train/c10/x.png": 2,
        "train/c10/deep/y.png": 3,
    }
    os.utime(tmp_path / "a.tar", (1, 1))
    folder.mark(tmp_path / "run", "train", {})
    for _ in range(2):
        with cache.beside(tmp_path / "run"):
            again = listing.of_tar(tmp_path / "a.tar")
        assert int(np.asarray(again[0][0])[0, 0]) == 4 and again.classes == found.classes
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "tree", "train")
    with pytest.raises(tarfile.TarError):
        listing.of_tar(tmp_path / "b.tar.gz")


def test_csv(tmp_path: Path) -> None:
    """Paths and names of classes. Kills: labels in the order of the rows."""
    tree(tmp_path / "tree")
    (tmp_path / "t.csv").write_text("label,path\npear,tree/c2/a2.png\napple,tree/c10/x.png\n")
    found = listing.of_csv(tmp_path / "t.csv")
    assert found.classes == ("apple", "pear")
    assert [found[i][1] for i in range(2)] == [1, 0]
    for text, message in (("a,b\n1,2\n", "columns path and label"), ("path,label\nx.png,\n", "line 2 lacks"), ("", "columns")):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            listing.of_csv(tmp_path / "t.csv")


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    """By its whole path."""
    picture(tmp_path / "a/b.png", 0)
    (tmp_path / "a/b.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a/b\.png: not a readable picture"):
        listing.of_folder(tmp_path)[0]
