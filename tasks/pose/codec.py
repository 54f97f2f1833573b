"""Codecs: what a network is taught of a person's joints, by which loss, and how its answer becomes coordinates again.

All have the same methods: `encode` and `decode`, `loss`, and `unmirror` for the flip test.

# B batch, K keypoints, H W heatmap, h w crop; sizes are (width, height), coordinates (x, y) in pixels of the crop
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

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
        shift_heatmap: move the mirror image's heatmaps one cell to the right before they are averaged. A joint at x is at
            w - 1 - x in the mirror, which is no whole number of cells away: without the shift, flipping moves the average
            3/8 of a cell to the left; with it, 1/8 to the right. On as in mmpose's HRNet configs.
    """

    input_size: tuple[int, int] = (192, 256)
    heatmap_size: tuple[int, int] = (48, 64)
    sigma: float = 2.0
    unbiased: bool = False
    blur: int = 11
    shift_heatmap: bool = True

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

    def loss(self, heatmaps: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Mean squared error over all cells of all heatmaps; those of joints without a weight count as 0."""
        return ((heatmaps - target).square() * weight[:, :, None, None]).mean()

    def unmirror(self, heatmaps: Tensor) -> Tensor:
        """Heatmaps [B, K, H, W] of mirrored crops where they lie in the crops themselves; the joints stay swapped."""
        heatmaps = heatmaps.flip(3)
        return torch.cat([heatmaps[..., :1], heatmaps[..., :-1]], dim=3) if self.shift_heatmap else heatmaps

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
        """The Newton step on the blurred log-heatmap, of which only the 5x5 cells around each maximum are made."""
        height, width = maps.shape[1:]
        offsets = np.zeros(cells.shape)
        x, y = cells.T
        m = np.flatnonzero((x > 1) & (x < width - 2) & (y > 1) & (y < height - 2))
        margin = self.blur // 2
        # 0 beyond the border, as the blur of the whole map has it
        padded = np.pad(maps[m], ((0, 0), (margin, margin), (margin, margin)))
        side = np.arange(2 * margin + 5) - 2
        windows = padded[np.arange(len(m))[:, None, None], y[m, None, None] + side[:, None], x[m, None, None] + side]
        kernel = cv2.getGaussianKernel(self.blur, 0)[:, 0]
        blur = np.stack([np.pad(kernel, (i, 4 - i)) for i in range(5)])
        p = np.log(np.maximum(blur @ windows @ blur.T, 1e-10))
        gradient = 0.5 * np.stack([p[:, 2, 3] - p[:, 2, 1], p[:, 3, 2] - p[:, 1, 2]], axis=1)
        xy = 0.25 * (p[:, 3, 3] - p[:, 1, 3] - p[:, 3, 1] + p[:, 1, 1])
        xx = 0.25 * (p[:, 2, 4] - 2 * p[:, 2, 2] + p[:, 2, 0])
        yy = 0.25 * (p[:, 4, 2] - 2 * p[:, 2, 2] + p[:, 0, 2])
        determinant = xx * yy - xy * xy
        some = determinant != 0
        adjugate = np.stack([np.stack([yy, -xy], 1), np.stack([-xy, xx], 1)], 1)[some]
        offsets[m[some]] = -(adjugate @ gradient[some, :, None])[..., 0] / determinant[some, None]
        return offsets


@dataclass(frozen=True)
class SimCC:
    """Two classifications per joint, of its column and of its row in bins finer than a pixel (arXiv 2107.03332).

    A network answers with [K, W + H] logits: W bins of columns, then H of rows. The labels are Gaussians around the
    nearest bin, with area 1 rather than sum 1 as in mmpose, or one-hot with label smoothing. The flip test does not shift
    by the bin that mirroring x to w - 1 - x leaves, as in mmpose: it moves joints a quarter of a pixel to the right.

    Args:
        input_size: (w, h) of the crop.
        split_ratio: bins per pixel, > 0; W and H are the crop's sides times this.
        sigma: of the Gaussians in bins, > 0, or one for each of (x, y).
        smoothing: share in [0, 1) of a label that all other bins have in common; None for Gaussian labels.
    """

    input_size: tuple[int, int] = (192, 256)
    split_ratio: float = 2.0
    sigma: float | tuple[float, float] = 6.0
    smoothing: float | None = None

    def __post_init__(self) -> None:
        if not min(self._sigmas) > 0:
            raise ValueError(f"sigma must be > 0, got {self.sigma}")
        if not self.split_ratio > 0:
            raise ValueError(f"split_ratio must be > 0, got {self.split_ratio}")
        if self.smoothing is not None and not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must lie in [0, 1), got {self.smoothing}; None is for Gaussian labels")

    @property
    def bins(self) -> tuple[int, int]:
        """W and H, the numbers of columns and rows."""
        width, height = self.input_size
        return round(width * self.split_ratio), round(height * self.split_ratio)

    @property
    def _sigmas(self) -> tuple[float, float]:
        return self.sigma if isinstance(self.sigma, tuple) else (self.sigma, self.sigma)

    def encode(self, keypoints: Array, labelled: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Labels of one person.

        Args:
            keypoints: [K, 2], anywhere, also outside the crop.
            labelled: [K].

        Returns:
            Labels [K, W + H] and weights [K]: 0 for joints that are not labelled, or whose label misses the crop.
        """
        centre = np.around(keypoints * self.split_ratio).astype(np.int64)
        reach = np.zeros(2) if self.smoothing is not None else 3 * np.array(self._sigmas)
        low, high = centre - reach, centre + reach + (self.smoothing is None)
        weights = (labelled & (low < self.bins).all(axis=1) & (high >= 0).all(axis=1)).astype(np.float32)
        labels = []
        for axis, (count, sigma) in enumerate(zip(self.bins, self._sigmas, strict=True)):
            offset = np.arange(count)[None, :] - centre[:, axis : axis + 1]
            if self.smoothing is None:
                label = np.exp(-(offset**2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
            else:
                label = np.where(offset == 0, 1 - self.smoothing, self.smoothing / (count - 1))
            labels.append(label * weights[:, None])
        return np.concatenate(labels, axis=1).astype(np.float32), weights

    def loss(self, logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """KL divergence of the predicted distributions from the labels, by mmpose's reduction.

        L = sum_b sum_k weight_bk (mean_i KL_x + mean_j KL_y) / K, the mean over bins and the *sum* over the batch.
        """
        loss = logits.new_zeros(())
        for q, p in zip(logits.split(self.bins, dim=2), target.split(self.bins, dim=2), strict=True):
            divergence = nn.functional.kl_div(q.log_softmax(dim=2), p, reduction="none").mean(dim=2)
            loss = loss + (divergence * weight).sum()
        return loss / weight.shape[1]

    def unmirror(self, logits: Tensor) -> Tensor:
        """Logits [B, K, W + H] of mirrored crops, as of the crops themselves; the joints stay swapped."""
        columns, rows = logits.split(self.bins, dim=2)
        return torch.cat([columns.flip(2), rows], dim=2)

    def decode(self, logits: Array) -> tuple[Array, Array]:
        """Coordinates and scores of a batch.

        Args:
            logits: [B, K, W + H].

        Returns:
            Keypoints [B, K, 2] and scores [B, K], the smaller of the two largest logits. A joint whose score is not
            positive gets the bins (-1, -1).
        """
        axes = np.split(logits, [self.bins[0]], axis=2)
        scores = np.minimum(*(axis.max(axis=2) for axis in axes))
        place = np.stack([axis.argmax(axis=2) for axis in axes], axis=2)
        place[scores <= 0] = -1
        return (place / self.split_ratio).astype(np.float32), scores


Codec = Heatmap | SimCC
