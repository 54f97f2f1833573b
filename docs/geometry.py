"""Draw docs/geometry.png, the pose pipeline's geometry, with the pipeline's own functions: python docs/geometry.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from matplotlib.patches import Polygon, Rectangle

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks.pose import draw, sample, transforms
from tasks.pose.codec import Heatmap, SimCC

SIZE, JOINT = (192, 256), 9  # the left wrist


def main() -> None:
    """Three panels: from the picture to the crop, the crop and its targets, the mirror image's cells."""
    picture, joints, mask = sample.draw(np.random.default_rng(11))
    picture = picture[..., ::-1].copy()
    ys, xs = np.nonzero(mask)
    box = np.array([xs.min(), ys.min(), np.ptp(xs), np.ptp(ys)], dtype=np.float64)
    centre, extent = transforms.box_to_centre(box)
    fitted = transforms.fit_aspect(extent, SIZE)
    figure = matplotlib.figure.Figure(figsize=(13, 4.8), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1, 1.1))

    left.imshow(picture, origin="upper")
    for corner, size, colour, text in (
        (box[:2], box[2:], "white", "box"),
        (centre - extent / 2, extent, "#ffd000", f"x {transforms.PADDING}"),
        (centre - fitted / 2, fitted, "#ff4080", "aspect of the crop"),
    ):
        left.add_patch(Rectangle(tuple(corner), *size, fill=False, edgecolor=colour, linewidth=2, label=text))
    rotated = transforms.affine(centre, fitted, 25.0, SIZE)
    corners = np.array([[0, 0], [SIZE[0], 0], SIZE, [0, SIZE[1]]], dtype=np.float64)
    back = (corners - rotated[:, 2]) @ np.linalg.inv(rotated[:, :2]).T
    left.add_patch(Polygon(back, fill=False, edgecolor="#ff4080", linestyle=":", label="turned by 25 degrees"))
    left.plot(*centre, "+", color="white", markersize=12)
    left.legend(loc="lower left", fontsize=8, facecolor="#404040", labelcolor="white")
    margin = np.array([[-45, 45], [45, -45]])
    left.set(xlim=(margin[0, 0], picture.shape[1] + margin[0, 1]), ylim=(picture.shape[0] + margin[1, 0], margin[1, 1]))
    left.set_title("picture: pixel centres are whole numbers")

    matrix = transforms.affine(centre, fitted, 0.0, SIZE)
    points = transforms.apply(matrix, joints)
    crop = draw.skeleton(transforms.crop(picture, matrix, SIZE), points, np.ones(17), thick=2)
    heatmap = Heatmap(SIZE, (48, 64), sigma=2.0).encode(points.astype(np.float32), np.ones(17, bool))[0][JOINT]
    labels = SimCC(SIZE).encode(points.astype(np.float32), np.ones(17, bool))[0][JOINT]
    middle.imshow(crop)
    shown: Any = np.ma.masked_less(heatmap, 0.02)
    middle.imshow(shown, extent=(-2, SIZE[0] - 2, SIZE[1] - 2, -2), cmap="autumn", alpha=0.75)
    columns, rows = labels[: 2 * SIZE[0]], labels[2 * SIZE[0] :]
    middle.plot(np.arange(2 * SIZE[0]) / 2, SIZE[1] + 30 - 25 * columns / columns.max(), color="#0060c0")
    middle.plot(SIZE[0] + 5 + 25 * rows / rows.max(), np.arange(2 * SIZE[1]) / 2, color="#0060c0")
    middle.text(SIZE[0] - 4, SIZE[1] + 18, "SimCC: 384 columns", fontsize=8, color="#0060c0", ha="right")
    middle.text(SIZE[0] + 12, SIZE[1] - 8, "512 rows", fontsize=8, color="#0060c0", rotation=-90, va="bottom")
    middle.set(xlim=(-3, SIZE[0] + 36), ylim=(SIZE[1] + 36, -3))
    middle.set_title("crop 192x256: x' = s R (x - c) + (96, 128)\nheatmap of a wrist, 48x64 cells of 4 pixels", fontsize=10)

    width, x = 24, 9.0
    for y, at, text in (
        (3.0, x, "the joint, at pixel x = 9"),
        (2.0, width - 1 - x, "in the mirror image, at 23 - x"),
        (1.0, 4 * (width // 4 - 1 - (width - 1 - x) / 4), "turned back cell by cell: 3/4 of a cell too far left"),
        (0.0, 4 * (width // 4 - (width - 1 - x) / 4), "and shifted by a cell: 1/4 of a cell too far right"),
    ):
        for cell in range(width // 4):
            right.add_patch(Rectangle((4 * cell - 2, y - 0.18), 4, 0.36, fill=False, edgecolor="#909090"))
            right.plot(4 * cell, y, "|", color="#909090")
        right.plot(at, y, "o", color="#ff4080")
        right.text(-2, y + 0.26, text, fontsize=9)
    right.axvline(x, color="#ff4080", linewidth=0.7, linestyle=":")
    right.set(
        xlim=(-3, 23), ylim=(-0.5, 3.6), yticks=[], xlabel="pixels of a crop 24 wide; cells of 4, centred on 0, 4, 8, ..."
    )
    right.set_title("flip test: the average of the first row and the last")
    figure.savefig(Path(__file__).with_name("geometry.png"), dpi=80)


if __name__ == "__main__":
    main()
