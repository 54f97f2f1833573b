"""What is drawn, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from tasks.pose import draw, errors
from tasks.pose.joints import COCO, Joints


def test_limbs_join_neighbours() -> None:
    """COCO's 19 limbs. Kills: joints counted from 1."""
    names = {frozenset((COCO.names[a], COCO.names[b])) for a, b in COCO.limbs}
    assert len(names) == 19
    assert frozenset(("left_ankle", "left_knee")) in names
    assert frozenset(("left_shoulder", "right_shoulder")) in names


def test_skeleton() -> None:
    """Joints where they are, in their side's colour, as opaque as they are sure; the given picture stays.

    Kills: x and y swapped, left and right swapped, joints of a negative score drawn.
    """
    picture = np.zeros((80, 60, 3), np.uint8)
    keypoints, scores = np.full((17, 2), -100.0), np.full(17, -1.0)
    keypoints[9], scores[9] = (10, 50), 1.0  # left wrist
    keypoints[10], scores[10] = (40, 30), 0.0  # right wrist
    keypoints[0], scores[0] = (30, 10), -1.0
    drawn = draw.skeleton(picture, keypoints, scores, thick=3)
    assert not picture.any()
    assert tuple(drawn[50, 10]) == draw.LEFT
    faint = drawn[30, 40].astype(float)
    np.testing.assert_allclose(faint, 0.3 * np.array(draw.RIGHT), atol=1)
    assert not drawn[10, 30].any()


@pytest.mark.parametrize("point", [(-5.0, 4.0), (1e6, 1e6), (np.nan, np.nan), (59.5, 79.5)])
def test_points_off_the_picture(point: tuple[float, float]) -> None:
    """Are no error."""
    keypoints = np.tile(np.array(point), (17, 1))
    draw.skeleton(np.zeros((80, 60, 3), np.uint8), keypoints, np.ones(17))


def test_poses_enlarges_small_pictures() -> None:
    """A pose of a small picture lands where it was. Kills: joints left in the coordinates of before."""
    keypoints = np.zeros((17, 3))
    keypoints[:] = [10, 20, 1]
    found = [{"keypoints": keypoints.ravel().tolist(), "score": 0.5}]
    drawn = draw.poses(np.zeros((60, 60, 3), np.uint8), found)
    assert drawn.shape == (480, 480, 3)
    assert drawn[20 * 8 + 4, 10 * 8 + 4].any()
    assert not drawn[400:, 400:].any()


def test_sheets() -> None:
    """Rows of unequal length, and pictures side by side under their titles."""
    tiles = [("a", np.full((50, 40, 3), k, np.uint8)) for k in range(3)]
    sheet = draw.contact_sheet([("worst", tiles), ("best", tiles[:1])])
    assert sheet.shape == (2 * (50 + 26), 3 * (40 + 3), 3)
    pair = draw.side_by_side([("one", tiles[0][1]), ("two", tiles[1][1])])
    assert pair.shape == (76, 84, 3)


def test_legend() -> None:
    """A set's sides alone, in as many lines as they take. Kills: a colour that nothing has, text beyond the border."""
    assert [colour for colour, _ in draw.sides(COCO)] == [draw.LEFT, draw.RIGHT, draw.MIDDLE]
    assert [colour for colour, _ in draw.sides(Joints(("left", "right")))] == [draw.LEFT, draw.RIGHT]
    assert draw.sides(Joints(("tip", "tail"))) == [(draw.MIDDLE, "predicted")]
    wide, narrow = (draw.legend(width, draw.sides(COCO)) for width in (1000, 200))
    assert wide.shape == (26, 1000, 3) and narrow.shape == (78, 200, 3)


def test_files(tmp_path: Path) -> None:
    """RGB goes out as RGB, and the picture of the errors is a picture. Kills: red and blue swapped."""
    picture = np.zeros((20, 20, 3), np.uint8)
    picture[..., 0] = 200
    draw.write(tmp_path / "red.png", picture)
    assert cv2.imread(str(tmp_path / "red.png"))[0, 0].tolist() == [0, 0, 200]
    report = {
        "auc": 0.5,
        "curve": {"reach": errors.REACHES.tolist(), "pck": errors.REACHES.tolist()},
        "joints": {"nose": {"pck": 0.3, "median_error": 0.1, "labelled": 4}},
        "ap_by_size": {},
    }
    draw.error_picture(tmp_path / "errors.png", report)
    assert cv2.imread(str(tmp_path / "errors.png")).std() > 5
