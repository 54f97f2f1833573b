"""Codecs: what a network is taught of a person's joints, by which loss, and how its answer becomes coordinates again.

All have the same methods: `encode` and `decode`, `loss`, and `unmirror` for the flip test; and `span`, the length in pixels of
the crop that a box is brought to (`tasks.pose.transforms.affine`).

# B batch, K keypoints, H W heatmap, h w crop; sizes are (width, height), coordinates (x, y) in pixels of the crop
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tasks.pose import cells

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
        _check(self.sigma, self.blur)

    @property
    def span(self) -> tuple[float, float]:
        """Pixels of the crop that the box is brought to: all of them."""
        return self.input_size

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
        centre, radius = keypoints / self._stride, None
        if not self.unbiased:
            centre, radius = (centre + 0.5).astype(np.int64).astype(np.float64), int(3 * self.sigma)
        return cells.gaussians(centre, centre, radius, self.sigma, self.heatmap_size, labelled)

    def loss(self, heatmaps: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """Mean squared error over all cells of all heatmaps; those of joints without a weight count as 0."""
        return cells.mean_squares(heatmaps, target, weight)

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
        maps, places, scores = cells.maxima(heatmaps)
        offsets = cells.newton(maps, places, self.blur) if self.unbiased else cells.quarter(maps, places)
        keypoints = (places + offsets) * self._stride
        return keypoints.reshape(*scores.shape, 2).astype(np.float32), scores


@dataclass(frozen=True)
class UDPHeatmap:
    """Heatmaps of unbiased data processing (UDP, arXiv 1911.07524), which mirror into themselves.

    Lengths are counted between the centres of the first and the last pixel: a box spans w - 1 pixels of the crop and W - 1
    cells, so that cell i lies at pixel i (w - 1) / (W - 1), and cell W - 1 - i at the mirror image of that pixel: the flip test
    needs no shift. The Gaussian is centred on the joint itself and cut 3 sigma around the nearest cell; the maximum of the
    blurred log-heatmap is found by a Newton step on its 3x3 cells.

    Args:
        input_size: (w, h) of the crop.
        heatmap_size: (W, H).
        sigma: of the Gaussian in heatmap cells, > 0.
        blur: side of the decoder's blur in cells, odd; 11 goes with sigma 2, 17 with sigma 3.
    """

    input_size: tuple[int, int] = (192, 256)
    heatmap_size: tuple[int, int] = (48, 64)
    sigma: float = 2.0
    blur: int = 11

    def __post_init__(self) -> None:
        _check(self.sigma, self.blur)

    @property
    def span(self) -> tuple[float, float]:
        """Pixels of the crop from the centre of the first to that of the last."""
        return self.input_size[0] - 1, self.input_size[1] - 1

    @property
    def _stride(self) -> NDArray[np.float64]:
        return np.array(self.span) / (np.array(self.heatmap_size) - 1)

    def encode(self, keypoints: Array, labelled: NDArray[np.bool_]) -> tuple[Array, Array]:
        """Heatmaps of one person; arguments and results as of `Heatmap.encode`."""
        centre = keypoints / self._stride.astype(np.float32)  # in 32 bits, so that ties are rounded as in the reference
        nearest = (centre + 0.5).astype(np.int64).astype(np.float64)
        exact = centre.astype(np.float64)
        return cells.gaussians(exact, nearest, int(3 * self.sigma), self.sigma, self.heatmap_size, labelled)

    def loss(self, heatmaps: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        """As of `Heatmap`."""
        return cells.mean_squares(heatmaps, target, weight)

    def unmirror(self, heatmaps: Tensor) -> Tensor:
        """Heatmaps [B, K, H, W] of mirrored crops where they lie in the crops themselves; the joints stay swapped."""
        return heatmaps.flip(3)

    def decode(self, heatmaps: Array) -> tuple[Array, Array]:
        """Coordinates and scores of a batch, as of `Heatmap.decode`."""
        maps, places, scores = cells.maxima(heatmaps)
        offsets = cells.newton_of_neighbours(maps, places, self.blur)
        keypoints = (places + offsets) * self._stride
        return keypoints.reshape(*scores.shape, 2).astype(np.float32), scores


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
    def span(self) -> tuple[float, float]:
        """Pixels of the crop that the box is brought to: all of them."""
        return self.input_size

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


def _check(sigma: float, blur: int) -> None:
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0, got {sigma}")
    if blur < 3 or blur % 2 == 0:
        raise ValueError(f"blur must be odd and >= 3, got {blur}")


Heatmaps = Heatmap | UDPHeatmap
Codec = Heatmap | UDPHeatmap | SimCC
