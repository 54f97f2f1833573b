"""Joint sets: which joints a pose has, what mirroring does to them, and how sharply each is judged.

# K joints of a set
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

SIGMA = 0.067  # the mean of COCO's: for joints of which nobody has measured how far annotators differ
_SIDES = {"left": "right", "right": "left", "l": "r", "r": "l"}
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+|[^A-Za-z\d]+")


@dataclass(frozen=True)
class Joints:
    """A joint set. What is left out is derived: pairs from left and right in the names, one sigma for all.

    Args:
        names: of the K joints, each once.
        mirrored: [K], the joint that takes a joint's place in the mirror image.
        upper: [K], True for the joints of the upper half of a body, of which training crops may be made; a set without a
            lower half is never halved.
        sigmas: [K], > 0; one value is for all: the spread of OKS, as COCO's evaluation has it.
        limbs: pairs of joints, counted from 0, that are drawn as lines.
    """

    names: tuple[str, ...]
    mirrored: tuple[int, ...] = ()
    upper: tuple[bool, ...] = ()
    sigmas: tuple[float, ...] = ()
    limbs: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        names, count = tuple(map(str, self.names)), len(self.names)
        twice = next((name for name in names if names.count(name) > 1), None)
        if not names or twice is not None:
            raise ValueError(f"a joint set needs names, each once; {twice!r} stands there twice" if names else "no joints")
        given = (self.sigmas,) if isinstance(self.sigmas, (int, float)) else self.sigmas or (SIGMA,)
        sigmas = tuple(map(float, given)) * (count if len(given) == 1 else 1)
        mirrored, upper = tuple(map(int, self.mirrored)) or partners(names), tuple(map(bool, self.upper)) or (True,) * count
        for field, values in (("mirrored", mirrored), ("upper", upper), ("sigmas", sigmas)):
            if len(values) != count:
                raise ValueError(f"{field} must have a value for each of the {count} joints, got {len(values)}")
        if sorted(mirrored) != list(range(count)) or any(mirrored[mirrored[k]] != k for k in range(count)):
            raise ValueError(f"mirrored must pair the joints: mirroring twice changes nothing; got {mirrored}")
        if not min(sigmas) > 0:
            raise ValueError(f"sigmas must be > 0, got {min(sigmas)}")
        limbs = tuple((int(a), int(b)) for a, b in self.limbs)
        if any(not 0 <= k < count for limb in limbs for k in limb):
            raise ValueError(f"limbs must name joints 0 to {count - 1}, got {limbs}")
        for field, value in {
            "names": names, "mirrored": mirrored, "upper": upper, "sigmas": sigmas, "limbs": limbs
        }.items():  # fmt: skip
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.names)

    def side(self, *joints: int) -> int:
        """-1 where the joints belong to the left of a pair, 1 to the right, 0 to neither or to both."""
        sides = {_side(self.names[k]) if self.mirrored[k] != k else 0 for k in joints} - {0}
        return sides.pop() if len(sides) == 1 else 0

    @property
    def unmeasured(self) -> bool:
        """Does one sigma stand for all joints, so that OKS says little?"""
        return len(self) > 1 and len(set(self.sigmas)) == 1

    def listed(self) -> str:
        """How many, and the first of their names."""
        return f"{len(self)} joints ({', '.join(self.names[:6])}{', ...' if len(self) > 6 else ''})"

    def without_other_side(self) -> list[str]:
        """Joints that are named left or right and have no partner: mirroring gives them to the wrong side."""
        return [name for k, name in enumerate(self.names) if self.mirrored[k] == k and _side(name)]

    def encoded(self) -> Tensor:
        """All of it as a tensor of bytes, for a state_dict."""
        return torch.frombuffer(bytearray(json.dumps(asdict(self)).encode()), dtype=torch.uint8).clone()

    @staticmethod
    def decoded(content: Any) -> Joints | None:
        """The inverse of `encoded`; None for anything else."""
        try:
            return Joints(**json.loads(bytes(content.tolist())))
        except (ValueError, TypeError, AttributeError):
            return None


def partners(names: Sequence[str]) -> tuple[int, ...]:
    """The joint that takes each joint's place in the mirror image: the one whose name has the other side's word, or itself.

    Known are left and right, also within a word (LeftEye, eyeleft), and l and r as words of their own or in front of one
    (l_eye, eye.R, LEye, leye).
    """
    by_name = {_key(name): k for k, name in enumerate(names)}
    in_front = {name.lower(): k for k, name in enumerate(names)}
    found = []
    for k, name in enumerate(names):
        one, other = _key(name), _key(name, mirror=True)
        lower = name.lower()
        found.append(by_name.get(other, k) if one != other else in_front.get(_SIDES.get(lower[:1], "") + lower[1:], k))
    return tuple(j if found[j] == k else k for k, j in enumerate(found))


def _words(name: str) -> list[str]:
    text = re.sub(r"(?i)left|right", lambda side: f" {side[0].lower()} ", name)
    return [word.lower() for word in _WORDS.findall(text) if word.strip(" _-.")]


def _key(name: str, mirror: bool = False) -> tuple[str, ...]:
    """The words of a name; l and left are the same."""
    words = [{"l": "left", "r": "right"}.get(word, word) for word in _words(name)]
    return tuple(_SIDES.get(word, word) if mirror else word for word in words)


def _side(name: str) -> int:
    key = _key(name)
    return -1 if "left" in key else 1 if "right" in key else 0


def same_names(one: Sequence[str], other: Sequence[str]) -> bool:
    """Do two sets name the same joints in the same order, however they write them (L_Eye, left eye)?"""
    return [_key(name) for name in one] == [_key(name) for name in other]


COCO = Joints(
    names=(
        "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow",
        "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle",
        "right_ankle",
    ),
    upper=(True,) * 11 + (False,) * 6,  # from the head to the wrists
    # pycocotools Params.kpt_oks_sigmas
    sigmas=tuple(
        sigma / 10
        for sigma in (
            0.26, 0.25, 0.25, 0.35, 0.35, 0.79, 0.79, 0.72, 0.72, 0.62, 0.62, 1.07, 1.07, 0.87, 0.87, 0.89, 0.89
        )
    ),
    # COCO's skeleton, in its order, counted from 0
    limbs=(
        (15, 13), (13, 11), (16, 14), (14, 12), (11, 12), (5, 11), (6, 12), (5, 6), (5, 7), (6, 8), (7, 9), (8, 10), (1, 2),
        (0, 1), (0, 2), (1, 3), (2, 4), (3, 5), (4, 6),
    ),
)  # fmt: skip
