"""Whose a folder is: nothing that a tool did not write is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from tasks import folder
from tasks.errors import UserError


def test_new_empty_and_own_folders_will_do(tmp_path: Path) -> None:
    """Kills: a refusal of what is the tool's own."""
    folder.check(tmp_path / "new" / "deep", "train")
    folder.check(tmp_path, "train")
    folder.mark(tmp_path / "own", "train", {"config": {}})
    (tmp_path / "own/best.pt").write_text("")
    folder.check(tmp_path / "own", "train")
    (tmp_path / "link").symlink_to(tmp_path / "own")
    folder.check(tmp_path / "link", "train")


def test_other_folders_are_refused_by_name(tmp_path: Path) -> None:
    """Kills: a folder of another tool taken for one's own, a marker of anybody's, a file or a dead link in the way."""
    folder.mark(tmp_path / "other", "predict", {})
    with pytest.raises(UserError, match=r"other: belongs to a run of tools/predict\.py; name another --out"):
        folder.check(tmp_path / "other", "train")
    (tmp_path / "mine").mkdir()
    for marker in ("[]", "{}", '{"tool": 5}', "{", "[" * 100_000):
        (tmp_path / "mine/run.json").write_text(marker)
        with pytest.raises(UserError, match=r"mine: holds files that tools/train\.py did not write \(run\.json\)"):
            folder.check(tmp_path / "mine", "train")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: cannot be written \(it is a file"):
        folder.check(tmp_path / "file", "train", overwrite=True)
    (tmp_path / "dead").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"dead: cannot be written \(a link to nothing"):
        folder.check(tmp_path / "dead", "train", overwrite=True)


def test_an_output_is_never_an_input(tmp_path: Path) -> None:
    """With --overwrite too, by whatever name. Kills: a comparison of texts, a look at the folder itself alone."""
    (tmp_path / "photos/summer").mkdir(parents=True)
    (tmp_path / "photos/summer/a.jpg").write_text("")
    (tmp_path / "link").symlink_to("photos")
    for source in (tmp_path / "photos", tmp_path / "photos/summer/a.jpg", tmp_path / "link/summer"):
        with pytest.raises(UserError, match="an output is never an input"):
            folder.check(tmp_path / "photos", "predict", overwrite=True, inputs=[source])
    folder.check(tmp_path / "photos/answers", "predict", inputs=[tmp_path / "photos"])
    (tmp_path / "out").mkdir()
    for number, link in enumerate((Path.symlink_to, Path.hardlink_to)):
        link(tmp_path / f"out/{number}.jpg", tmp_path / "photos/summer/a.jpg")
        with pytest.raises(UserError, match="an output is never an input"):
            folder.check(tmp_path / "out", "predict", overwrite=True, inputs=[tmp_path / "photos/summer/a.jpg"])
        (tmp_path / f"out/{number}.jpg").unlink()
    folder.check(tmp_path / "photos", "predict", overwrite=True, inputs=[tmp_path / "gone.jpg"])


def test_a_single_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a file written over without a word, a device or a folder that is replaced, an input under another name."""
    monkeypatch.chdir(tmp_path)
    folder.check_file(Path("new/deep/m.onnx"))
    (tmp_path / "m.onnx").write_text("mine")
    (tmp_path / "link.onnx").symlink_to("m.onnx")
    (tmp_path / "hard.onnx").hardlink_to("m.onnx")
    (tmp_path / "dead.onnx").symlink_to("nowhere")
    for path in ("m.onnx", "link.onnx", "dead.onnx"):
        with pytest.raises(UserError, match="is there already; name another --out, or --overwrite"):
            folder.check_file(Path(path))
    folder.check_file(Path("m.onnx"), overwrite=True)
    for path in (".", "/dev/stdout", "/dev/null"):
        with pytest.raises(UserError, match=r"it is no file|an output is never an input"):
            folder.check_file(Path(path), overwrite=True)
    with pytest.raises(UserError, match=r"m\.onnx is a file, not a folder"):
        folder.check_file(Path("m.onnx/deep/a.onnx"))
    for path in ("m.onnx", "link.onnx", "hard.onnx", "../" + tmp_path.name + "/m.onnx"):
        with pytest.raises(UserError, match="an output is never an input"):
            folder.check_file(Path(path), overwrite=True, inputs=[tmp_path / "m.onnx"])


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    """Kills: a user's file that a link in the folder leads to, overwritten."""
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "curves.png").symlink_to("mine")
    folder.beside(tmp_path / "last.pt").symlink_to("mine")
    folder.fresh(tmp_path / "curves.png").write_text("drawn")
    with folder.aside(tmp_path / "last.pt") as file:
        file.write(b"weights")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "last.pt").read_bytes() == b"weights"


def test_what_is_swept_is_ours(tmp_path: Path) -> None:
    """Kills: every *.tmp deleted."""
    (tmp_path / "notes.tmp").write_text("mine")
    folder.beside(tmp_path / "last.pt").write_text("half")
    folder.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.tmp"]
