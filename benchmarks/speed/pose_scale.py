"""What pose evaluation costs at the scale of COCO's val2017 and a detector's boxes, and reading a file as large as train2017's.

A few real pictures stand in for thousands: their files are linked under other names, their annotations are repeated, and a
detector's boxes are drawn around the people and elsewhere. The network is left out: its answers are a fixed batch.
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tasks import log
from tasks.config import Config, data_path
from tasks.errors import UserError
from tasks.loading import load
from tasks.pose import evaluate, report
from tasks.pose.codec import Codec, Heatmap, SimCC, UDPHeatmap
from tasks.pose.data import read_picture
from tasks.pose.task import PoseTask

PICTURES, BOXES = 5_000, 104_125  # of val2017, and of the detector's file that everybody evaluates on it
TRAIN_PICTURES, TRAIN_ANNOTATIONS = 118_287, 262_465
CODECS: dict[str, Codec] = {
    "plain heatmaps": Heatmap(),
    "DARK": Heatmap(unbiased=True),
    "UDP": UDPHeatmap(),
    "SimCC": SimCC(),
}
_BATCH = 32


def pose(root: str, pictures: int) -> dict[str, Any]:
    """CPU seconds of pose evaluation without its network, part by part, and of reading train2017's annotations."""
    with tempfile.TemporaryDirectory() as folder:
        parts = [_evaluated(_scene(data_path(root), Path(folder) / str(n), n)) for n in (pictures // 4, pictures)]
        training = _apart(_read, _training_file(data_path(root), Path(folder) / "train", TRAIN_PICTURES * pictures // PICTURES))
    quarter, whole = parts
    print(f"{pictures} pictures, {whole['boxes']} boxes; CPU seconds, and those of a quarter as many pictures")
    for name in whole:
        if name != "boxes":
            print(f"  {name:34} {whole[name]:8.1f} {quarter[name]:8.1f}")
    print(f"annotations of {training['megabytes']:.0f} MB")
    for name, value in training.items():
        print(f"  {name:34} {value:8.1f}")
    return {
        "pictures": pictures,
        "whole": whole,
        "quarter": quarter,
        "training": training,
        "machine": log.environment(torch.device("cpu")),
    }


def _scene(source: Path, folder: Path, count: int) -> Path:
    """A val split of so many pictures with a detector's boxes, made of the people of a smaller one."""
    rng = np.random.default_rng(0)
    original = _original(source, "val")
    (folder / "val2017").mkdir(parents=True)
    (folder / "annotations").mkdir()
    of_image: dict[Any, list[dict[str, Any]]] = {}
    for annotation in original["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    images, annotations, boxes = [], [], []
    for number, image in zip(range(1, count + 1), itertools.cycle(original["images"])):
        (folder / f"val2017/{number:012d}.jpg").symlink_to((source / "val2017" / image["file_name"]).resolve())
        images.append({**image, "id": number, "file_name": f"{number:012d}.jpg"})
        here = of_image.get(image["id"], [])
        annotations += [{**annotation, "image_id": number, "id": len(annotations) + k} for k, annotation in enumerate(here, 1)]
        size = np.array([image["width"], image["height"]])
        for k in range(BOXES // PICTURES + (number % 40 < 33)):
            if here and rng.random() < 0.5:
                box = np.array(here[k % len(here)]["bbox"], dtype=np.float64) + rng.normal(0, 6, 4)
            else:
                box = np.concatenate([rng.uniform(0, 0.7, 2) * size, rng.uniform(0.05, 0.3, 2) * size])
            boxes.append(
                {"image_id": number, "category_id": 1, "bbox": np.maximum(box, 1).tolist(), "score": float(rng.random() ** 3)}
            )
    content = {"images": images, "annotations": annotations, "categories": original["categories"]}
    (folder / "annotations/person_keypoints_val2017.json").write_text(json.dumps(content))
    (folder / "boxes.json").write_text(json.dumps(boxes))
    return folder


def _original(source: Path, split: str) -> dict[str, Any]:
    file = source / f"annotations/person_keypoints_{split}2017.json"
    if not file.is_file():
        raise UserError(f"{file}: no such file; --root names a folder in COCO's layout whose pictures are repeated")
    return json.loads(file.read_bytes())


class _Network(nn.Module):
    """Answers with the same maps for every batch: joints here and there, of any sureness, in some noise."""

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        rng = np.random.default_rng(1)
        size = np.array(codec.input_size)
        points = rng.uniform(0.1, 0.9, (_BATCH, 17, 2)) * size
        encoded = np.stack([codec.encode(some.astype(np.float32), np.ones(17, bool))[0] for some in points])
        sure = rng.uniform(0.05, 1, (_BATCH, 17)).reshape(_BATCH, 17, *(1,) * (encoded.ndim - 2))
        noise = 0.01 * encoded.max() * rng.random(encoded.shape)
        self.answer = torch.from_numpy((encoded * sure + noise).astype(np.float32))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.answer[: len(images)]


def _evaluated(folder: Path) -> dict[str, float]:
    """CPU seconds of each part; "all" is what an evaluation with DARK takes."""
    task = PoseTask(root=str(folder), detections=str(folder / "boxes.json"))
    seconds: dict[str, float] = {}

    def timed(name: str, run: Any) -> Any:
        begin = time.process_time()
        found = run()
        seconds[name] = time.process_time() - begin
        return found

    people, annotations = timed("read annotations and boxes", lambda: task.people("val"))
    config = Config(task=task, optimizer=torch.optim.SGD, num_workers=0)
    parts = [(0, np.arange(i, min(i + _BATCH, len(people)))) for i in range(0, len(people), _BATCH)]

    def crops() -> None:
        for _ in load(task.dataset("val"), config, torch.device("cpu"), parts):
            pass

    timed("decode pictures", lambda: [read_picture(people.file(place)) for place in range(len(people.files))])
    timed("decode pictures, make crops", crops)
    seconds["make crops"] = seconds.pop("decode pictures, make crops") - seconds["decode pictures"]
    batches = [{"image": torch.zeros(len(some), 3, 1, 1), "index": torch.from_numpy(some)} for _, some in parts]
    for name, codec in CODECS.items():
        answer = _Network(codec).answer.numpy()
        timed(f"joints of {name}", lambda codec=codec, answer=answer: [codec.decode(answer) for _ in parts])
    task = replace(task, codec=CODECS["DARK"], flip_test=False)
    found = timed("all of results", lambda: task.results(_Network(task.codec), batches, people))
    seconds["scores and NMS"] = seconds.pop("all of results") - seconds["joints of DARK"]
    truth, joints = annotations.truth(), task.joint_set()
    timed("figures", lambda: evaluate.coco_figures(truth, found, joints))
    out = folder / "out"
    out.mkdir()
    limits = {"max_pixels": task.max_pixels, "threshold": task.score_threshold}
    timed("keypoints.json, errors, drawings", lambda: report.write(out, annotations, truth, found, joints, **limits))  # type: ignore[arg-type]
    left_out = {f"joints of {name}" for name in CODECS if name != "DARK"}
    total = sum(value for name, value in seconds.items() if name not in left_out)
    seconds |= {"all, with DARK": total, "all but the crops": total - seconds["make crops"]}
    return {"boxes": len(people), **seconds}


def _training_file(source: Path, folder: Path, pictures: int) -> Path:
    """A file of train2017's size and shape, of repeated annotations."""
    original = _original(source, "train")
    (folder / "annotations").mkdir(parents=True)
    (folder / "train2017").mkdir()
    count = TRAIN_ANNOTATIONS * pictures // TRAIN_PICTURES
    images = zip(range(1, pictures + 1), itertools.cycle(original["images"]))
    annotations = zip(range(1, count + 1), itertools.cycle(original["annotations"]))
    listed = [{**image, "id": k, "file_name": f"{k:012d}.jpg"} for k, image in images]
    people = [{**annotation, "id": k, "image_id": 1 + k % pictures} for k, annotation in annotations]
    for annotation in (people[k] for k in range(count) if k % 7 < 3):  # of the real file's, 43 % have no labelled joint
        annotation.update(keypoints=[0] * 51, num_keypoints=0, segmentation=[annotation["bbox"] * 2])
    content = {"images": listed, "annotations": people, "categories": original["categories"]}
    (folder / "annotations/person_keypoints_train2017.json").write_text(json.dumps(content))
    return folder


def _apart(run: Any, *arguments: Any) -> Any:
    """What a function answers in a process of its own, whose peak of memory is its own."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(run, arguments)


def _read(folder: Path) -> dict[str, float]:
    """Seconds and peak of reading the file, and what a worker that looks at everybody copies of the pages."""
    file = folder / "annotations/person_keypoints_train2017.json"
    before, begin = _kilobytes("status", "VmHWM"), time.process_time()
    people, _ = PoseTask(root=str(folder)).people("train")
    seconds, peak = time.process_time() - begin, _kilobytes("status", "VmHWM")
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        start = _kilobytes("smaps_rollup", "Private_Dirty")
        for person in people:
            _ = person.box
        os.write(writing, f"{_kilobytes('smaps_rollup', 'Private_Dirty') - start}".encode())
        os._exit(0)
    os.waitpid(child, 0)
    return {
        "megabytes": file.stat().st_size / 1e6,
        "people": len(people),
        "CPU seconds": seconds,
        "peak of memory, MB": peak / 1e3,
        "of which before, MB": before / 1e3,
        "a worker's copies, MB": int(os.read(reading, 20)) / 1e3,
    }


def _kilobytes(file: str, name: str) -> int:
    """Of this process, by the kernel: its peak of memory, or the pages that it has for itself alone."""
    lines = Path(f"/proc/self/{file}").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(name))
