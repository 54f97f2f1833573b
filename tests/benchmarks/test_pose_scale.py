"""The benchmark of pose evaluation: a scene as large as it says, and every part of it timed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import pose_scale
from tasks.errors import UserError
from tasks.pose import sample
from tasks.pose.task import PoseTask


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed, split in enumerate(("train", "val")):
        sample.write_split(tmp_path / "few", split, 3, np.random.default_rng(seed))
    return tmp_path / "few"


def test_every_part_is_timed(root: Path, tmp_path: Path) -> None:
    """Kills: a scene of fewer boxes, a part that is left out of the sum, codecs that are counted twice."""
    seconds = pose_scale._evaluated(pose_scale._scene(root, tmp_path / "scene", 5))
    assert seconds.pop("boxes") == 5 * (pose_scale.BOXES // pose_scale.PICTURES + 1)
    total, without = seconds.pop("all, with DARK"), seconds.pop("all but the crops")
    assert total == pytest.approx(sum(s for name, s in seconds.items() if name not in
                                      ("joints of plain heatmaps", "joints of UDP", "joints of SimCC")))  # fmt: skip
    assert without == pytest.approx(total - seconds["make crops"])


def test_the_file_of_annotations(root: Path, tmp_path: Path) -> None:
    """It is one of COCO's, in which four people of seven have joints. Kills: a file that is smaller than it says."""
    folder = pose_scale._training_file(root, tmp_path / "train", 100)
    people, annotations = PoseTask(root=str(folder)).people("train")
    count = pose_scale.TRAIN_ANNOTATIONS * 100 // pose_scale.TRAIN_PICTURES
    assert len(annotations.picture) == count
    assert len(people) == sum(k % 7 >= 3 for k in range(count))


def test_nothing_to_repeat(tmp_path: Path) -> None:
    """Kills: a traceback where the data are missing."""
    with pytest.raises(UserError, match="--root names a folder"):
        pose_scale._scene(tmp_path, tmp_path / "scene", 5)
