"""Picture files as they come: too large, cut off, or no pictures at all."""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tasks import distributed
from tasks.errors import UserError

# A few kilobytes can unpack to gigabytes. Phones take pictures of 200 million pixels, scanners of more.
MAX_PIXELS = 250_000_000
Image.MAX_IMAGE_PIXELS = MAX_PIXELS
# Above, Pillow warns, and refuses twice that: the warning is enough to refuse.
warnings.simplefilter("error", Image.DecompressionBombWarning)

_TURNED = {5, 6, 7, 8}  # EXIF's orientations that swap width and height
_broken: dict[str, str | None] = {}  # what has been read in this process: name -> what is wrong


@contextmanager
def named(name: object) -> Iterator[None]:
    """Errors in reading a picture name it.

    Raises:
        UserError: it cannot be read.
    """
    if isinstance(name, Path) and name.exists() and not name.is_file():  # a pipe would keep its reader waiting for ever
        raise UserError(f"{name}: not a readable picture (it is no regular file); task.skip_broken=True trains without such")
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders raise anything
        what = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"{name}: not a readable picture ({what}); task.skip_broken=True trains without such") from error


def check(content: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """Look at a picture's header and end before it is unpacked.

    Raises:
        Exception: no picture, too many pixels, or cut off.
    """
    Image.MAX_IMAGE_PIXELS = max(MAX_PIXELS, max_pixels)
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = image.width * image.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{str(error).partition(',')[0]}; task.max_pixels= allows more") from error
    except UnidentifiedImageError as error:
        raise ValueError("it is empty" if not content else "it is no picture") from error
    if pixels > max_pixels:
        raise ValueError(f"Image size ({pixels} pixels) exceeds limit of {max_pixels} pixels; task.max_pixels= allows more")
    # Decoders fill up what is missing, in grey, and say nothing.
    if (content.startswith(b"\xff\xd8") and not _ends(content)) or (content.startswith(b"\x89PNG") and b"IEND" not in content):
        raise ValueError("it is cut off")


def _ends(jpeg: bytes) -> bool:
    """Has a JPEG file its end marker? Phones write a video behind it, and a smaller picture, with its own, in front."""
    place = 2
    while 0 <= place < len(jpeg) - 3 and jpeg[place] == 0xFF:
        marker = jpeg[place + 1]
        if marker == 0xDA:  # the pixels, among which the end marker cannot stand for anything else
            return jpeg.find(b"\xff\xd9", place) >= 0
        alone = marker == 0x01 or 0xD0 <= marker <= 0xD8
        place += 1 if marker == 0xFF else 2 if alone else 2 + int.from_bytes(jpeg[place + 2 : place + 4], "big")
    return False


def size(path: Path) -> tuple[int, int]:
    """Width and height of a picture as it is shown, from its header.

    Raises:
        UserError: missing, or no picture.
    """
    with named(path), Image.open(path) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(0x0112) in _TURNED else (width, height)


def readable(names: list[str], read: Callable[[int], Any], workers: int = 1) -> list[bool]:
    """Which of the pictures can be read. The others are counted and listed on stderr, once.

    Args:
        names: of the files.
        read: called with the place of a name in the list; raises UserError.
        workers: threads that read.
    """
    new = [place for place, name in enumerate(names) if name not in _broken]

    def wrong(place: int) -> str | None:
        try:
            read(place)
        except UserError as error:
            return str(error).partition("; task.skip_broken")[0]
        return None

    with ThreadPoolExecutor(workers) as pool:
        found = dict(zip((names[place] for place in new), pool.map(wrong, new), strict=True))
    _broken.update(found)
    lines = [line for line in found.values() if line is not None]
    if lines and distributed.rank() == 0:
        print(f"warning: {len(lines)} of {len(found)} pictures are left out:", *lines, sep="\n  ", file=sys.stderr, flush=True)
    return [_broken[name] is None for name in names]


def inside(folder: Path, name: Any, source: Path) -> str:
    """The path of a file that a data set names, which must lie in its folder.

    Raises:
        UserError: it does not.
    """
    # A Path for each of a hundred thousand names would take seconds.
    if not isinstance(name, str) or not name or os.path.isabs(name) or ".." in name.split(os.sep) or "\0" in name:
        raise UserError(f"{source}: file_name {name!r} must name a file below {folder}")
    return os.path.join(folder, name)


# ImageNet's mean and standard deviation in RGB, of pixels from 0 to 1: what most of timm's and mmpose's weights are used to
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalised(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 [B, c, h, w] as the network takes it: (x / 255 - mean) / std, channel by channel."""
    shift, scale = (255 * torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (mean, std))
    return (images.float() - shift) / scale
