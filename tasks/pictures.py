"""Picture files as they come: too large, cut off, or no pictures at all."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tasks import distributed
from tasks.errors import UserError

# Pillow warns of a header that promises more than 89 million pixels, and refuses twice that. A few kilobytes can unpack to
# gigabytes: the warning is enough to refuse.
warnings.simplefilter("error", Image.DecompressionBombWarning)

# What the last bytes of a whole file hold. Decoders fill up what is missing, in grey, and say nothing.
_ENDS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND"}
_TAIL = 4096  # some cameras write on after the end
_broken: dict[str, str | None] = {}  # what has been read in this process: name -> what is wrong


@contextmanager
def named(name: object) -> Iterator[None]:
    """Errors in reading a picture name it.

    Raises:
        UserError: it cannot be read.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # decoders raise anything
        what = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"{name}: not a readable picture ({what}); task.skip_broken=True trains without such") from error


def check(content: bytes) -> None:
    """Look at a picture's header and end before it is unpacked.

    Raises:
        Exception: no picture, too many pixels, or cut off.
    """
    with Image.open(io.BytesIO(content)):
        pass
    for start, end in _ENDS.items():
        if content.startswith(start) and end not in content[-_TAIL:]:
            raise ValueError("it is cut off")


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


def inside(folder: Path, name: Any, source: Path) -> Path:
    """A file that a data set names, which must lie in its folder.

    Raises:
        UserError: it does not.
    """
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
        raise UserError(f"{source}: file_name {name!r} must name a file below {folder}")
    return folder / name


# ImageNet's mean and standard deviation in RGB, 0 to 255: what timm's and mmpose's weights are trained with
_MEAN = 255 * torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def normalised(images: Tensor) -> Tensor:
    """uint8 RGB [B, 3, h, w] as the network takes it."""
    return (images.float() - _MEAN.to(images.device)) / _STD.to(images.device)
