"""What a user names to be predicted, and where the answers go."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks import inputs
from tasks.errors import UserError


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two folders with pictures of one name, a video, what is no picture, what is hidden, and a name like a pattern."""
    for name in ("a/1.jpg", "a/2.PNG", "a/deep/3.webp", "a/notes.txt", "a/.thumb.jpg", "b/1.jpg", "b/clip.MOV", "odd[1].jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["a"], ["a/1.jpg", "a/2.PNG", "a/deep/3.webp"]),
        (["b"], ["b/1.jpg", "b/clip.MOV"]),
        (["*/1.jpg"], ["a/1.jpg", "b/1.jpg"]),
        (["**/*.webp"], ["a/deep/3.webp"]),
        (["a/1.jpg", "a", "./a/1.jpg"], ["a/1.jpg", "a/2.PNG", "a/deep/3.webp"]),
        (["odd[1].jpg"], ["odd[1].jpg"]),
        (["a/notes.txt"], ["a/notes.txt"]),
        (["missing.jpg"], ["missing.jpg"]),
    ],
)
def test_expanded(words: list[str], expected: list[str], tree: Path) -> None:
    """Folders whole, patterns, files as they are, each once. Kills: upper case left out, a name that is read as a pattern."""
    assert [str(path) for path in inputs.expanded(words)] == expected


@pytest.mark.parametrize(("word", "message"), [("empty", "empty: holds no picture"), ("*.tif", "tif: matches no file")])
def test_nothing_there(word: str, message: str, tree: Path) -> None:
    """Kills: a folder without pictures that is predicted in silence."""
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        inputs.expanded([word])


def test_one_name_in_two_folders(tree: Path) -> None:
    """Stays two answers, also beside a file that has the other's new name. Kills: one answer written over the other."""
    (tree / "a/1-1.jpg").touch()
    files = [Path(name) for name in ("a/1.jpg", "b/1.jpg", "a/1-1.jpg", "a/2.PNG")]
    found = inputs.targets(files, tree / "out")
    assert len({path.name for path in found}) == 4
    assert found[3] == tree / "out/2"


def test_the_folder_of_an_input(tree: Path) -> None:
    """Is refused as that of the answers. Kills: photos that are written over."""
    with pytest.raises(UserError, match="holds what is to be predicted"):
        inputs.targets([Path("a/1.jpg"), Path("b/1.jpg")], Path("b"))


def test_videos() -> None:
    """By their names, whatever the case."""
    assert inputs.is_video(Path("x.MP4")) and not inputs.is_video(Path("x.jpg"))
