"""Top-down pose estimation on COCO keypoint files, as a task of the training loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tasks import checkpoint, distributed
from tasks.loading import Seeded
from tasks.pictures import MEAN, STD, normalised
from tasks.pose import errors, evaluate, oks, report, starting, transforms
from tasks.pose.codec import Codec, Heatmap
from tasks.pose.data import PoseData
from tasks.pose.files import SAMPLE, KeypointFiles
from tasks.pose.model import HeatmapHRNet
from tasks.pose.people import People
from tasks.pose.transforms import Augmentation
from tasks.quant.lowbit import LowBit, has_quantizers
from tasks.task import Batch

__all__ = ["SAMPLE", "PoseTask"]


@dataclass(frozen=True)
class PoseTask(KeypointFiles, LowBit):
    """Learn to find a set of joints, and measure COCO's AP.

    Args:
        root: as of `KeypointFiles`, and so train_annotations, train_images, val_annotations, val_images, joints, sigmas,
            category, limit, skip_broken, max_pixels and detections.
        codec: Heatmap, UDPHeatmap or SimCC; sets the crop's size and the loss.
        network: called with the codec and the joints, returns the network.
        weights: where the training starts: a file with a backbone's weights, a whole pose network of ours or of mmpose, or one
            with quantizers, or "efficientnet_lite0"; None trains from scratch.
        weight_bits: as of `LowBit`, and so act_bits, layers, asymmetric and perturb.
        augmentation: of the training crops.
        mean: of the three channels, pixels from 0 to 1, that the network is used to.
        std: standard deviation, likewise.
        flip_test: average the predictions for the crop and for its mirror image.
        score_threshold: of joints that count in a person's score.
        nms_threshold: OKS above which the lower-scored of two poses is dropped.
        soft_nms: lower the scores of near copies instead of dropping them; nms_threshold is then the decay's.
    """

    codec: Codec = Heatmap()
    network: Callable[..., nn.Module] = partial(HeatmapHRNet)
    augmentation: Augmentation = Augmentation()
    mean: tuple[float, float, float] = MEAN
    std: tuple[float, float, float] = STD
    flip_test: bool = True
    score_threshold: float = 0.2
    nms_threshold: float = 0.9
    soft_nms: bool = False

    name = "pose"
    metric = "AP"

    def __post_init__(self) -> None:
        KeypointFiles.__post_init__(self)
        LowBit.__post_init__(self)

    def dataset(self, split: str) -> PoseData:
        """Augmented crops of "train", plain crops of "val"."""
        people, _ = self.people(split)
        augmentation = self.augmentation if split == "train" else None
        return PoseData(people, self.codec, augmentation, self.joint_set(), self.max_pixels)

    def crops(self, count: int, *, augment: bool) -> Tensor:
        """The first people of "train", plain or as training sees them, normalised, [count, 3, h, w]."""
        people, _ = self.people("train")
        augmentation = self.augmentation if augment else None
        data = Seeded(PoseData(people[:count], self.codec, augmentation, self.joint_set(), self.max_pixels), seed=0)
        return self.normalised(torch.stack([data[0, i]["image"] for i in range(min(count, len(people)))]))

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 crops as the network takes them."""
        return normalised(images, self.mean, self.std)

    def example(self) -> Tensor:
        """An input of the network."""
        width, height = self.codec.input_size
        return torch.zeros(1, 3, height, width)

    def build(self) -> nn.Module:
        """The network, with the weights where a file is named, and quantizers if bits are given."""
        network = self._network()
        named = self.weights is not None and self.weights != starting.LITE0
        saved = checkpoint.weights(Path(str(self.weights))) if named else None
        if self.weights is not None and (saved is None or not has_quantizers(saved)):
            line = starting.start(network, self.weights)
            if not distributed.rank():
                print(line, flush=True)
        return self.loaded(network, saved)

    def _network(self) -> nn.Module:
        takes = inspect.signature(self.network).parameters
        any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes.values())
        joints = {"joints": self.joint_set()} if "joints" in takes or any_name else {}
        return self.network(codec=self.codec, **joints)

    def as_trained(self, state: Mapping[str, Any]) -> PoseTask:
        """The task of a checkpoint's network: its joints, where it names them and no others are asked for."""
        joints = starting.joints_of(state) if self.joints is None else None
        return replace(self, weights=None, joints=joints or self.joints)

    def about(self) -> dict[str, Any]:
        """What whoever uses the weights must know, in plain containers: how crops are made, how answers are read."""
        return {
            "task": self.name,
            "size": list(self.codec.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "codec": {"name": type(self.codec).__name__, **asdict(self.codec)},
            "joints": asdict(self.joint_set()),
        }

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The codec's loss."""
        return self.codec.loss(model(self.normalised(batch["image"])).float(), batch["target"], batch["weight"])

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], out: Path | None = None) -> dict[str, float]:
        """COCO's ten figures, and PCK and AUC where one sigma stands for all joints; -1 where nobody is annotated.

        Into `out` go keypoints.json, the poses as COCO results, predictions.png, some typical, best and worst ones, and
        errors.png and errors.json, where the errors are.
        """
        people, annotations = self.people("val")
        found = self.results(model, batches, people)
        truth, joints = annotations.truth(), self.joint_set()
        if out is not None and not distributed.rank():
            limits = {"max_pixels": self.max_pixels, "threshold": self.score_threshold}
            report.write(out, annotations, truth, found, joints, **limits)  # type: ignore[arg-type]
        figures = evaluate.coco_figures(truth, found, joints)
        return figures | (errors.figures(truth, found, joints) if joints.unmeasured else {})

    def results(self, model: nn.Module, batches: Iterable[Batch], people: People) -> list[dict[str, Any]]:
        """COCO keypoint results of the people, whose crops come in batches; pictures are numbered from 1."""
        indices, joints, joint_scores = [], [], []
        for batch in batches:
            prediction = self._prediction(model, self.normalised(batch["image"]))
            keypoints, scores = self.codec.decode(prediction.float().cpu().numpy())
            indices.append(batch["index"].cpu().numpy())
            joints.append(keypoints)
            joint_scores.append(scores)
        indices, joints, joint_scores = (distributed.gathered(found) for found in (indices, joints, joint_scores))
        if not indices:
            return []
        seen = people.chosen(np.concatenate(indices))
        decoded, codec = np.concatenate(joints).astype(np.float64), self.codec
        keypoints, areas = transforms.to_pictures(decoded, seen.boxes, codec.input_size, codec.span)
        return oks.results(
            seen.picture + 1,
            keypoints,
            np.concatenate(joint_scores).astype(np.float64),
            seen.scores,
            areas,
            sigmas=np.array(self.joint_set().sigmas),
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            soft_nms=self.soft_nms,
        )

    def _prediction(self, model: nn.Module, images: Tensor) -> Tensor:
        prediction = model(images)
        if not self.flip_test:
            return prediction
        mirrored = self.codec.unmirror(model(images.flip(3)))[:, list(self.joint_set().mirrored)]
        return (prediction + mirrored) / 2
