"""The poses in what a user names: where people are looked for, what is drawn, and the files that are left.

# N boxes (x, y, w, h) of a picture
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tasks import folder, inputs, log, pictures
from tasks.errors import UserError
from tasks.pose import draw, people, predict
from tasks.pose.coco import read_json
from tasks.pose.data import Picture, read_picture
from tasks.pose.predict import Frame, Poses
from tasks.pose.task import PoseTask
from tasks.pose.video import Video, VideoFile

Array = NDArray[np.float64]


def readable(found: list[Path], max_pixels: int, lenient: bool) -> list[Path]:
    """The inputs whose header and end are a picture's; videos as they are.

    Raises:
        UserError: one is not, and they are not left out; or none is.
    """
    wrong: dict[Path, str] = {}
    for file in found:
        try:
            if not file.is_file():
                raise UserError(f"{file}: no such picture (No such file or directory)")
            if not inputs.is_video(file):
                with pictures.named(file):
                    pictures.check(file.read_bytes(), max_pixels)
        except UserError as error:
            wrong[file] = str(error).replace("task.skip_broken=True trains without such", "--skip-broken leaves it out")
    if wrong and not lenient:
        raise UserError(next(iter(wrong.values())))
    if wrong:
        left = [line.partition("; --skip-broken")[0] for line in wrong.values()]
        print(f"warning: {len(wrong)} of {len(found)} inputs are left out:", *left, sep="\n  ", file=sys.stderr, flush=True)
    if len(wrong) == len(found):
        raise UserError(f"none of the {len(found)} inputs can be read")
    return [file for file in found if file not in wrong]


class Finder:
    """Where people are: boxes of a file, of a detector, or whole pictures.

    Args:
        found: the inputs.
        boxes: COCO results file.
        detect: from a picture to boxes and scores.

    Raises:
        UserError: the file cannot be used.
    """

    def __init__(self, found: list[Path], boxes: Path | None, detect: Callable[[Picture], tuple[Array, Array]] | None) -> None:
        still = [file for file in found if not inputs.is_video(file)]
        self.numbers = dict(zip(still, image_ids(still), strict=True))
        self._boxes = listed(boxes, self.numbers) if boxes is not None else None
        if self._boxes is not None and len(still) < len(found):
            raise UserError("--boxes names boxes of pictures; for videos, --detector finds people")
        self._detect = detect

    def frame(self, number: int, picture: Picture) -> Frame:
        """A picture with its boxes."""
        if self._boxes is not None:
            return Frame(number, picture, *self._boxes[number])
        return predict.whole(number, picture) if self._detect is None else Frame(number, picture, *self._detect(picture))


class Drawing:
    """How poses are drawn and where.

    Args:
        out: the folder.
        task: of the networks.
        titles: of the networks.
        threshold: joints of a lower score are not drawn.
        device: of the networks.
    """

    def __init__(self, out: Path, task: PoseTask, titles: list[str], threshold: float, device: torch.device) -> None:
        self.out, self.task, self.titles, self.device = out, task, titles, device
        self._threshold, self.joints = threshold, task.joint_set()

    def drawn(self, picture: Picture, answers: list[Poses], *, enlarge: bool = True) -> Picture:
        """A picture with the poses of each network, side by side where there are several."""
        shown = [draw.poses(picture, found, self.joints, threshold=self._threshold, enlarge=enlarge) for found in answers]
        return draw.side_by_side(list(zip(self.titles, shown, strict=True))) if len(shown) > 1 else shown[0]


def of_pictures(drawing: Drawing, networks: list[nn.Module], finder: Finder, targets: dict[Path, Path], lenient: bool) -> None:
    """The drawn pictures, and the poses of each network in one file."""
    if not targets:
        return
    files = {number: file for file, number in finder.numbers.items()}

    def frames() -> Iterator[Frame]:
        for file in targets:
            try:
                picture = read_picture(file, drawing.task.max_pixels)
            except UserError as error:
                if not lenient:
                    raise
                print(f"warning: {error}", file=sys.stderr, flush=True)
                continue
            yield finder.frame(finder.numbers[file], picture)

    kept: list[Poses] = [[] for _ in networks]
    for frame, answers in predict.poses(drawing.task, networks, frames(), drawing.device):
        file = files[frame.number]
        target = targets[file].with_name(f"{targets[file].name}.jpg")
        draw.write(target, drawing.drawn(frame.picture, answers))
        for every, found in zip(kept, answers, strict=True):
            every += [{**pose, "file_name": str(file)} for pose in found]
        print(f"{file}: {counted(len(answers[0]))}, {target}", flush=True)
    for name, found in zip(("keypoints.json", "keypoints-compared.json"), kept, strict=False):
        log.write_json(drawing.out / name, found)
    print(f"{len(drawing.joints)} keypoints a person, as COCO results, in {drawing.out / 'keypoints.json'}")


def of_video(drawing: Drawing, networks: list[nn.Module], finder: Finder, video: Path, target: Path) -> None:
    """The drawn video, and a line of JSON for each of its frames."""
    source = Video(video)
    written = VideoFile(folder.fresh(target.with_name(f"{target.name}.mp4")), source.rate)
    lines = target.with_name(f"{target.name}.jsonl")
    count = people_seen = 0
    frames = (finder.frame(number, picture) for number, picture in enumerate(source))
    with folder.fresh(lines).open("w") as file:
        for frame, answers in predict.poses(drawing.task, networks, frames, drawing.device):
            found = [{"keypoints": pose["keypoints"], "score": pose["score"]} for pose in answers[0]]
            file.write(json.dumps({"frame": frame.number, "seconds": frame.number / source.rate, "poses": found}) + "\n")
            written.write(drawing.drawn(frame.picture, answers, enlarge=False))
            count, people_seen = count + 1, people_seen + len(found)
    written.close()
    print(f"{video}: {count} frames, {counted(people_seen)} in all, {target}.mp4, {lines}", flush=True)


def counted(number: int) -> str:
    """People in words."""
    return f"{number} {'person' if number == 1 else 'people'}"


def image_ids(files: list[Path]) -> list[int]:
    """COCO's ids where all the names are different numbers, 1, 2, ... in the given order otherwise."""
    if all(file.stem.isdigit() for file in files) and len({int(file.stem) for file in files}) == len(files):
        return [int(file.stem) for file in files]
    return list(range(1, len(files) + 1))


def listed(source: Path, numbers: dict[Path, int]) -> dict[int, tuple[Any, Any]]:
    """Boxes and scores of each picture in a COCO results file, which names it by image_id or by the end of its path."""
    detections = read_json(source, "--boxes is a COCO results file")
    for d in detections if isinstance(detections, list) else []:
        if isinstance(d, dict) and "file_name" in d:
            parts = Path(str(d["file_name"])).parts
            ends = [number for file, number in numbers.items() if file.resolve().parts[-len(parts) :] == parts]
            ends = ends or [number for file, number in numbers.items() if file.name == parts[-1]]
            if len(ends) > 1:
                raise UserError(f"{source}: file_name {d['file_name']} is the end of {len(ends)} inputs; give more of its path")
            d["image_id"] = ends[0] if ends else None
    found = people.boxes(detections, list(numbers.values()), source)
    places = {number: place for place, number in enumerate(numbers.values())}
    return {
        number: (found[1][found[0] == place], found[2][found[0] == place]) for number, place in places.items()
    }  # fmt: skip
