"""What a user names to be predicted: pictures, folders, patterns, videos; and where the answers go."""

from __future__ import annotations

import glob
from collections.abc import Iterable
from pathlib import Path

from tasks.errors import UserError

PICTURES = {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jp2", ".avif"}
VIDEOS = {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts", ".mts", ".3gp"}


def is_video(path: Path) -> bool:
    """By its name."""
    return path.suffix.lower() in VIDEOS


def expanded(words: Iterable[str]) -> list[Path]:
    """The pictures and videos that are named, each once: files as they are, folders' and patterns' in the names' order.

    Raises:
        UserError: a folder without any, or a pattern that nothing matches.
    """
    found: dict[Path, None] = {}
    for word in words:
        path = Path(word).expanduser()
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*")) if file.is_file() and _kind(file)]
            if not files:
                raise UserError(f"{path}: holds no picture and no video")
        elif not path.exists() and glob.has_magic(word):
            files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True)) if Path(name).is_file()]
            if not files:
                raise UserError(f"{word}: matches no file")
        else:
            files = [path]
        found |= dict.fromkeys(files)
    return list(found)


def _kind(path: Path) -> bool:
    return path.suffix.lower() in PICTURES | VIDEOS and not path.name.startswith(".")


def targets(inputs: list[Path], out: Path) -> list[Path]:
    """A file in the folder for each input, without a suffix: two of one name stay two, and none is an input.

    Raises:
        UserError: the folder is one of the inputs' own.
    """
    folders = {path.resolve().parent for path in inputs}
    if out.resolve() in folders:
        raise UserError(f"{out}: holds what is to be predicted, which would be overwritten; name another --out")
    taken: set[str] = set()
    found = []
    for number, path in enumerate(inputs, start=1):
        name = path.stem if sum(other.stem == path.stem for other in inputs) == 1 else f"{path.stem}-{number}"
        while name in taken:
            name += "-"
        taken.add(name)
        found.append(out / name)
    return found
