"""Which output of the network a picture's class is: by name, never by its place in a folder."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from tasks.errors import UserError

_MOST = 3  # names in a message


@lru_cache(maxsize=1)
def imagenet() -> tuple[str, ...]:
    """ImageNet's 1,000 synsets, in the order of pretrained heads."""
    from timm.data.imagenet_info import ImageNetInfo

    return tuple(ImageNetInfo("imagenet-1k").label_names())


def outputs(names: tuple[str, ...], classes: int) -> tuple[str, ...]:
    """The names of a network's outputs, where these are training's classes: of 1,000, ImageNet's, if they are some of them."""
    return imagenet() if classes == 1000 and set(names) <= set(imagenet()) else names


def mapping(names: tuple[str, ...] | None, known: tuple[str, ...] | None, where: Any) -> list[int] | None:
    """The network's label of each of a split's classes; None: as they are.

    Args:
        names: of the split's classes, in order; None: it tells none.
        known: of the network's outputs; None: nobody knows.
        where: the split, for errors.

    Raises:
        UserError: a class that the network does not know.
    """
    if names is None or known is None or names == known:
        return None
    places = {name: place for place, name in enumerate(known)}
    strangers = [name for name in names if name not in places]
    if strangers:
        listed = ", ".join(map(repr, strangers[:_MOST])) + (f" and {len(strangers) - _MOST} more" if strangers[_MOST:] else "")
        few = ", ".join(map(repr, known[:_MOST])) + (", ..." if known[_MOST:] else "")
        raise UserError(f"{where}: its class {listed} is none that the network was trained on ({few}); rename or remove it")
    return [places[name] for name in names]
