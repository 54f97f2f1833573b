"""The geometry: closed forms, inverses, and the pixels."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.pose import transforms
from tasks.pose.joints import COCO
from tasks.pose.transforms import Augmentation

UPPER = np.array(COCO.upper)

SIZE = (96, 128)
number = st.floats(-50, 300)


@given(x=number, y=number, width=st.floats(5, 400), rotation=st.floats(-180, 180), px=number, py=number)
@settings(max_examples=80, deadline=None)
def test_affine(x: float, y: float, width: float, rotation: float, px: float, py: float) -> None:
    """A similarity that maps the centre to the middle and undoes itself. Kills: rotation the wrong way round, a shear."""
    centre, extent = np.array([x, y]), np.array([width, width * 4 / 3])
    matrix = transforms.affine(centre, extent, rotation, SIZE)
    np.testing.assert_allclose(transforms.apply(matrix, centre), [48, 64], atol=1e-6)
    radians = np.deg2rad(rotation)
    top = centre + extent[1] / 2 * np.array([np.sin(radians), -np.cos(radians)])  # the top of a box turned clockwise
    np.testing.assert_allclose(transforms.apply(matrix, top), [48, 0], atol=1e-6)
    if rotation == 0:
        point = np.array([px, py])
        back = transforms.to_picture(transforms.apply(matrix, point), centre, extent, SIZE)
        np.testing.assert_allclose(back, point, atol=1e-6)


@given(px=number, py=number, width=st.floats(5, 400))
@settings(max_examples=40, deadline=None)
def test_to_picture_inverts_an_upright_crop(px: float, py: float, width: float) -> None:
    """Kills: half a pixel of offset."""
    centre, extent = np.array([120.0, 80.0]), np.array([width, width * 4 / 3])
    matrix = transforms.affine(centre, extent, 0.0, SIZE)
    point = np.array([px, py])
    np.testing.assert_allclose(transforms.to_picture(transforms.apply(matrix, point), centre, extent, SIZE), point, atol=1e-6)


def test_fit_aspect() -> None:
    """Grows one side, never shrinks."""
    np.testing.assert_allclose(transforms.fit_aspect(np.array([96.0, 10.0]), SIZE), [96, 128])
    np.testing.assert_allclose(transforms.fit_aspect(np.array([10.0, 128.0]), SIZE), [96, 128])


def test_mirrored_crop_is_the_mirror_image() -> None:
    """Mirroring in the matrix gives the pixels of a mirrored picture. Kills: width in place of width - 1."""
    picture = np.random.default_rng(0).integers(0, 255, (80, 70, 3)).astype(np.uint8)
    centre, extent = np.array([30.0, 40.0]), np.array([45.0, 60.0])
    matrix = transforms.affine(np.array([69 - 30.0, 40.0]), extent, 0.0, SIZE)
    direct = transforms.crop(picture, matrix @ transforms.mirror(70), SIZE)
    first = transforms.crop(np.ascontiguousarray(picture[:, ::-1]), matrix, SIZE)
    assert np.abs(direct.astype(int) - first).max() <= 1
    plain = transforms.crop(picture, transforms.affine(centre, extent, 0.0, SIZE), SIZE)
    assert not np.array_equal(direct, plain)


def test_view_is_within_its_bounds() -> None:
    """Kills: an unbounded normal, the wrong side of the scale."""
    np.random.seed(0)
    augmentation = Augmentation(shift=0.1, shift_probability=1.0, scale=(0.75, 1.3), rotation=40.0)
    views = [augmentation.view(np.array([10.0, 20.0]), np.array([30.0, 40.0])) for _ in range(500)]
    shifts = np.array([(c - [10, 20]) / [30, 40] for c, _, _ in views])
    factors = np.array([e[0] / 30 for _, e, _ in views])
    rotations = np.array([r for _, _, r in views])
    assert np.abs(shifts).max() <= 0.1 and np.abs(shifts).max() > 0.09
    assert 0.75 <= factors.min() < 0.78 and 1.27 < factors.max() <= 1.3
    assert np.abs(rotations).max() <= 40 and 0.3 < (rotations == 0).mean() < 0.5


def test_half_body() -> None:
    """The box of the upper or lower joints, with few joints the whole body."""
    np.random.seed(0)
    augmentation = Augmentation(half_body=1.0)
    keypoints = np.column_stack([np.arange(17.0), np.where(UPPER, 10.0, 50.0) + np.arange(17)])
    everything = np.ones(17, dtype=bool)
    boxes = [augmentation.half(keypoints, everything, UPPER) for _ in range(200)]
    tops = [np.allclose(box[0], keypoints[UPPER].mean(axis=0)) for box in boxes if box is not None]
    assert len(tops) == 200 and 0.6 < np.mean(tops) < 0.8
    assert augmentation.half(keypoints, np.arange(17) < 8, UPPER) is None
    assert augmentation.half(keypoints, everything, everything) is None, "a set without a lower half"
    box = augmentation.half(keypoints, np.arange(17) < 12, UPPER)
    assert box is not None
    np.testing.assert_allclose(box[1], 1.5 * np.array([10.0, 10.0]))


def test_recolour_is_reproducible() -> None:
    """albumentations follows numpy's generator, and leaves the picture alone when switched off."""
    picture = np.random.default_rng(0).integers(0, 255, (128, 96, 3)).astype(np.uint8)
    assert Augmentation().recolour(picture) is picture
    augmentation = Augmentation(photometric=1.0, dropout=1.0)
    pictures = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        pictures.append(augmentation.recolour(picture))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])
    assert (pictures[0] == 0).all(axis=2).sum() >= 0.04 * 128 * 96
