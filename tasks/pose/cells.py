"""Heatmaps cell by cell: Gaussians around joints, and where in them a maximum lies between the cells.

# B batch, K keypoints, M = B K maps, H W heatmap; places are (x, y) of cells, (-1, -1) for a map without a positive value
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float32]
Points = NDArray[np.float64]


def gaussians(
    centre: Points, nearest: Points, radius: int | None, sigma: float, size: tuple[int, int], labelled: NDArray[np.bool_]
) -> tuple[Array, Array]:
    """Heatmaps of one person's joints.

    Args:
        centre: [K, 2] of the Gaussians, in cells.
        nearest: [K, 2], the cell around which they are cut off; where they are not, the centre.
        radius: cells that are left on each side; None: all, though a joint counts as far as 3 sigma.
        sigma: in cells.
        size: (W, H).
        labelled: [K].

    Returns:
        Heatmaps [K, H, W] and weights [K]: 0 for joints that are not labelled, or whose Gaussian misses the heatmap.
    """
    reach = 3 * sigma if radius is None else float(radius)
    low, high = nearest - reach, nearest + reach + 1
    reaches = (low < size).all(axis=1) & (high >= 0).all(axis=1)
    weights = (labelled & reaches).astype(np.float32)
    # A Gaussian factors into columns and rows.
    profiles = []
    for axis, count in enumerate(size):
        cells = np.arange(count)[None, :]
        profile = np.exp(-((cells - centre[:, axis : axis + 1]) ** 2) / (2 * sigma**2))
        near = radius is None or np.abs(cells - nearest[:, axis : axis + 1]) <= reach
        profiles.append(np.where(near, profile, 0.0))
    columns, rows = profiles
    heatmaps = rows[:, :, None] * columns[:, None, :] * weights[:, None, None]
    return heatmaps.astype(np.float32), weights


def mean_squares(heatmaps: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error over all cells of all heatmaps; those of joints without a weight count as 0."""
    return ((heatmaps - target).square() * weight[:, :, None, None]).mean()


def maxima(heatmaps: Array) -> tuple[Array, NDArray[np.int64], Array]:
    """The maximum of each map.

    Args:
        heatmaps: [B, K, H, W].

    Returns:
        Maps [M, H, W], places [M, 2], and scores [B, K], the maxima.
    """
    batch, joints, height, width = heatmaps.shape
    maps = heatmaps.reshape(-1, height, width)
    flat = maps.reshape(len(maps), -1)
    place = flat.argmax(axis=1)
    scores = flat[np.arange(len(maps)), place]
    places = np.stack([place % width, place // width], axis=1)
    places[scores <= 0] = -1
    return maps, places, scores.reshape(batch, joints)


def quarter(maps: Array, places: NDArray[np.int64]) -> Points:
    """Offsets [M, 2] of a quarter of a cell towards the larger neighbour (arXiv 1804.06208)."""
    height, width = maps.shape[1:]
    offsets = np.zeros(places.shape)
    x, y = places.T
    # The reference leaves the first two and the last column alone along x, and any border cell along the other axis.
    m = np.flatnonzero((x > 1) & (x < width - 1) & (y > 0) & (y < height))
    offsets[m, 0] = 0.25 * np.sign(maps[m, y[m], x[m] + 1] - maps[m, y[m], x[m] - 1])
    m = np.flatnonzero((y > 1) & (y < height - 1) & (x > 0) & (x < width))
    offsets[m, 1] = 0.25 * np.sign(maps[m, y[m] + 1, x[m]] - maps[m, y[m] - 1, x[m]])
    return offsets


def newton(maps: Array, places: NDArray[np.int64], blur: int) -> Points:
    """DARK's offsets [M, 2] (arXiv 1910.06278, eq. 9): the Newton step on the blurred log-heatmap.

    Differences are taken over two cells, so that 5x5 cells around a maximum are needed, and the two rows and columns at a
    border are left alone.
    """
    height, width = maps.shape[1:]
    offsets = np.zeros(places.shape)
    x, y = places.T
    m = np.flatnonzero((x > 1) & (x < width - 2) & (y > 1) & (y < height - 2))
    p = np.log(np.maximum(_blurred(maps[m], places[m], 2, blur), 1e-10))
    gradient = 0.5 * np.stack([p[:, 2, 3] - p[:, 2, 1], p[:, 3, 2] - p[:, 1, 2]], axis=1)
    xy = 0.25 * (p[:, 3, 3] - p[:, 1, 3] - p[:, 3, 1] + p[:, 1, 1])
    xx = 0.25 * (p[:, 2, 4] - 2 * p[:, 2, 2] + p[:, 2, 0])
    yy = 0.25 * (p[:, 4, 2] - 2 * p[:, 2, 2] + p[:, 0, 2])
    offsets[m] = _step(gradient, xx, xy, yy)
    return offsets


_LEAST, _MOST = 1e-3, 50.0  # between which UDP's blurred heatmaps are kept


def newton_of_neighbours(maps: Array, places: NDArray[np.int64], blur: int) -> Points:
    """UDP's offsets [M, 2] (arXiv 1911.07524): the Newton step from the 3x3 cells around each maximum, also at borders.

    The blurred map is scaled to the map's own maximum before it is cut off at `_LEAST` and `_MOST`.
    """
    height, width = maps.shape[1:]
    offsets = np.zeros(places.shape)
    m = np.flatnonzero(places[:, 0] >= 0)
    maps, places = maps[m], places[m]
    p = _blurred(maps, places, 1, blur)
    # A cell beyond the border is the one at it.
    near = np.arange(-1, 2)
    columns, rows = (
        np.clip(place[:, None] + near, 0, last) - place[:, None] + 1
        for place, last in zip(places.T, (width - 1, height - 1), strict=True)
    )
    p = p[np.arange(len(m))[:, None, None], rows[:, :, None], columns[:, None, :]]
    # The blur lowers a maximum, so the scale is at least 1: it matters only where something is cut off.
    top = maps[np.arange(len(m)), places[:, 1], places[:, 0]].astype(np.float64)
    cut = np.flatnonzero((p.min(axis=(1, 2)) < _LEAST) | (top > _MOST))
    if len(cut):
        down, across = _band(height, blur), _band(width, blur)
        p[cut] *= (top[cut] / (down @ maps[cut] @ across.T).max(axis=(1, 2)))[:, None, None]
    p = np.log(np.clip(p, _LEAST, _MOST))
    gradient = 0.5 * np.stack([p[:, 1, 2] - p[:, 1, 0], p[:, 2, 1] - p[:, 0, 1]], axis=1)
    xx = p[:, 1, 2] - 2 * p[:, 1, 1] + p[:, 1, 0]
    yy = p[:, 2, 1] - 2 * p[:, 1, 1] + p[:, 0, 1]
    xy = 0.5 * (p[:, 2, 2] - p[:, 1, 2] - p[:, 2, 1] + 2 * p[:, 1, 1] - p[:, 1, 0] - p[:, 0, 1] + p[:, 0, 0])
    tiny = np.finfo(np.float32).eps  # as the reference adds to the diagonal
    offsets[m] = _step(gradient, xx + tiny, xy, yy + tiny)
    return offsets


def _step(gradient: Points, xx: Points, xy: Points, yy: Points) -> Points:
    """Minus the inverse of the second derivatives times the first, [M, 2]; 0 where there is no inverse."""
    determinant = xx * yy - xy * xy
    some = determinant != 0
    adjugate = np.stack([np.stack([yy, -xy], 1), np.stack([-xy, xx], 1)], 1)[some]
    step = np.zeros(gradient.shape)
    step[some] = -(adjugate @ gradient[some, :, None])[..., 0] / determinant[some, None]
    return step


def _blurred(maps: Array, places: NDArray[np.int64], reach: int, blur: int) -> Points:
    """The cells [M, 2 reach + 1, 2 reach + 1] around each place of the blurred maps, which are 0 beyond their border."""
    count = 2 * reach + 1
    windows = _windows(maps, places, blur // 2 + reach)
    band = np.stack([np.pad(_kernel(blur), (i, count - 1 - i)) for i in range(count)]).astype(maps.dtype)
    # One large product for an axis: a small one for each map takes many times as long.
    side = band.shape[1]
    across = (windows.reshape(-1, side) @ band.T).reshape(len(maps), side, count)
    both = (across.transpose(0, 2, 1).reshape(-1, side) @ band.T).reshape(len(maps), count, count)
    return both.transpose(0, 2, 1).astype(np.float64)


def _windows(maps: Array, places: NDArray[np.int64], reach: int) -> Array:
    """The cells [M, 2 reach + 1, 2 reach + 1] around each place of the maps; 0 beyond their border."""
    side, near = 2 * reach + 1, np.arange(-reach, reach + 1)
    found = np.empty((len(maps), side, side), maps.dtype)
    limits = np.array([maps.shape[2] - 1, maps.shape[1] - 1])
    inside = ((places >= reach) & (places <= limits - reach)).all(axis=1)
    m = np.flatnonzero(inside)
    if len(m):
        x, y = places[m].T - reach
        found[m] = sliding_window_view(maps, (side, side), axis=(1, 2))[m, y, x]  # type: ignore[call-overload]
    # Padding the maps would copy them whole.
    m = np.flatnonzero(~inside)
    (columns, there), (rows, above) = (
        (np.clip(cells, 0, limit), (cells >= 0) & (cells <= limit))
        for cells, limit in zip((places[m].T[..., None] + near), limits, strict=True)
    )
    found[m] = maps[m[:, None, None], rows[:, :, None], columns[:, None, :]] * (above[:, :, None] & there[:, None, :])
    return found


def _band(side: int, blur: int) -> Points:
    """The matrix [side, side] that blurs a column, 0 beyond its ends."""
    margin = blur // 2
    return np.stack([np.pad(_kernel(blur), (i, side - 1 - i))[margin : margin + side] for i in range(side)])


def _kernel(blur: int) -> Points:
    """OpenCV's Gaussian of this many cells."""
    return cv2.getGaussianKernel(blur, 0)[:, 0].astype(np.float64)
