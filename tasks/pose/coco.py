"""COCO's JSON as people write it: pictures, categories and the joints that these name, ids of any kind.

# P pictures
"""

from __future__ import annotations

import gc
import json
import os
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasks import pictures
from tasks.errors import UserError
from tasks.pose import joint_sets
from tasks.pose.joints import Joints

BAD = (KeyError, TypeError, ValueError, AttributeError, OverflowError)  # what content that is not COCO's runs into


@dataclass(frozen=True)
class Categories:
    """Whose joints a file holds.

    Args:
        ids: of the categories that count; empty: all.
        joints: that they name; None where they name none.
        names: of the file's categories by id.
        boxes: ids of a detector's boxes that count.
    """

    ids: tuple[Any, ...]
    joints: Joints | None
    names: dict[Any, str]
    boxes: tuple[Any, ...]


def read_json(path: Path, how: str, hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parse a JSON file.

    Args:
        path: the file.
        how: where to get it, for the error.
        hook: called with each object; what it returns takes the object's place.

    Raises:
        UserError: missing or broken.
    """
    try:
        content = path.read_bytes()
        text = content.decode(json.detect_encoding(content), "surrogatepass")
        del content  # twice hundreds of megabytes are more than once
        with uncollected():
            return json.loads(text, object_hook=hook)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {how}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error


@contextmanager
def uncollected() -> Iterator[None]:
    """Without garbage collection, which would look through millions of objects again and again."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _trimmed(content: dict[str, Any]) -> dict[str, Any]:
    """Without outlines, which are most of a COCO file, without the pictures' addresses, and with joints in little room."""
    content.pop("segmentation", None)
    values = content.get("keypoints")
    if isinstance(values, list) and "image_id" in content:
        with suppress(TypeError, OverflowError):  # null, or no numbers, which is judged later
            content["keypoints"] = array("d", values)
    if "file_name" in content and "id" in content:
        return {name: content[name] for name in ("id", "file_name", "width", "height") if name in content}
    return content


def stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does: of a cached reading."""
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else (0, 0)


_contents: dict[Path, tuple[tuple[int, int], dict[str, Any]]] = {}


def forget(path: Path) -> None:
    """Keep a file's content no longer: hundreds of megabytes, of COCO's training split."""
    _contents.pop(path, None)


def content(path: Path, stamp: tuple[int, int], how: str) -> dict[str, Any]:
    """A COCO file's content but for outlines, kept until it is forgotten.

    Args:
        path: the file.
        stamp: of the file now; a content of another stamp is read anew.
        how: where to get it, for the error.

    Raises:
        UserError: missing, broken, or without a list of images.
    """
    if path not in _contents or _contents[path][0] != stamp:
        _contents[path] = stamp, _content(path, how)
    return _contents[path][1]


def _content(path: Path, how: str) -> dict[str, Any]:
    found = read_json(path, how, _trimmed)
    if not isinstance(found, dict) or not isinstance(found.get("images"), list):
        raise UserError(f"{path}: not a COCO annotation file: it lacks a list of images or annotations")
    if not isinstance(found.get("annotations", []), list):
        raise UserError(f"{path}: not a COCO annotation file: its annotations are no list")
    return found


def categories(content: dict[str, Any], category: Any, source: Path) -> Categories:
    """The categories that count, and the joints that they name.

    Raises:
        UserError: none is `category`, several name different joints, or what they name is no joint set.
    """
    try:
        return _categories(content, category, source)
    except BAD as error:
        raise UserError(f"{source}: its categories name no joint set: {error}") from error


def _categories(content: dict[str, Any], category: Any, source: Path) -> Categories:
    listed = [entry for entry in content.get("categories") or [] if isinstance(entry, dict) and "id" in entry]
    names = {hashable(entry["id"]): str(entry.get("name", entry["id"])) for entry in listed}
    if category is None:
        chosen = [entry for entry in listed if entry.get("keypoints")]
    else:
        chosen = [entry for entry in listed if str(category) in (str(entry["id"]), str(entry.get("name")))]
        if not chosen:
            raise UserError(f"{source}: has no category {category}; task.category may be one of {', '.join(names.values())}")
    sets = {tuple(map(str, entry["keypoints"])) for entry in chosen if entry.get("keypoints")}
    if len(sets) > 1:
        several = ", ".join(f"{entry.get('name')} ({len(entry['keypoints'])})" for entry in chosen if entry.get("keypoints"))
        raise UserError(f"{source}: several categories name different keypoints: {several}; choose one with task.category=")
    first = next((entry for entry in chosen if entry.get("keypoints")), None)
    ids = tuple(entry["id"] for entry in chosen)
    people = tuple(number for number, name in names.items() if name.lower() == "person" or len(names) == 1)
    return Categories(ids, None if first is None else _joints_of(first), names, ids or people or (1,))


def _joints_of(entry: dict[str, Any]) -> Joints:
    """A category's joints; a ready set where it has one's names, with its sigmas."""
    names = tuple(map(str, entry["keypoints"]))
    ready = joint_sets.known(names)
    if ready is not None:
        return ready
    return Joints(names, limbs=_limbs(entry.get("skeleton"), names))


def _limbs(skeleton: Any, names: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """The pairs of a skeleton, of numbers or of names; what is none is left out, since limbs are but drawn."""
    places = {name: place for place, name in enumerate(names, start=1)}
    listed = [pair for pair in skeleton if isinstance(pair, list) and len(pair) == 2] if isinstance(skeleton, list) else []
    pairs = [[places.get(end) if isinstance(end, str) else end for end in pair] for pair in listed]
    numbered = [(a, b) for a, b in pairs if isinstance(a, int) and isinstance(b, int)]
    first = 0 if any(0 in pair for pair in numbered) else 1  # COCO counts from 1; some converters do not
    limbs = [(a - first, b - first) for a, b in numbered]
    return tuple(limb for limb in limbs if all(0 <= k < len(names) for k in limb))


def images(
    listed: list[Any], folder: Path, source: Path, lenient: bool
) -> tuple[list[Any], NDArray[np.bytes_], NDArray[np.int64]]:
    """Ids, files and sizes of a COCO file's images; sizes that it lacks are the pictures' own.

    Raises:
        UserError: an image without id or file_name, two of one id, or one whose file lies elsewhere.
    """
    try:
        ids = [hashable(image["id"]) for image in listed]
        files = [pictures.inside(folder, image["file_name"], source) for image in listed]
        sizes = np.array([(_side(image, "width"), _side(image, "height")) for image in listed], dtype=np.int64).reshape(-1, 2)
    except BAD as error:
        wanted = "each of its images needs an id and a file_name"
        raise UserError(f"{source}: not a COCO annotation file, {wanted}: {type(error).__name__} {error}") from error
    seen: dict[Any, str] = {}
    for number, file in zip(ids, files, strict=True):
        if seen.setdefault(number, file) != file:
            raise UserError(f"{source}: two images have the id {number}, {Path(seen[number]).name} and {Path(file).name}")
    for place in np.flatnonzero((sizes <= 0).any(axis=1)):
        try:
            sizes[place] = pictures.size(Path(files[place]))
        except UserError:
            if not lenient:
                raise
    return ids, np.array([os.fsencode(file) for file in files] or np.empty(0, dtype="S1")), sizes


def _side(image: dict[str, Any], name: str) -> int:
    """Width or height; 0 where the file does not know."""
    try:
        return int(float(image.get(name) or 0))
    except (TypeError, ValueError, OverflowError):
        return 0


def hashable(value: Any) -> Any:
    """An id as a key: lists and objects are none."""
    if isinstance(value, (list, dict)):
        raise TypeError(f"an id must be a number or a text, got {value}")
    return value


def lookup(ids: list[Any]) -> Callable[[Any], int | None]:
    """From an id to its place in the list, or None; 5, 5.0 and "5" are the same where the list has no two of them."""
    places = {number: place for place, number in enumerate(ids)}
    texts = {str(number): place for number, place in places.items()}

    def find(number: Any) -> int | None:
        place = places.get(hashable(number))
        if place is None:
            whole = isinstance(number, float) and number.is_integer()
            place = texts.get(str(int(number) if whole else number))
        return place

    return find
