"""The heatmap codec against loops written from mmpose's description, and round trips."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.pose.codec import Heatmap, SimCC, UDPHeatmap


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


def udp_painted(keypoint: np.ndarray, sigma: float, width: int, height: int) -> tuple[np.ndarray, float]:
    """One of UDP's heatmaps, cell by cell: the Gaussian lies on the joint, its window on the nearest cell."""
    heatmap = np.zeros((height, width))
    (x, y), radius = keypoint, int(3 * sigma)
    i, j = int(x + 0.5), int(y + 0.5)
    if i - radius >= width or j - radius >= height or i + radius + 1 < 0 or j + radius + 1 < 0:
        return heatmap, 0.0
    for row in range(max(j - radius, 0), min(j + radius + 1, height)):
        for column in range(max(i - radius, 0), min(i + radius + 1, width)):
            heatmap[row, column] = np.exp(-((column - x) ** 2 + (row - y) ** 2) / (2 * sigma**2))
    return heatmap, 1.0


def test_udp_encode_equals_the_loops() -> None:
    """Kills: the stride of w / W, a Gaussian on the nearest cell, a window that is not cut, x and y swapped."""
    codec = UDPHeatmap((96, 128), (24, 32), sigma=2.0)
    rng = np.random.default_rng(0)
    keypoints = rng.uniform(-60, 190, (40, 2)).astype(np.float32)
    labelled = rng.random(40) > 0.2
    heatmaps, weights = codec.encode(keypoints, labelled)
    for k in range(40):
        expected, weight = udp_painted(keypoints[k] / (np.array([95, 127]) / (23, 31)), 2.0, 24, 32)
        assert weights[k] == weight * labelled[k]
        np.testing.assert_allclose(heatmaps[k], expected * weights[k], atol=1e-6)
    assert 0 < weights.sum() < labelled.sum(), "every case must occur"


def udp_decoded(heatmap: np.ndarray, blur: int) -> np.ndarray:
    """One joint in cells, as the reference has it: the whole map blurred, scaled, cut off; the Newton step; edges repeated."""
    height, width = heatmap.shape
    y, x = np.unravel_index(heatmap.argmax(), heatmap.shape)
    margin = blur // 2
    p = cv2.GaussianBlur(np.pad(heatmap, margin), (blur, blur), 0)[margin:-margin, margin:-margin].astype(np.float64)
    p = np.log(np.clip(p * heatmap.max() / p.max(), 1e-3, 50))

    def at(dx: int, dy: int) -> float:
        return p[min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)]

    gradient = [(at(1, 0) - at(-1, 0)) / 2, (at(0, 1) - at(0, -1)) / 2]
    xy = (at(1, 1) - at(1, 0) - at(0, 1) + 2 * at(0, 0) - at(-1, 0) - at(0, -1) + at(-1, -1)) / 2
    xx, yy = at(1, 0) - 2 * at(0, 0) + at(-1, 0), at(0, 1) - 2 * at(0, 0) + at(0, -1)
    return np.array([x, y]) - np.linalg.solve(np.array([[xx, xy], [xy, yy]]) + np.finfo(np.float32).eps * np.eye(2), gradient)


@pytest.mark.parametrize("factor", [1.0, 0.01, 0.002, 200.0])
def test_udp_decode_equals_the_loops(factor: float) -> None:
    """Strong and faint maxima, inside and at the border. Kills: edges of 0, a cut before the scale, no cut, a scale of 1."""
    codec = UDPHeatmap((96, 128), (24, 32), sigma=2.0)
    rng = np.random.default_rng(1)
    heatmaps, weights = codec.encode(rng.uniform(-6, 130, (80, 2)).astype(np.float32), np.ones(80, bool))
    heatmaps = (factor * (heatmaps[heatmaps.max(axis=(1, 2)) > 0.3] + 0.01 * rng.random((32, 24)))).astype(np.float32)
    decoded, scores = codec.decode(heatmaps[None])
    expected = np.stack([udp_decoded(heatmap, 11) for heatmap in heatmaps]) * np.array([95, 127]) / (23, 31)
    np.testing.assert_allclose(decoded[0], expected, atol=5e-3)
    np.testing.assert_array_equal(scores[0], heatmaps.max(axis=(1, 2)))


@given(x=st.floats(22, 74), y=st.floats(22, 106))
@settings(max_examples=60, deadline=None)
def test_udp_round_trip_and_mirror(x: float, y: float) -> None:
    """The joint is found, and in the mirror image at w - 1 - x. Kills: a span of w, a shift of the mirrored heatmaps."""
    codec = UDPHeatmap((96, 128), (24, 32), sigma=2.0)
    keypoints = np.array([[x, y], [95 - x, y]], dtype=np.float32)
    heatmaps, _ = codec.encode(keypoints, np.array([True, True]))
    decoded, _ = codec.decode(heatmaps[None])
    assert np.abs(decoded[0] - keypoints).max() < 0.05
    mirrored = codec.unmirror(torch.from_numpy(heatmaps[None])).numpy()
    np.testing.assert_allclose(mirrored[0, 1], heatmaps[0], atol=1e-3)


@pytest.mark.parametrize("codec", [Heatmap((96, 128), (24, 32), unbiased=True), UDPHeatmap((96, 128), (24, 32))])
def test_maps_without_an_interior_maximum(codec: Heatmap | UDPHeatmap) -> None:
    """A batch of border maxima, or of none, is decoded. Kills: windows of an empty selection."""
    heatmaps = np.zeros((1, 2, 32, 24), dtype=np.float32)
    assert (codec.decode(heatmaps)[0] < 0).all()
    heatmaps[0, 0, 0, 0] = heatmaps[0, 1, 31, 23] = 1.0
    assert np.isfinite(codec.decode(heatmaps)[0]).all()


def test_bad_settings() -> None:
    """Errors name the rule."""
    with pytest.raises(ValueError, match="odd"):
        UDPHeatmap(blur=4)
    with pytest.raises(ValueError, match="sigma"):
        Heatmap(sigma=0)
    with pytest.raises(ValueError, match="odd"):
        Heatmap(blur=10)


def labels(keypoint: np.ndarray, codec: SimCC) -> tuple[np.ndarray, float]:
    """One joint's labels, bin by bin."""
    sigmas = codec.sigma if isinstance(codec.sigma, tuple) else (codec.sigma, codec.sigma)
    parts, weight = [], 1.0
    for value, side, sigma in zip(keypoint, codec.input_size, sigmas, strict=True):
        count, centre = int(side * codec.split_ratio), int(np.around(value * codec.split_ratio))
        if codec.smoothing is None:
            if centre - 3 * sigma >= count or centre + 3 * sigma + 1 < 0:
                weight = 0.0
            parts.append([np.exp(-((i - centre) ** 2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi)) for i in range(count)])
        else:
            if not 0 <= centre < count:
                weight = 0.0
            parts.append([1 - codec.smoothing if i == centre else codec.smoothing / (count - 1) for i in range(count)])
    return np.concatenate(parts), weight


@pytest.mark.parametrize(
    "codec",
    [
        SimCC((48, 64), sigma=3.0),
        SimCC((48, 64), split_ratio=3.0, sigma=(2.0, 2.5)),
        SimCC((48, 64), smoothing=0.1),
        SimCC((48, 64), smoothing=0.0),
    ],
)
def test_simcc_labels_equal_the_loops(codec: SimCC) -> None:
    """Kills: labels of sum 1, sigmas swapped, the joint's own bin smoothed twice, weights of joints far outside."""
    rng = np.random.default_rng(0)
    keypoints = rng.uniform(-25, 90, (60, 2)).astype(np.float32)
    labelled = rng.random(60) > 0.2
    target, weights = codec.encode(keypoints, labelled)
    assert target.shape == (60, sum(codec.bins))
    for k in range(60):
        expected, weight = labels(keypoints[k], codec)
        assert weights[k] == weight * labelled[k]
        np.testing.assert_allclose(target[k], expected * weights[k], atol=1e-6)
    assert 0 < weights.sum() < labelled.sum(), "every case must occur"


@given(x=st.floats(0, 95), y=st.floats(0, 127), smoothing=st.sampled_from([None, 0.1]))
@settings(max_examples=60, deadline=None)
def test_simcc_round_trip(x: float, y: float, smoothing: float | None) -> None:
    """Within half a bin, a quarter of a pixel. Kills: x and y swapped, a ratio off, bins counted from the middle."""
    codec = SimCC((96, 128), sigma=3.0, smoothing=smoothing)
    keypoints = np.array([[x, y]], dtype=np.float32)
    target, weights = codec.encode(keypoints, np.array([True]))
    decoded, scores = codec.decode(target[None])
    assert weights[0] == 1
    assert np.abs(decoded[0] - keypoints).max() <= 0.25 + 1e-5
    assert scores[0, 0] == pytest.approx(0.9 if smoothing else 1 / (3 * np.sqrt(2 * np.pi)), rel=1e-5)


def test_simcc_score_is_the_smaller_one() -> None:
    """Of the two largest logits; without a positive one the bins are (-1, -1). Kills: the larger, their mean."""
    codec = SimCC((4, 4), split_ratio=1.0)
    logits = np.array([[[0, 2, 0, 0, 0, 0, 0, 5], [0, 2, 0, 0, -1, -1, -3, -1]]], dtype=np.float32)
    decoded, scores = codec.decode(logits)
    np.testing.assert_array_equal(scores, [[2, -1]])
    np.testing.assert_array_equal(decoded, [[[1, 3], [-1, -1]]])


def test_simcc_loss_by_hand() -> None:
    """The bins' mean, the batch's sum, the joints' mean. Kills: a mean over the batch, a sum over the bins, no weights."""
    codec = SimCC((3, 5), split_ratio=1.0)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 1, (2, 4, 8))
    target = np.stack([codec.encode(rng.uniform(0, 3, (4, 2)).astype(np.float32), np.ones(4, bool))[0] for _ in range(2)])
    target[0, 0, :2] = 0.0  # 0 log 0 is 0
    weight = np.array([[1, 1, 0, 1], [1, 0, 0, 1.0]])
    expected = 0.0
    for b in range(2):
        for k in range(4):
            for bins in (slice(0, 3), slice(3, 8)):
                q, p = logits[b, k, bins], target[b, k, bins]
                log_q = q - np.log(np.exp(q).sum())
                terms = [pi * (np.log(pi) - li) if pi > 0 else 0.0 for pi, li in zip(p, log_q, strict=True)]
                expected += weight[b, k] * np.mean(terms) / 4
    loss = codec.loss(*(torch.tensor(a, dtype=torch.float64) for a in (logits, target, weight)))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_simcc_of_a_mirrored_crop() -> None:
    """Columns turn round, rows stay: to the bin that w - 1 - x leaves. Kills: rows flipped, bins of both axes mixed up."""
    codec = SimCC((96, 128), sigma=3.0)
    keypoints = np.array([[20.0, 100.0], [60.5, 3.0]], dtype=np.float32)
    target, _ = codec.encode((keypoints * [-1, 1] + [95, 0]).astype(np.float32), np.ones(2, bool))
    decoded, _ = codec.decode(codec.unmirror(torch.from_numpy(target)[None]).numpy())
    np.testing.assert_allclose(decoded[0], keypoints + np.array([0.5, 0.0]))


def test_bad_simcc_settings() -> None:
    """Errors name the rule."""
    for settings_, message in (
        ({"sigma": (1.0, 0.0)}, "sigma"),
        ({"split_ratio": 0.0}, "split_ratio"),
        ({"smoothing": 1.0}, "smoothing"),
    ):
        with pytest.raises(ValueError, match=message):
            SimCC(**settings_)  # type: ignore[arg-type]
