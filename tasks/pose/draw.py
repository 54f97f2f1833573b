"""Poses drawn on pictures, contact sheets of them, and the picture of the errors.

# K keypoints; pictures [height, width, 3] uint8 RGB
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tasks import folder
from tasks.pose.joints import COCO, Joints

Picture = NDArray[np.uint8]
Array = NDArray[np.float64]
Colour = tuple[int, int, int]

# Orange and blue are told apart by everybody, and so is their neighbour in lightness between them.
LEFT, RIGHT, MIDDLE = (255, 140, 0), (0, 170, 255), (224, 130, 190)
WHITE, DARK = (255, 255, 255), (25, 25, 25)
_SHIFT = 4  # drawing with sub-pixel coordinates: fractional bits
_TEXT, _LINE = 0.55, 26  # size of titles, and the height of their bars in pixels
_FAINT = 0.3  # opacity of a joint that is not sure at all


def skeleton(
    picture: Picture,
    keypoints: Array,
    scores: Array,
    joints: Joints = COCO,
    *,
    thick: float = 2.0,
    colour: Colour | None = None,
) -> Picture:
    """Draw one pose; the surer a joint, the more opaque.

    Args:
        picture: left as it is.
        keypoints: [K, 2].
        scores: [K], 1 and more is opaque; joints of a negative score are left out.
        joints: whose limbs and sides are drawn.
        thick: of the limbs in pixels.
        colour: of all; None: orange for the person's left, blue for the right, pink between.

    Returns:
        A new picture.
    """
    picture = picture.copy()
    opacity = np.where(scores < 0, 0.0, _FAINT + (1 - _FAINT) * np.clip(scores, 0.0, 1.0))
    for a, b in joints.limbs:
        paint = colour or _colour(joints, a, b)
        _blended(picture, keypoints[[a, b]], thick, min(opacity[a], opacity[b]), paint)
    for k, point in enumerate(keypoints):
        _blended(picture, point[None], 1.3 * thick, opacity[k], colour or _colour(joints, k))
    return picture


def _colour(joints: Joints, *which: int) -> Colour:
    """Of a limb or joint."""
    return (LEFT, MIDDLE, RIGHT)[joints.side(*which) + 1]


def _blended(picture: Picture, points: Array, thick: float, opacity: float, colour: Colour) -> None:
    """Draw a line or, of one point, a disc, in place."""
    if opacity <= 0 or not np.isfinite(points).all():
        return
    height, width = picture.shape[:2]
    low = np.maximum(np.floor(points.min(axis=0) - 2 * thick - 2), 0).astype(int)
    high = np.minimum(np.ceil(points.max(axis=0) + 2 * thick + 3), (width, height)).astype(int)
    if (high <= low).any():
        return
    part = picture[low[1] : high[1], low[0] : high[0]]
    layer = part.copy()
    places = [((point - low) * 2**_SHIFT).round().astype(int).tolist() for point in points]
    if len(points) == 1:
        cv2.circle(layer, places[0], max(int(thick * 2**_SHIFT), 2**_SHIFT), colour, -1, cv2.LINE_AA, _SHIFT)
    else:
        cv2.line(layer, places[0], places[1], colour, max(round(thick), 1), cv2.LINE_AA, _SHIFT)
    part[:] = cv2.addWeighted(layer, opacity, part, 1 - opacity, 0)


def label(picture: Picture, text: str, at: tuple[float, float], size: float = 0.45) -> None:
    """Write white text on a dark ground, in place; its lower left corner at a point, moved into the picture."""
    (width, _), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, size, 1)
    (_, height), below = cv2.getTextSize("Ag", cv2.FONT_HERSHEY_SIMPLEX, size, 1)  # whatever the letters, one base line
    x = int(np.clip(at[0], 0, max(picture.shape[1] - width - 4, 0)))
    y = int(np.clip(at[1], height + below + 2, max(picture.shape[0], height + below + 2)))
    cv2.rectangle(picture, (x, y - height - below - 2), (x + width + 4, y), DARK, -1)
    cv2.putText(picture, text, (x + 2, y - below), cv2.FONT_HERSHEY_SIMPLEX, size, WHITE, 1, cv2.LINE_AA)


def poses(
    picture: Picture, found: list[dict[str, Any]], joints: Joints = COCO, *, threshold: float = 0.0, enlarge: bool = True
) -> Picture:
    """All poses of a picture with their scores.

    Args:
        picture: of any size.
        found: COCO keypoint results of this picture.
        joints: their set.
        threshold: joints of a lower score are left out.
        enlarge: small pictures, before they are drawn on.
    """
    factor = max(1, round(480 / min(picture.shape[:2]))) if enlarge else 1
    if factor > 1:
        picture = cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_CUBIC)  # type: ignore[assignment]
    for pose in sorted(found, key=lambda pose: pose["score"]):
        triples = np.array(pose["keypoints"]).reshape(-1, 3)
        points = triples[:, :2] * factor + (factor - 1) / 2
        thick = float(np.clip(np.ptp(points, axis=0).max() / 90, 1.5, 8))
        sure = triples[:, 2] >= threshold
        picture = skeleton(picture, points, np.where(sure, triples[:, 2], -1.0), joints, thick=thick)
        if not sure.any():
            continue
        top = points[sure][points[sure][:, 1].argmin()]
        label(picture, f"{pose['score']:.2f}", (top[0] - 14, top[1] - 8))
    return picture


def side_by_side(pictures: list[tuple[str, Picture]]) -> Picture:
    """Pictures of one size beside each other, each under its title."""
    titled = [np.concatenate([_bar(picture.shape[1], title), picture]) for title, picture in pictures]
    gap = np.full((titled[0].shape[0], 4, 3), 255, np.uint8)
    return np.concatenate([part for picture in titled for part in (picture, gap)][:-1], axis=1)


def _bar(width: int, title: str) -> Picture:
    bar = np.full((_LINE, width, 3), DARK, np.uint8)
    label(bar, title, (4, _LINE - 3), _TEXT)
    return bar


def legend(width: int, entries: list[tuple[Colour, str]]) -> Picture:
    """A bar that says what colours mean, in as many lines as it takes."""
    places, x, line = [], 4, 0
    for _, text in entries:
        needed = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, _TEXT, 1)[0][0] + 40
        if x > 4 and x + needed > width:
            x, line = 4, line + 1
        places.append((x, line * _LINE))
        x += needed
    bar = np.full(((line + 1) * _LINE, width, 3), DARK, np.uint8)
    for (left, top), (colour, text) in zip(places, entries, strict=True):
        cv2.line(bar, (left + 3, top + _LINE // 2), (left + 17, top + _LINE // 2), colour, 4, cv2.LINE_AA)
        label(bar, text, (left + 22, top + _LINE - 3), _TEXT)
    return bar


def sides(joints: Joints) -> list[tuple[Colour, str]]:
    """The colours of a set's limbs and joints, and what they mean."""
    parts = [joints.side(*limb) for limb in joints.limbs] + [joints.side(k) for k in range(len(joints))]
    meanings = ((-1, LEFT, "the person's left"), (1, RIGHT, "the person's right"), (0, MIDDLE, "between"))
    if not any(parts):
        return [(MIDDLE, "predicted")]
    return [(colour, text) for side, colour, text in meanings if side in parts]


def contact_sheet(rows: list[tuple[str, list[tuple[str, Picture]]]]) -> Picture:
    """Tiles of one size in titled rows.

    Args:
        rows: (title, [(caption, tile), ...]) of each.
    """
    columns = max(len(tiles) for _, tiles in rows)
    strips = []
    for title, tiles in rows:
        blank = np.full_like(tiles[0][1], 255)
        shown = [tile.copy() for _, tile in tiles]
        for tile, (caption, _) in zip(shown, tiles, strict=True):
            label(tile, caption, (2, tile.shape[0] - 2), _TEXT)
        strip = np.concatenate([part for tile in [*shown, *[blank] * (columns - len(tiles))] for part in _spaced(tile)], axis=1)
        strips += [_bar(strip.shape[1], title), strip]
    return np.concatenate(strips)


def _spaced(tile: Picture) -> tuple[Picture, Picture]:
    return tile, np.full((tile.shape[0], 3, 3), 255, np.uint8)


def write(path: Path, picture: Picture) -> None:
    """As JPEG or PNG, by the name.

    Raises:
        OSError: it cannot be written.
    """
    # OpenCV ends the process at some names, and says nothing of a full disk: Python writes.
    done, content = cv2.imencode(path.suffix, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    if not done:
        raise OSError(f"{path}: cannot be encoded")
    folder.fresh(path).write_bytes(content.tobytes())


def error_picture(path: Path, report: dict[str, Any], joints: Joints = COCO) -> None:
    """Which joints fail, the PCK curve, and AP by the person's size, as a PNG.

    Args:
        path: to write.
        report: of `errors.error_report`.
        joints: its set.
    """
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(14, 4.2), layout="constrained")
    bars, curve, sizes = figure.subplots(1, 3, width_ratios=(1.5, 1, 1))
    names = [name for name in joints.names if name in report["joints"]]
    misses = [1 - report["joints"][name]["pck"] for name in names]
    colours = [tuple(c / 255 for c in _colour(joints, joints.names.index(name))) for name in names]
    bars.barh([name.replace("_", " ") for name in names], misses, color=colours)
    bars.invert_yaxis()
    bars.set(title="joints that are missed (further off than 5 % of the box)", xlim=(0, 1), xlabel="share of the labelled")
    bars.grid(axis="x", alpha=0.3)
    reach, share = report["curve"]["reach"], report["curve"]["pck"]
    curve.plot(reach, share)
    curve.fill_between(reach, share, alpha=0.15)
    curve.set(title=f"PCK, AUC {report['auc']:.3f}", xlabel="distance, share of the box's larger side", xlim=(0, reach[-1]))
    curve.set(ylim=(0, 1), ylabel="share of joints within")
    curve.grid(alpha=0.3)
    by_size = report["ap_by_size"]
    sizes.bar(list(by_size), list(by_size.values()))
    sizes.set(title="AP by size", xlabel="square root of the person's area, pixels")
    sizes.grid(axis="y", alpha=0.3)
    figure.savefig(folder.fresh(path), dpi=100)
