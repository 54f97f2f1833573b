"""Joint sets: what is derived from names, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.pose.joints import COCO, Joints, partners, same_names


def test_coco() -> None:
    """Mirroring is an involution that swaps left and right; the upper half ends at the wrists. Kills: a pair that is missed."""
    mirrored = np.array(COCO.mirrored)
    assert (mirrored[mirrored] == np.arange(17)).all()
    assert mirrored[0] == 0
    assert (mirrored[1::2] == np.arange(2, 17, 2)).all()
    assert [name for name, upper in zip(COCO.names, COCO.upper, strict=True) if upper][-1] == "right_wrist"
    assert COCO.side(5, 7) == -1 and COCO.side(6) == 1 and COCO.side(5, 6) == COCO.side(0) == 0
    assert COCO.side(0, 1) == -1, "a limb from the middle to the left is the left's"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("tip left right tail", (0, 2, 1, 3)),
        ("l_eye r_eye nose", (1, 0, 2)),
        ("LEye REye", (1, 0)),
        ("eye.L eye.R", (1, 0)),
        ("leftEye rightEye", (1, 0)),
        ("righteye lefteye", (1, 0)),
        ("lshoulder rshoulder", (1, 0)),
        ("Left_Eye RIGHT_EYE", (1, 0)),
        ("left_a_left right_a_right", (1, 0)),
        ("left_fin tail", (0, 1)),
        ("l r", (1, 0)),
        ("leg reg bright", (1, 0, 2)),
        ("0 1 2", (0, 1, 2)),
    ],
)
def test_pairs_from_names(names: str, expected: tuple[int, ...]) -> None:
    """Kills: case or separators that matter, a pair of which one is missing."""
    assert partners(names.split()) == expected


def test_same_names() -> None:
    """However they are written. Kills: another order taken for the same."""
    assert same_names(["L_Eye", "Root of tail"], ["left_eye", "root_of_tail"])
    assert not same_names(["left_eye", "nose"], ["nose", "left_eye"])
    assert not same_names(["left_eye"], ["left_eye", "nose"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"names": ()}, "no joints"),
        ({"names": ("a", "a")}, "'a' stands there twice"),
        ({"names": ("a", "b"), "sigmas": (0.1, 0.1, 0.1)}, "sigmas must have a value for each of the 2 joints, got 3"),
        ({"names": ("a", "b"), "sigmas": (0.1, 0.0)}, "sigmas must be > 0"),
        ({"names": ("a", "b", "c"), "mirrored": (1, 2, 0)}, "mirroring twice changes nothing"),
        ({"names": ("a", "b"), "limbs": ((1, 2),)}, "limbs must name joints 0 to 1"),
    ],
)
def test_mistakes(settings: dict[str, tuple[object, ...]], message: str) -> None:
    """The rule is named."""
    with pytest.raises(ValueError, match=message):
        Joints(**settings)  # type: ignore[arg-type]
