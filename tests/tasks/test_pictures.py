"""Broken pictures are named, or left out where that is asked for; names stay in their folder."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tasks import config as configs
from tasks import pictures
from tasks.classification.task import Classification
from tasks.errors import UserError
from tasks.pose import sample
from tasks.pose.data import read_picture
from tasks.pose.task import PoseTask
from tests import fuzz
from tests.tasks import toy


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Six people in six pictures a split, the second and the fourth of which are cut off, or no pictures."""
    for seed, split in enumerate(("train", "val")):
        sample.write_split(tmp_path, split, 6, np.random.default_rng([7, seed]))
        second, fourth = (tmp_path / f"{split}2017/{number:012d}.jpg" for number in (2, 4))
        second.write_bytes(second.read_bytes()[:-900])
        fourth.write_text("no picture")
    return tmp_path


def test_people_in_broken_pictures_are_left_out(people: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Counted, listed once, and not counted as missed. Kills: a limit that counts them, ground truth that keeps them."""
    task = PoseTask(root=str(people), skip_broken=True)
    kept, annotations = task.people("val")
    error = capsys.readouterr().err
    assert "warning: 2 of 6 pictures are left out:" in error
    assert "000000000002.jpg: not a readable picture (it is cut off)" in error
    assert "000000000004.jpg: not a readable picture" in error
    assert {person.image_id for person in kept} == {1, 3, 5, 6} == {a["image_id"] for a in annotations.truth()["annotations"]}
    limited, _ = PoseTask(root=str(people), skip_broken=True, limit=2).people("val")
    assert [person.image_id for person in limited] == [1, 3]
    assert capsys.readouterr().err == ""
    assert len(task.dataset("train")) == 4
    with pytest.raises(UserError, match=r"0002\.jpg: not a readable picture .* task\.skip_broken=True trains without"):
        PoseTask(root=str(people)).dataset("val")[1]


def test_broken_images_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: a neighbour that stands in for what cannot be opened, labels that shift."""
    for label, name in enumerate(("apple", "pear")):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (40, 30), (80 * label, 10, 200)).save(tmp_path / "train" / name / f"{i}.jpg")
    (tmp_path / "train/apple/1.jpg").write_text("no picture")
    whole = (tmp_path / "train/pear/0.jpg").read_bytes()
    (tmp_path / "train/pear/0.jpg").write_bytes(whole[: len(whole) - 40])
    found = Classification(root=str(tmp_path), side=16, skip_broken=True).dataset("train")
    assert len(found) == 4
    for item in (found[i] for i in range(4)):
        assert abs(int(item["image"][0].float().mean()) - 80 * int(item["label"])) < 40
    assert "warning: 2 of 6 pictures are left out:" in capsys.readouterr().err
    strict = Classification(root=str(tmp_path), side=16).dataset("train")
    with pytest.raises(UserError, match=r"(apple/1|pear/0)\.jpg: not a readable picture"):
        [strict[i] for i in range(6)]


def test_what_a_camera_writes_after_the_end() -> None:
    """Is no damage. Kills: a check of the very last bytes."""
    file = io.BytesIO()
    Image.new("RGB", (20, 20)).save(file, "JPEG")
    for behind in (b"\0" * 100, b"MotionPhoto_Data" + b"\xff\xd8" * 50_000):
        pictures.check(file.getvalue() + behind)


def test_cut_off_behind_a_small_picture() -> None:
    """A photo carries a smaller one, with its own end, in front. Kills: any end marker taken for the photo's."""
    small, large = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (20, 20)).save(small, "JPEG")
    exif = Image.Exif()
    exif[0x927C] = small.getvalue()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 90, 3), dtype=np.uint8)).save(large, "JPEG", exif=exif)
    content = large.getvalue()
    assert content.count(b"\xff\xd9") > 1
    pictures.check(content)
    with pytest.raises(ValueError, match="cut off"):
        pictures.check(content[:-900])


def test_max_pixels() -> None:
    """The limit is the setting's. Kills: a fixed cap, a limit that is ignored."""
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "PNG")
    pictures.check(file.getvalue(), 600)
    with pytest.raises(ValueError, match=r"Image size \(600 pixels\) exceeds limit of 599 pixels; task\.max_pixels="):
        pictures.check(file.getvalue(), 599)


@given(st.lists(st.sampled_from([*fuzz.TOKENS, "a", "b"]), max_size=8).map("".join), st.sampled_from(fuzz.WORDS))
@settings(max_examples=150, deadline=None)
def test_overrides_never_crash(value: str, name: str) -> None:
    """A config or a UserError, whatever is typed. Kills: parser errors of Python's that pass through."""
    with contextlib.suppress(UserError):
        configs.describe(configs.override(toy.config, [f"{name}={value}"]))


@pytest.mark.filterwarnings("ignore")
def test_fuzz_for_a_moment(capsys: pytest.CaptureFixture[str]) -> None:
    """A few hundred mutilated inputs of every kind; `make fuzz` goes on for longer."""
    assert fuzz.main(8, seed=4) == 0, capsys.readouterr().out


def test_a_pipe_is_no_picture(tmp_path: Path) -> None:
    """Kills: a reader that waits for ever."""
    os.mkfifo(tmp_path / "a.jpg")
    for path in (tmp_path / "a.jpg", Path("/dev/zero")):
        with pytest.raises(UserError, match="not a readable picture \\(it is no regular file"):
            read_picture(path)
