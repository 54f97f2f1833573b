"""The same weights in mmpose 1.3.2 and here, on the same people.

    python tests/tasks/pose/mmpose_parity.py --root data/coco

Prints, for HRNet on plain heatmaps and on UDP's, SimCC-ResNet18 and SimpleBaseline, how far apart the two are in crops,
targets, outputs, loss, and AP with the flip test. The weights are fitted here to the very people for some steps, so that the
figures are not those of noise; they go to mmpose through a file of `tasks.pose.mmpose_weights`. Needs the environment that
`make mmpose` makes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from tasks.pictures import normalised
from tasks.pose import mmpose_weights as weights
from tasks.pose.codec import Heatmap, SimCC, UDPHeatmap
from tasks.pose.data import PoseData
from tasks.pose.model import HeatmapHRNet, SimCCNet, resnet
from tasks.pose.task import PoseTask
from tasks.pose.timm_networks import TimmHeatmap
from tasks.pose.transforms import Augmentation

STILL = Augmentation(flip=0.0, half_body=0.0, shift_probability=0.0, scale=(1.0, 1.0), rotation_probability=0.0)
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
SIZE, WIDTHS, MODULES, BLOCKS, DECONVS = (96, 128), (8, 16, 32, 64), (1, 1, 1), 2, (64, 64)


def hrnet_task(root: Path) -> PoseTask:
    """The small HRNet on biased heatmaps, as mmpose's configs have it."""
    network = partial(HeatmapHRNet, widths=WIDTHS, modules=MODULES, blocks=BLOCKS)
    return PoseTask(root=str(root), codec=Heatmap(SIZE, (24, 32), sigma=2.0), network=network, augmentation=STILL)


def simcc_task(root: Path) -> PoseTask:
    """SimCC on ResNet-18 with narrow deconvolutions."""
    network = partial(SimCCNet, backbone=partial(resnet, "resnet18"), deconvs=DECONVS)
    return PoseTask(root=str(root), codec=SimCC(SIZE, sigma=3.0), network=network, augmentation=STILL)


def udp_task(root: Path) -> PoseTask:
    """The small HRNet on UDP's heatmaps."""
    return replace(hrnet_task(root), codec=UDPHeatmap(SIZE, (24, 32), sigma=2.0))


def baseline_task(root: Path) -> PoseTask:
    """SimpleBaseline on ResNet-18 with narrow deconvolutions."""
    network = partial(TimmHeatmap, "resnet18", deconvs=(*DECONVS, 64))
    return PoseTask(root=str(root), codec=Heatmap(SIZE, (24, 32), sigma=2.0), network=network, augmentation=STILL)


def hrnet_there() -> dict[str, Any]:
    """mmpose's config of `hrnet_task`'s network."""

    def stage(branches: int, modules: int, block: str, widths: tuple[int, ...]) -> dict[str, Any]:
        return {
            "num_modules": modules,
            "num_branches": branches,
            "block": block,
            "num_blocks": (BLOCKS,) * branches,
            "num_channels": widths,
        }

    extra = {"stage1": stage(1, 1, "BOTTLENECK", (64,))}
    for number in (2, 3, 4):
        extra[f"stage{number}"] = stage(number, MODULES[number - 2], "BASIC", WIDTHS[:number])
    codec = {"type": "MSRAHeatmap", "input_size": SIZE, "heatmap_size": (24, 32), "sigma": 2}
    head = {
        "type": "HeatmapHead",
        "in_channels": WIDTHS[0],
        "out_channels": 17,
        "deconv_out_channels": None,
        "loss": {"type": "KeypointMSELoss", "use_target_weight": True},
        "decoder": codec,
    }
    backbone = {"type": "HRNet", "in_channels": 3, "extra": extra}
    test = {"flip_test": True, "flip_mode": "heatmap", "shift_heatmap": True}
    return {"backbone": backbone, "head": head, "test_cfg": test}


def simcc_there() -> dict[str, Any]:
    """mmpose's config of `simcc_task`'s network."""
    codec = {"type": "SimCCLabel", "input_size": SIZE, "sigma": 3.0, "simcc_split_ratio": 2.0}
    head = {
        "type": "SimCCHead",
        "in_channels": 512,
        "out_channels": 17,
        "input_size": SIZE,
        "in_featuremap_size": tuple(side // 32 for side in SIZE),
        "simcc_split_ratio": 2.0,
        "deconv_out_channels": DECONVS,
        "deconv_kernel_sizes": (4,) * len(DECONVS),
        "deconv_num_groups": (1,) * len(DECONVS),
        "loss": {"type": "KLDiscretLoss", "use_target_weight": True},
        "decoder": codec,
    }
    return {"backbone": {"type": "ResNet", "depth": 18}, "head": head, "test_cfg": {"flip_test": True}}


def udp_there() -> dict[str, Any]:
    """mmpose's config of `udp_task`'s network."""
    there = hrnet_there()
    there["head"]["decoder"] = {"type": "UDPHeatmap", "input_size": SIZE, "heatmap_size": (24, 32), "sigma": 2}
    there["test_cfg"]["shift_heatmap"] = False
    return there


def baseline_there() -> dict[str, Any]:
    """mmpose's config of `baseline_task`'s network."""
    there = hrnet_there()
    widths = (*DECONVS, 64)
    there["head"] |= {"in_channels": 512, "deconv_out_channels": widths, "deconv_kernel_sizes": (4,) * len(widths)}
    return {**there, "backbone": {"type": "ResNet", "depth": 18}}


CASES: dict[str, tuple[Callable[[Path], PoseTask], Callable[[], dict[str, Any]]]] = {
    "heatmap HRNet": (hrnet_task, hrnet_there),
    "SimCC-ResNet18": (simcc_task, simcc_there),
    "UDP HRNet": (udp_task, udp_there),
    "SimpleBaseline-ResNet18": (baseline_task, baseline_there),
}


def fitted(task: PoseTask, steps: int) -> nn.Module:
    """Our network after some steps on the people of "val", in evaluation mode."""
    torch.manual_seed(0)
    model = task.build()
    people, _ = task.people("val")
    loader = DataLoader(PoseData(people, task.codec, STILL), batch_size=16, shuffle=True, drop_last=len(people) > 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    step = 0
    while step < steps:
        for batch in loader:
            optimizer.zero_grad()
            task.loss(model, batch).backward()
            optimizer.step()
            step += 1
    return model.eval()


def their_figures(theirs: Any, plain: Any, metric: Any) -> dict[str, float]:
    """What mmpose's own evaluation says of its network on a data set."""
    metric.dataset_meta = plain.metainfo
    for item in plain:
        with torch.no_grad():
            samples = theirs.test_step({"inputs": [item["inputs"]], "data_samples": [item["data_samples"]]})
        metric.process({}, [sample.to_dict() for sample in samples])
    return metric.evaluate(len(plain))


def their_evaluation() -> type:
    """pycocotools' evaluation under the name that mmpose looks for."""
    from pycocotools.cocoeval import COCOeval

    class Evaluation(COCOeval):
        """With the two arguments that xtcocotools adds to pycocotools."""

        def __init__(self, truth: Any, found: Any, kind: str, sigmas: Any, use_area: bool) -> None:
            assert use_area
            super().__init__(truth, found, kind)
            self.params.kpt_oks_sigmas = np.array(sigmas)

    return Evaluation


def give_weights(model: nn.Module, theirs: Any) -> None:
    """Our weights to mmpose's network, by the file that it would be sent."""
    from mmengine.runner import load_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pth"
        torch.save(model.state_dict(), Path(folder) / "ours.pth")
        weights.main([f"{folder}/ours.pth", str(file)])
        load_checkpoint(theirs, str(file), map_location="cpu", strict=True)


def compare(name: str, root: Path, steps: int) -> dict[str, tuple[float, float]]:
    """What mmpose says and what we say: figure -> (theirs, ours); of crops, targets and outputs, (largest difference, 0)."""
    from mmengine import init_default_scope
    from mmpose.datasets import CocoDataset
    from mmpose.evaluation.metrics import CocoMetric, coco_metric
    from mmpose.registry import MODELS
    from mmpose.utils import register_all_modules

    coco_metric.COCOeval = their_evaluation()
    register_all_modules(init_default_scope=False)
    init_default_scope("mmpose")
    make_task, make_theirs = CASES[name]
    task, config = make_task(root), make_theirs()
    model = fitted(task, steps)
    config["data_preprocessor"] = {"type": "PoseDataPreprocessor", "mean": MEAN, "std": STD, "bgr_to_rgb": True}
    theirs: Any = MODELS.build({"type": "TopdownPoseEstimator", **config})
    give_weights(model, theirs)
    theirs.eval()

    def dataset(*steps: dict[str, Any], test: bool) -> Any:
        udp = isinstance(task.codec, UDPHeatmap)
        affine = {"type": "TopdownAffine", "input_size": SIZE, "use_udp": udp}
        pipeline = [{"type": "LoadImage"}, {"type": "GetBBoxCenterScale"}, affine]
        return CocoDataset(
            data_root=str(root),
            ann_file="annotations/person_keypoints_val2017.json",
            data_prefix={"img": "val2017/"},
            data_mode="topdown",
            test_mode=test,
            pipeline=[*pipeline, *steps, {"type": "PackPoseInputs"}],
        )

    labelled = dataset({"type": "GenerateTarget", "encoder": config["head"]["decoder"]}, test=False)
    people, _ = task.people("val")
    listed = json.loads((root / "annotations/person_keypoints_val2017.json").read_text())["annotations"]
    place = {listed[person.annotation]["id"]: i for i, person in enumerate(people)}
    data = PoseData(people, task.codec, STILL)
    worst = dict.fromkeys(("crops", "targets", "outputs"), 0.0)
    losses = np.zeros(2)
    assert len(labelled) == len(people), f"mmpose sees {len(labelled)} people, we see {len(people)}"
    for item in labelled:
        sample = item["data_samples"]
        ours = {key: value[None] for key, value in data[place[sample.id]].items()}
        packed = theirs.data_preprocessor({"inputs": [item["inputs"]], "data_samples": [sample]}, False)
        inputs = packed["inputs"]
        if hasattr(sample, "gt_fields"):
            target = sample.gt_fields.heatmaps[None]
        else:
            labels = sample.gt_instance_labels
            target = torch.cat([labels.keypoint_x_labels, labels.keypoint_y_labels], dim=2)
        with torch.no_grad():
            output = theirs.head(theirs.extract_feat(inputs))
            output = torch.cat(output, dim=2) if isinstance(output, tuple) else output
            prediction = model(inputs)
            losses += [theirs.loss(inputs, packed["data_samples"])["loss_kpt"].item(), task.loss(model, ours).item()]
        for key, a, b in (
            ("crops", inputs, normalised(ours["image"])),
            ("targets", target, ours["target"]),
            ("outputs", output, prediction),
        ):
            worst[key] = max(worst[key], (a - b).abs().max().item())

    figures = their_figures(
        theirs, dataset(test=True), CocoMetric(ann_file=str(root / "annotations/person_keypoints_val2017.json"))
    )
    with torch.no_grad():
        our_figures = task.evaluate(model, DataLoader(task.dataset("val"), batch_size=16))
    pairs = {key: (difference, 0.0) for key, difference in worst.items()}
    pairs["loss"] = (float(losses[0] / len(people)), float(losses[1] / len(people)))
    for key, name_there in (("AP", "AP"), ("AP50", "AP .5"), ("AP75", "AP .75"), ("AR", "AR")):
        pairs[key] = (float(figures[f"coco/{name_there}"]), our_figures[key])
    return pairs


def main() -> None:
    """Print the table of both networks; exit with 1 where the two differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("data/coco"), help="folder in COCO's layout; default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="of fitting; default: %(default)s")
    arguments = parser.parse_args()
    apart = False
    for name in CASES:
        pairs = compare(name, arguments.root, arguments.steps)
        print(f"\n{name:20} {'mmpose':>12} {'ours':>12} {'difference':>12}")
        for key, (there, here) in pairs.items():
            shown = f"{there:12.6f} {here:12.6f}" if key not in ("crops", "targets", "outputs") else " " * 25
            print(f"{key:20} {shown} {abs(there - here):12.2e}", flush=True)
            # A crop's pixels may be rounded to the next grey level: mmpose's matrix has 32 bits.
            apart |= abs(there - here) > (1.01 / min(STD) if key == "crops" else 1e-5)
    sys.exit(apart)


if __name__ == "__main__":
    main()
