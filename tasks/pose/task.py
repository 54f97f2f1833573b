"""Top-down human pose estimation on COCO keypoints, as a task of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tasks import checkpoint, distributed, folder, log
from tasks.config import data_path
from tasks.errors import UserError
from tasks.loading import Seeded
from tasks.pictures import normalised
from tasks.pose import draw, errors, evaluate, oks, sample, transforms
from tasks.pose.codec import Codec, Heatmap
from tasks.pose.data import (
    Person,
    PoseData,
    annotated_people,
    detected_people,
    listed_pictures,
    read_json,
    read_picture,
    readable_people,
)
from tasks.pose.joints import COCO
from tasks.pose.model import HeatmapHRNet
from tasks.pose.transforms import Augmentation
from tasks.quant.lowbit import LowBit, has_quantizers
from tasks.task import Batch

_TILE = (192, 256)  # of a contact sheet
_WHOLE = 6  # labelled joints of a person who may stand on it, if there is one
SAMPLE = "sample"  # the root that stands for the drawn people


@dataclass(frozen=True)
class PoseTask(LowBit):
    """Learn to find 17 joints, and measure COCO's AP.

    Args:
        root: folder in COCO's layout (annotations/person_keypoints_{train,val}2017.json, train2017/, val2017/), or
            "sample" for drawn people.
        limit: the first N people of each split; None: all.
        skip_broken: leave out the people in pictures that cannot be read, which are listed, instead of stopping at the first;
            reads every picture once, before training.
        detections: COCO detection-results JSON whose boxes are evaluated in place of the annotated ones.
        codec: Heatmap or SimCC; sets the crop's size and the loss.
        network: called with the codec, returns the network.
        weights: file with the backbone's ImageNet weights, a timm state_dict, or a whole model with quantizers; None trains
            from scratch.
        weight_bits: as of `LowBit`, and so act_bits, layers, asymmetric and perturb.
        augmentation: of the training crops.
        flip_test: average the predictions for the crop and for its mirror image.
        score_threshold: of joints that count in a person's score.
        nms_threshold: OKS above which the lower-scored of two poses is dropped.
        soft_nms: lower the scores of near copies instead of dropping them; nms_threshold is then the decay's.
    """

    root: str = "data/coco"
    limit: int | None = None
    skip_broken: bool = False
    detections: str | None = None
    codec: Codec = Heatmap()
    network: Callable[..., nn.Module] = partial(HeatmapHRNet)
    augmentation: Augmentation = Augmentation()
    flip_test: bool = True
    score_threshold: float = 0.2
    nms_threshold: float = 0.9
    soft_nms: bool = False

    name = "pose"
    metric = "AP"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be >= 1 or None, got {self.limit}")

    def dataset(self, split: str) -> PoseData:
        """Augmented crops of "train", plain crops of "val"."""
        people, _ = self._people(split)
        return PoseData(people, self.codec, self.augmentation if split == "train" else None)

    def _files(self, split: str) -> tuple[Path, Path]:
        """The annotation file and the folder of pictures of a split."""
        root = sample.written() if self.root == SAMPLE else data_path(self.root)
        return root / f"annotations/person_keypoints_{split}2017.json", root / f"{split}2017"

    def _people(self, split: str) -> tuple[list[Person], dict[str, Any]]:
        """The people of a split, and the ground truth that goes with them."""
        source, pictures = self._files(split)
        how = "see README, section Data, for how to get COCO, or try --sample"
        annotations = read_json(source, how)
        if (
            not isinstance(annotations, dict)
            or not isinstance(annotations.get("images"), list)
            or not {"images", "annotations"} <= annotations.keys()
        ):
            raise UserError(f"{source}: not a COCO annotation file: it lacks a list of images or annotations")
        if not pictures.is_dir():
            raise UserError(f"{pictures}: no such folder; {how}")
        if split == "val" and self.detections is not None:
            path = Path(self.detections)
            files = listed_pictures(annotations["images"], pictures, source)
            people = detected_people(read_json(path, "task.detections is a COCO results file"), files, path)
            readable = readable_people(people) if self.skip_broken else people
            unread = {person.image_id for person in people} - {person.image_id for person in readable}
            kept = [a for a in annotations["annotations"] if a["image_id"] not in unread]
            people, annotations = readable, {**annotations, "annotations": kept}
        else:
            everybody = annotated_people(annotations, pictures, source)
            people = (readable_people(everybody) if self.skip_broken else everybody)[: self.limit]
            # The people left out would count as missed; crowds and the unlabelled stay, to be ignored.
            left_out = {person.annotation for person in everybody} - {person.annotation for person in people}
            kept = [a for place, a in enumerate(annotations["annotations"]) if place not in left_out]
            annotations = {**annotations, "annotations": kept}
        people = people[: self.limit]
        if not people:
            raise UserError(f"{source}: nobody to learn from: no person has a box and a labelled joint")
        return people, annotations

    def crops(self, count: int, *, augment: bool) -> Tensor:
        """The first people of "train", plain or as training sees them, normalised, [count, 3, h, w]."""
        people, _ = self._people("train")
        data = Seeded(PoseData(people[:count], self.codec, self.augmentation if augment else None), seed=0)
        return normalised(torch.stack([data[0, i]["image"] for i in range(min(count, len(people)))]))

    def example(self) -> Tensor:
        """An input of the network."""
        width, height = self.codec.input_size
        return torch.zeros(1, 3, height, width)

    def build(self) -> nn.Module:
        """The network, with the backbone's weights where a file is named, and quantizers if bits are given."""
        network = self.network(codec=self.codec)
        saved = checkpoint.weights(Path(self.weights)) if self.weights is not None else None
        if saved is not None and not has_quantizers(saved):
            try:
                answer = network.backbone.load_state_dict(saved, strict=False)  # type: ignore[union-attr, operator]
            except (RuntimeError, TypeError, AttributeError) as error:
                what = " ".join(str(error).split())[:300]
                raise UserError(f"{self.weights}: does not fit the backbone of this config: {what}") from error
            if answer.missing_keys:
                missing = answer.missing_keys
                raise UserError(f"{self.weights}: lacks {len(missing)} of the backbone's tensors: {missing[0]}")
        return self.loaded(network, saved)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The codec's loss."""
        return self.codec.loss(model(normalised(batch["image"])).float(), batch["target"], batch["weight"])

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], out: Path | None = None) -> dict[str, float]:
        """COCO's ten figures.

        Into `out` go predictions.png, the worst and the best poses, and errors.png and errors.json, where the errors are.
        """
        people, annotations = self._people("val")
        found = self.results(model, batches, people)
        if out is not None:
            report = errors.error_report(annotations, found)
            sheet = self._worst_and_best(annotations, found)
            with folder.tolerated(out):
                log.write_json(out / "errors.json", report)
                draw.error_picture(out / "errors.png", report)
                draw.write(out / "predictions.png", sheet)
        return evaluate.coco_figures(annotations, found)

    def _worst_and_best(self, annotations: dict[str, Any], found: list[dict[str, Any]], count: int = 8) -> NDArray[np.uint8]:
        """A contact sheet of the people whose poses are least and most like the annotated ones, which are drawn in white."""
        _, pictures = self._files("val")
        files = {image["id"]: pictures / image["file_name"] for image in annotations["images"]}
        people, poses, likeness = errors.matched(annotations, found)
        whole = [i for i in np.argsort(likeness) if people[i]["num_keypoints"] >= _WHOLE] or list(np.argsort(likeness))
        rows = []
        for title, chosen in (("worst", whole[:count]), ("best", whole[::-1][:count])):
            tiles = []
            for i in chosen:
                picture = read_picture(files[people[i]["image_id"]])
                truth = np.array(people[i]["keypoints"], dtype=np.float64).reshape(-1, 3)
                centre, extent = transforms.box_to_centre(np.array(people[i]["bbox"], dtype=np.float64))
                matrix = transforms.affine(centre, transforms.fit_aspect(extent, _TILE), 0.0, _TILE)
                tile = transforms.crop(picture, matrix, _TILE)
                seen = np.where(truth[:, 2] > 0, 1.0, -1.0)
                tile = draw.skeleton(tile, transforms.apply(matrix, truth[:, :2]), seen, thick=1.0, colour=draw.WHITE)
                scores = np.where(truth[:, 2] > 0, np.maximum(poses[i, :, 2], 0.5), -1.0)  # unsure, yet to be seen
                tile = draw.skeleton(tile, transforms.apply(matrix, poses[i, :, :2]), scores, thick=2.5)
                tiles.append((f"OKS {likeness[i]:.2f}", tile))
            rows.append((f"{title} of {len(people)}; white: annotated", tiles))
        return draw.contact_sheet(rows)

    def results(self, model: nn.Module, batches: Iterable[Batch], people: list[Person]) -> list[dict[str, Any]]:
        """COCO keypoint results of the people, whose crops come in batches."""
        indices, joints, joint_scores = [], [], []
        for batch in batches:
            prediction = self._prediction(model, normalised(batch["image"]))
            keypoints, scores = self.codec.decode(prediction.float().cpu().numpy())
            indices.append(batch["index"].cpu().numpy())
            joints.append(keypoints)
            joint_scores.append(scores)
        indices, joints, joint_scores = (distributed.gathered(found) for found in (indices, joints, joint_scores))
        seen = [people[i] for i in np.concatenate(indices)]
        boxes = [transforms.box_to_centre(person.box) for person in seen]
        centres = np.stack([centre for centre, _ in boxes])[:, None]
        extents = np.stack([transforms.fit_aspect(extent, self.codec.input_size) for _, extent in boxes])[:, None]
        return oks.results(
            np.array([person.image_id for person in seen]),
            transforms.to_picture(np.concatenate(joints).astype(np.float64), centres, extents, self.codec.input_size),
            np.concatenate(joint_scores).astype(np.float64),
            np.array([person.score for person in seen]),
            extents.prod(axis=2)[:, 0],
            sigmas=np.array(COCO.sigmas),
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            soft_nms=self.soft_nms,
        )

    def predict(self, model: nn.Module, people: list[Person], device: torch.device) -> list[dict[str, Any]]:
        """COCO keypoint results of people in any pictures, one crop at a time."""
        data = PoseData(people, self.codec)
        batches = ({key: value[None].to(device) for key, value in data[i].items()} for i in range(len(data)))
        model.eval()
        with torch.no_grad():
            return self.results(model, batches, people)

    def _prediction(self, model: nn.Module, images: Tensor) -> Tensor:
        prediction = model(images)
        if not self.flip_test:
            return prediction
        mirrored = self.codec.unmirror(model(images.flip(3)))[:, list(COCO.mirrored)]
        return (prediction + mirrored) / 2
