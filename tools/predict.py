"""Find poses in pictures: python tools/predict.py CONFIG --checkpoint runs/NAME/best.pt IMAGE..."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cli
import numpy as np

from tasks import checkpoint, folder, log
from tasks.errors import UserError
from tasks.pose import draw
from tasks.pose.data import Person, detected_people, read_json, read_picture
from tasks.pose.joints import COCO
from tasks.pose.task import PoseTask


def main() -> None:
    """Parse, predict, draw."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's best.pt or last.pt, or one of mmpose")
    parser.add_argument("--compare", type=Path, metavar="CHECKPOINT", help="another checkpoint, drawn beside the first")
    parser.add_argument(
        "--boxes", type=Path, metavar="JSON", help="people's boxes, a COCO results file; default: whole pictures"
    )
    parser.add_argument("--out", type=Path, help="folder of the drawn pictures; default: runs/NAME-predictions, the first free")
    parser.add_argument("--sample", action="store_true", help="the config's sample")
    arguments = parser.parse_intermixed_args()
    named = cli.paths(arguments.words)
    if len(named) < 2:
        raise UserError("expected a config file and at least one picture: predict.py CONFIG --checkpoint FILE IMAGE...")
    pictures = [Path(name) for name in named[1:]]
    path, config = cli.load_config([word for word in arguments.words if word not in named[1:]], sample=arguments.sample)
    task = config.task
    if not isinstance(task, PoseTask):
        raise UserError(f"{path}: not a config of the pose task")
    device = cli.device(arguments.device)
    ids = image_ids(pictures)
    people = (
        boxes(arguments.boxes, pictures, ids) if arguments.boxes else [whole(*pair) for pair in zip(pictures, ids, strict=True)]
    )
    checkpoints = [arguments.checkpoint] + ([arguments.compare] if arguments.compare else [])
    answers = []
    for file in checkpoints:
        model = task.build()
        checkpoint.load_weights(model, file)
        answers.append(task.predict(model.to(device), people, device))
    out = cli.run_folder(
        str(Path(path).with_stem(f"{Path(path).stem}-predictions")), False, arguments.out, resume=False, holds="keypoints.json"
    )
    with folder.required(out):
        write(out, pictures, ids, checkpoints, answers)
    print(f"{len(COCO)} keypoints a person, as COCO results, in {out / 'keypoints.json'}")


def write(
    out: Path, pictures: list[Path], ids: list[int], checkpoints: list[Path], answers: list[list[dict[str, Any]]]
) -> None:
    """The drawn pictures and the poses of each checkpoint."""
    out.mkdir(parents=True, exist_ok=True)
    for picture, image_id in zip(pictures, ids, strict=True):
        content = read_picture(picture)
        drawn = [draw.poses(content, [pose for pose in found if pose["image_id"] == image_id]) for found in answers]
        titles = [str(file) for file in checkpoints]
        alone = sum(other.stem == picture.stem for other in pictures) == 1
        target = out / (f"{picture.stem}.jpg" if alone else f"{picture.stem}-{image_id}.jpg")
        draw.write(target, draw.side_by_side(list(zip(titles, drawn, strict=True))) if len(drawn) > 1 else drawn[0])
        count = sum(pose["image_id"] == image_id for pose in answers[0])
        print(f"{picture}: {count} {'person' if count == 1 else 'people'}, {target}")
    names = {image_id: str(picture) for picture, image_id in zip(pictures, ids, strict=True)}
    for name, found in zip(("keypoints.json", "keypoints-compared.json"), answers, strict=False):
        log.write_json(out / name, [{**pose, "file_name": names[pose["image_id"]]} for pose in found])


def image_ids(pictures: list[Path]) -> list[int]:
    """COCO's ids where all the names are different numbers, 1, 2, ... in the given order otherwise."""
    if all(picture.stem.isdigit() for picture in pictures) and len({int(p.stem) for p in pictures}) == len(pictures):
        return [int(picture.stem) for picture in pictures]
    return list(range(1, len(pictures) + 1))


def whole(picture: Path, image_id: int) -> Person:
    """One person who fills the picture."""
    height, width = read_picture(picture).shape[:2]
    return Person(picture, image_id, np.array([0.0, 0.0, width - 1, height - 1]), 1.0, np.zeros((len(COCO), 3)))


def boxes(source: Path, pictures: list[Path], ids: list[int]) -> list[Person]:
    """The people of a COCO results file, whose pictures it gives by image_id or by file_name."""
    detections = read_json(source, "--boxes is a COCO results file")
    names = {picture.name: image_id for picture, image_id in zip(pictures, ids, strict=True)}
    for d in detections if isinstance(detections, list) else []:
        if isinstance(d, dict) and "file_name" in d:
            d["image_id"] = names.get(Path(str(d["file_name"])).name)
    return detected_people(detections, dict(zip(ids, pictures, strict=True)), source)


if __name__ == "__main__":
    cli.run(main)
