"""Which files a pose task learns from and is measured on, whose joints they hold, and who in them counts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from tasks import distributed
from tasks.config import data_path
from tasks.errors import UserError
from tasks.pictures import MAX_PIXELS
from tasks.pose import annotations as coco
from tasks.pose import joint_sets, people, sample
from tasks.pose.annotations import Annotations
from tasks.pose.coco import read_json
from tasks.pose.data import readable_people
from tasks.pose.joints import COCO, Joints
from tasks.pose.people import People

SAMPLE = "sample"  # the root that stands for the drawn people
HOW = "see README, section Data, for how to get COCO, name task.root=, or try --sample"


@dataclass(frozen=True)
class KeypointFiles:
    """COCO keypoint files and their pictures.

    Args:
        root: folder in COCO's layout (annotations/person_keypoints_{train,val}2017.json, train2017/, val2017/), or
            "sample" for drawn people.
        train_annotations: the training split's file; None: as `root` has it. So the next three.
        train_images: folder of its pictures.
        val_annotations: the validation split's file.
        val_images: folder of its pictures.
        joints: None takes those that the annotation file's categories name, COCO's where they name none; a set, or the name
            of a ready one ("coco", "wholebody", "mpii", "crowdpose", "ap10k", "hand", "face"), which the files' names must
            be.
        sigmas: of the joints, or one for all; None: the set's own.
        category: name or id of the category that counts; None: those with keypoints.
        limit: the first N people of each split; None: all. Of detections, the first N boxes, and the people in their
            pictures.
        skip_broken: leave out the people in pictures that cannot be read, which are listed, instead of stopping at the first;
            reads every picture once, before training.
        max_pixels: pictures of more are refused.
        held_out: share of the training pictures, in [0, 1), that training goes without and whose people stand for the split
            "val": for choosing settings; 0: the split "val" itself.
        detections: COCO detection-results JSON whose boxes are evaluated in place of the annotated ones.
    """

    root: str = "data/coco"
    train_annotations: str | None = None
    train_images: str | None = None
    val_annotations: str | None = None
    val_images: str | None = None
    joints: Joints | str | None = None
    sigmas: tuple[float, ...] | float | None = None
    category: int | str | None = None
    limit: int | None = None
    skip_broken: bool = False
    held_out: float = 0.0
    max_pixels: int = MAX_PIXELS
    detections: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be >= 1 or None, got {self.limit}")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {self.held_out}")
        if self.max_pixels < 1:
            raise ValueError(f"max_pixels must be >= 1, got {self.max_pixels}")
        if isinstance(self.joints, str) and self.joints not in joint_sets.SETS:
            raise ValueError(f"joints must be a joint set, None, or one of {', '.join(joint_sets.SETS)}, got {self.joints!r}")

    def joint_set(self) -> Joints:
        """The joints to find: those of the settings, or those that the files name.

        Raises:
            UserError: the files cannot be read, or the sigmas are not theirs.
        """
        found = joint_sets.SETS[self.joints] if isinstance(self.joints, str) else self.joints
        if found is None:
            names = (coco.named(self._files(split)[0], HOW, self.category) for split in ("val", "train") if self._there(split))
            found = next((joints for joints in names if joints is not None), COCO)
        if self.sigmas is not None:
            try:
                found = replace(found, sigmas=self.sigmas if isinstance(self.sigmas, tuple) else (self.sigmas,))
            except ValueError as error:
                raise UserError(f"task.{error}") from error
        return found

    def people(self, split: str) -> tuple[People, Annotations]:
        """Who is trained on or measured, and the annotations that count for them.

        Raises:
            UserError: the files are missing or wrong, or nobody is in them.
        """
        source, pictures = self._files("train" if self.held_out else split)
        joints = self.joint_set()
        found = coco.read(source, pictures, HOW, joints, self.category, self.skip_broken)
        if self.held_out:
            found = self._part(found, held=split == "val")
        if not pictures.is_dir():
            raise UserError(f"{pictures}: no such folder; {HOW}")
        _say(source, joints)
        if split == "val" and self.detections is not None and not self.held_out:
            return self._detected(found, len(joints))
        if not found.complete:
            raise UserError(f"{source}: has no annotations; task.detections= names a detector's boxes in its pictures")
        everybody = people.annotated(found)
        chosen = (readable_people(everybody, self.max_pixels) if self.skip_broken else everybody)[: self.limit]
        if not len(chosen):
            raise UserError(f"{source}: nobody to learn from: no person has a box and a labelled joint")
        # The people left out would count as missed; crowds and the unlabelled stay, to be ignored.
        left_out = np.setdiff1d(everybody.rows, chosen.rows)
        return chosen, found.kept(np.setdiff1d(np.arange(len(found.picture)), left_out)) if len(left_out) else found

    def _part(self, found: Annotations, held: bool) -> Annotations:
        """The annotations of the pictures that are held out, or of the others; one picture at least."""
        order = np.random.default_rng(0).permutation(np.unique(found.picture))
        cut = min(len(order) - 1, max(1, len(order) - round(self.held_out * len(order))))
        return found.kept(np.isin(found.picture, order[cut:] if held else order[:cut]))

    def _detected(self, found: Annotations, joints: int) -> tuple[People, Annotations]:
        path = data_path(str(self.detections))
        boxes = people.detected(read_json(path, "task.detections is a COCO results file"), found, path, joints)
        readable = readable_people(boxes, self.max_pixels) if self.skip_broken else boxes
        chosen = readable[: self.limit]
        if not len(chosen):
            raise UserError(f"{path}: no picture of its boxes can be read")
        if self.limit is not None:
            return chosen, found.kept(np.isin(found.picture, chosen.picture))
        unread = np.setdiff1d(boxes.picture, readable.picture)
        return chosen, found.kept(~np.isin(found.picture, unread)) if len(unread) else found

    def _files(self, split: str) -> tuple[Path, Path]:
        """The annotation file and the folder of pictures of a split."""
        annotations, pictures = getattr(self, f"{split}_annotations"), getattr(self, f"{split}_images")
        layout = None if annotations and pictures else self._root()
        return (
            data_path(annotations) if annotations else layout / f"annotations/person_keypoints_{split}2017.json",  # type: ignore[operator]
            data_path(pictures) if pictures else layout / f"{split}2017",  # type: ignore[operator]
        )

    def _root(self) -> Path:
        return sample.written() if self.root == SAMPLE else data_path(self.root)

    def _there(self, split: str) -> bool:
        return self._files(split)[0].is_file()


@lru_cache(maxsize=16)
def _say(source: Path, joints: Joints) -> None:
    """The joints in a line, once for a file, where they are not COCO's own."""
    if joints == COCO or distributed.rank():
        return
    pairs = [f"{joints.names[k]}/{joints.names[m]}" for k, m in enumerate(joints.mirrored) if k < m]
    sigmas = f"{min(joints.sigmas)} to {max(joints.sigmas)}" if len(set(joints.sigmas)) > 1 else f"{joints.sigmas[0]} for all"
    alone = joints.without_other_side()
    print(
        f"{source.name}: {len(joints)} keypoints: {', '.join(joints.names)}; mirrored pairs: {', '.join(pairs) or 'none'}; "
        f"sigmas {sigmas} (task.sigmas=)" + (f"; no other side for {', '.join(alone)}" if alone else ""),
        flush=True,
    )
