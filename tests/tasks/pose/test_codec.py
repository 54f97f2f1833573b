"""The heatmap codec against loops written from mmpose's description, and round trips."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.pose.codec import Heatmap


def painted(keypoint: np.ndarray, sigma: float, width: int, height: int, unbiased: bool) -> tuple[np.ndarray, float]:
    """One heatmap, cell by cell."""
    heatmap = np.zeros((height, width))
    x, y = keypoint
    radius = 3 * sigma
    if not unbiased:
        x, y, radius = int(x + 0.5), int(y + 0.5), int(3 * sigma)
    if x - radius >= width or y - radius >= height or x + radius + 1 < 0 or y + radius + 1 < 0:
        return heatmap, 0.0
    for row in range(height):
        for column in range(width):
            if unbiased or (abs(column - x) <= radius and abs(row - y) <= radius):
                heatmap[row, column] = np.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma**2))
    return heatmap, 1.0


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("sigma", [1.5, 2.0])
def test_encode_equals_the_loops(unbiased: bool, sigma: float) -> None:
    """Kills: a radius that is not cut to whole cells, a centre truncated without the half, weights of joints far outside."""
    codec = Heatmap((96, 128), (24, 32), sigma=sigma, unbiased=unbiased)
    rng = np.random.default_rng(0)
    keypoints = rng.uniform(-60, 190, (40, 2)).astype(np.float32)
    labelled = rng.random(40) > 0.2
    heatmaps, weights = codec.encode(keypoints, labelled)
    for k in range(40):
        expected, weight = painted(keypoints[k] / 4.0, sigma, 24, 32, unbiased)
        assert weights[k] == weight * labelled[k]
        np.testing.assert_allclose(heatmaps[k], expected * labelled[k], atol=1e-6)
    assert 0 < weights.sum() < labelled.sum(), "every case must occur"


@given(x=st.floats(22, 74), y=st.floats(22, 106), unbiased=st.booleans())  # the blur is whole inside
@settings(max_examples=60, deadline=None)
def test_round_trip(x: float, y: float, unbiased: bool) -> None:
    """DARK finds the joint, the quarter offset only its quarter cell. Kills: x and y swapped, a stride off."""
    codec = Heatmap((96, 128), (24, 32), sigma=2.0, unbiased=unbiased)
    keypoints = np.array([[x, y]], dtype=np.float32)
    heatmaps, _ = codec.encode(keypoints, np.array([True]))
    decoded, scores = codec.decode(heatmaps[None])
    assert np.abs(decoded[0] - keypoints).max() < (0.2 if unbiased else 3.01)
    assert 0.6 < scores[0, 0] <= 1.0


def test_quarter_offset() -> None:
    """A quarter of a cell towards the larger neighbour, in input pixels; none at the border."""
    codec = Heatmap((96, 128), (24, 32))
    heatmaps = np.zeros((1, 2, 32, 24), dtype=np.float32)
    heatmaps[0, 0, 10, 5:8] = [0.1, 1.0, 0.5]
    heatmaps[0, 0, 9, 6] = 0.3
    heatmaps[0, 1, 0, 0] = 1.0
    decoded, _ = codec.decode(heatmaps)
    np.testing.assert_array_equal(decoded[0], [[4 * 6.25, 4 * 9.75], [0.0, 0.0]])


@pytest.mark.parametrize("unbiased", [False, True])
def test_empty_maps(unbiased: bool) -> None:
    """No positive cell: (-1, -1) cells and no warning from a division."""
    codec = Heatmap((96, 128), (24, 32), unbiased=unbiased)
    heatmaps = np.full((1, 2, 32, 24), -0.01, dtype=np.float32)
    heatmaps[0, 1, 10, 10] = 1e-6  # alone among negative cells
    decoded, scores = codec.decode(heatmaps)
    np.testing.assert_array_equal(decoded[0, 0], [-4, -4])
    assert scores[0, 0] <= 0
    assert np.isfinite(decoded).all()


def test_bad_settings() -> None:
    """Errors name the rule."""
    with pytest.raises(ValueError, match="sigma"):
        Heatmap(sigma=0)
    with pytest.raises(ValueError, match="odd"):
        Heatmap(blur=10)
