"""Codecs: what a network is taught of a person's joints, and how its answer becomes coordinates again.

# B batch, K keypoints, H W heatmap, h w crop; sizes are (width, height), coordinates (x, y) in pixels of the crop
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Heatmap:
    """One Gaussian heatmap per joint (MSRA, arXiv 1804.06208), read back at its maximum.

    The peak is 1 and the radius 3 sigma. As published, the Gaussian is centred on the nearest cell and the maximum moved
    a quarter of a cell towards its larger neighbour. ``unbiased`` is DARK (arXiv 1910.06278): the Gaussian is centred on
    the joint itself, and the maximum of the blurred log-heatmap is found by a Newton step (eq. 9).

    Args:
        input_size: (w, h) of the crop.
        heatmap_size: (W, H).
        sigma: of the Gaussian in heatmap cells, > 0.
        unbiased: DARK encoding and decoding.
        blur: side of DARK's blur in cells, odd; 11 goes with sigma 2, 17 with sigma 3.
    """

    input_size: tuple[int, int] = (192, 256)
    heatmap_size: tuple[int, int] = (48, 64)
    sigma: float = 2.0
    unbiased: bool = False
    blur: int = 11

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise ValueError(f"sigma must be > 0, got {self.sigma}")
        if self.blur < 3 or self.blur % 2 == 0:
            raise ValueError(f"blur must be odd and >= 3, got {self.blur}")

    @property
    def _stride(self) -> NDArray[np.float64]:
        return np.array(self.input_size, dtype=np.float64) / self.heatmap_size

    def encode(self, keypoints: Array, labelled: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Heatmaps of one person.

        Args:
            keypoints: [K, 2], anywhere, also outside the crop.
            labelled: [K].

        Returns:
            Heatmaps [K, H, W] and weights [K]: 0 for joints that are not labelled, or whose Gaussian misses the heatmap.
        """
        width, height = self.heatmap_size
        centre = keypoints / self._stride
        if not self.unbiased:
            centre = (centre + 0.5).astype(np.int64).astype(np.float64)
            radius = float(int(3 * self.sigma))
        else:
            radius = 3 * self.sigma
        low, high = centre - radius, centre + radius + 1
        reaches = (low[:, 0] < width) & (low[:, 1] < height) & (high[:, 0] >= 0) & (high[:, 1] >= 0)
        weights = (labelled & reaches).astype(np.float32)
        # The Gaussian factors into columns and rows; cells beyond the radius stay 0 in the biased form.
        profiles = []
        for axis, size in enumerate((width, height)):
            offset = np.arange(size)[None, :] - centre[:, axis : axis + 1]
            profile = np.exp(-(offset**2) / (2 * self.sigma**2))
            profiles.append(profile if self.unbiased else np.where(np.abs(offset) <= radius, profile, 0.0))
        columns, rows = profiles
        heatmaps = rows[:, :, None] * columns[:, None, :] * weights[:, None, None]
        return heatmaps.astype(np.float32), weights

    def decode(self, heatmaps: Array) -> tuple[Array, Array]:
        """Coordinates and scores of a batch.

        Args:
            heatmaps: [B, K, H, W].

        Returns:
            Keypoints [B, K, 2] and scores [B, K], the maxima. A map without a positive value gives the cell (-1, -1).
        """
        batch, joints, height, width = heatmaps.shape
        maps = heatmaps.reshape(-1, height, width)
        flat = maps.reshape(len(maps), -1)
        place = flat.argmax(axis=1)
        scores = flat[np.arange(len(maps)), place]
        cells = np.stack([place % width, place // width], axis=1)
        cells[scores <= 0] = -1
        offsets = self._newton(maps, cells) if self.unbiased else self._quarter(maps, cells)
        keypoints = (cells + offsets) * self._stride
        return keypoints.reshape(batch, joints, 2).astype(np.float32), scores.reshape(batch, joints)

    @staticmethod
    def _quarter(maps: Array, cells: NDArray[np.int64]) -> NDArray[np.float64]:
        height, width = maps.shape[1:]
        offsets = np.zeros(cells.shape)
        x, y = cells.T
        # The reference leaves the first two and the last column alone along x, and any border cell along the other axis.
        m = np.flatnonzero((x > 1) & (x < width - 1) & (y > 0) & (y < height))
        offsets[m, 0] = 0.25 * np.sign(maps[m, y[m], x[m] + 1] - maps[m, y[m], x[m] - 1])
        m = np.flatnonzero((y > 1) & (y < height - 1) & (x > 0) & (x < width))
        offsets[m, 1] = 0.25 * np.sign(maps[m, y[m] + 1, x[m]] - maps[m, y[m] - 1, x[m]])
        return offsets

    def _newton(self, maps: Array, cells: NDArray[np.int64]) -> NDArray[np.float64]:
        height, width = maps.shape[1:]
        offsets = np.zeros(cells.shape)
        for m, (x, y) in enumerate(cells):
            if not (1 < x < width - 2 and 1 < y < height - 2):
                continue
            blurred = cv2.GaussianBlur(maps[m], (self.blur, self.blur), 0, borderType=cv2.BORDER_CONSTANT)
            if not blurred.max() > 0:
                continue  # a lone positive cell among negative ones, as before training
            blurred *= maps[m].max() / blurred.max()
            p = np.log(np.maximum(blurred[y - 2 : y + 3, x - 2 : x + 3], 1e-10)).astype(np.float64)
            gradient = 0.5 * np.array([p[2, 3] - p[2, 1], p[3, 2] - p[1, 2]])
            xy = 0.25 * (p[3, 3] - p[1, 3] - p[3, 1] + p[1, 1])
            xx, yy = 0.25 * (p[2, 4] - 2 * p[2, 2] + p[2, 0]), 0.25 * (p[4, 2] - 2 * p[2, 2] + p[0, 2])
            determinant = xx * yy - xy * xy
            if determinant != 0:
                hessian_inverse = np.array([[yy, -xy], [-xy, xx]]) / determinant
                offsets[m] = -hessian_inverse @ gradient
        return offsets
