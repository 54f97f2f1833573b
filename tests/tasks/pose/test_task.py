"""The pose task: its data, its network, its loss and its evaluation, on people drawn for the purpose."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tasks.errors import UserError
from tasks.pose import draw, errors, predict, report, sample, transforms
from tasks.pose.codec import Codec, Heatmap, SimCC, UDPHeatmap
from tasks.pose.data import PoseData, read_picture
from tasks.pose.joints import COCO
from tasks.pose.model import HeatmapHRNet, SimCCNet, hrnet, resnet
from tasks.pose.people import People, Person
from tasks.pose.task import PoseTask

SMALL = partial(HeatmapHRNet, "hrnet_w32", widths=(8, 16, 32, 64), modules=(1, 1, 1), blocks=1)
MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
FLAT = partial(hrnet, widths=(4, 8, 8, 8), modules=(1, 1, 1), blocks=1)
FLAT_HEATMAPS = partial(HeatmapHRNet, widths=(4, 8, 8, 8), modules=(1, 1, 1), blocks=1)
CODEC = Heatmap((96, 128), (24, 32), sigma=1.5, unbiased=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    for seed, split in enumerate(("train", "val")):
        sample.write_split(folder, split, 12, np.random.default_rng([9, seed]))
    return folder


def batches(data: PoseData, size: int = 5) -> Any:
    return torch.utils.data.DataLoader(data, batch_size=size)


class Oracle(nn.Module):
    """Knows the truth: targets of the annotated joints, of a crop and of its mirror image."""

    def __init__(self, data: PoseData, codec: Codec) -> None:
        super().__init__()
        self.targets: dict[bytes, torch.Tensor] = {}
        for i, person in enumerate(data.people):
            centre, extent = transforms.box_to_centre(person.box)
            matrix = transforms.affine(centre, transforms.fit_aspect(extent, codec.input_size), 0.0, codec.span)
            points, labelled = transforms.apply(matrix, person.keypoints[:, :2]), person.keypoints[:, 2] > 0
            image = data[i]["image"]
            self.targets[image.numpy().tobytes()] = torch.from_numpy(codec.encode(points.astype(np.float32), labelled)[0])
            mirrored = (points * [-1, 1] + [codec.input_size[0] - 1, 0])[list(COCO.mirrored)].astype(np.float32)
            target, _ = codec.encode(mirrored, labelled[list(COCO.mirrored)])
            self.targets[image.flip(2).numpy().tobytes()] = torch.from_numpy(target)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        pixels = (images * STD + MEAN).round().to(torch.uint8)
        return torch.stack([self.targets[image.numpy().tobytes()] for image in pixels])


def test_flipping_moves_no_joint(root: Path) -> None:
    """Kills: heatmaps of the mirror image that are averaged where they do not lie."""
    bias = {}
    for flip, shift in ((False, True), (True, True), (True, False)):
        task = PoseTask(root=str(root), codec=replace(CODEC, shift_heatmap=shift), flip_test=flip)
        data = task.dataset("val")
        model = Oracle(data, CODEC)
        crops = torch.stack([data[i]["image"] for i in range(len(data))])
        decoded, _ = CODEC.decode(task._prediction(model, (crops - MEAN) / STD).numpy())
        seen = np.array([person.keypoints[:, 2] > 0 for person in data.people])
        bias[flip, shift] = decoded[seen][:, 0]
    shifted, unshifted = (float(np.median(bias[True, s] - bias[False, True])) for s in (True, False))
    udp = UDPHeatmap((96, 128), (24, 32), sigma=1.5)
    both = []
    for flip in (False, True):
        task = PoseTask(root=str(root), codec=udp, flip_test=flip)
        data = task.dataset("val")
        crops = torch.stack([data[i]["image"] for i in range(len(data))])
        both.append(udp.decode(task._prediction(Oracle(data, udp), (crops - MEAN) / STD).numpy())[0])
    assert np.abs(both[0] - both[1])[seen].max() < 0.1
    assert shifted == pytest.approx(4 / 8, abs=0.2)  # an eighth of a cell, in pixels of the crop
    assert unshifted == pytest.approx(-4 * 3 / 8, abs=0.2)


@pytest.mark.parametrize("codec", [CODEC, SimCC((96, 128), sigma=3.0), UDPHeatmap((96, 128), (24, 32), sigma=1.5)])
@pytest.mark.parametrize("flip_test", [False, True])
def test_the_truth_scores_full_marks(root: Path, flip_test: bool, codec: Codec) -> None:
    """Crop, encode, flip, decode and map back are one another's inverses. Kills: any slip in the geometry or the flip."""
    # Scores of true SimCC labels lie below the threshold that is meant for logits.
    task = PoseTask(root=str(root), codec=codec, flip_test=flip_test, score_threshold=0.0)
    data = task.dataset("val")
    figures = task.evaluate(Oracle(data, codec), batches(data))
    assert figures["AP"] > 0.98, figures


def test_limit(root: Path) -> None:
    """The first N people of each split, measured against these alone. Kills: the others counted as missed."""
    task = PoseTask(root=str(root), codec=CODEC, limit=4)
    assert len(task.dataset("train")) == 4
    data = task.dataset("val")
    assert task.evaluate(Oracle(data, CODEC), batches(data))["AR"] > 0.98


def test_held_out_people(root: Path) -> None:
    """People of other training pictures, measured against these alone. Kills: an overlap, others counted as missed."""
    task = PoseTask(root=str(root), codec=CODEC, held_out=0.25)
    training, held = task.dataset("train"), task.dataset("val")
    whole = PoseTask(root=str(root), codec=CODEC).dataset("train")
    assert len(training) + len(held) == len(whole) and 0 < len(held) < len(training)
    files = [{person.picture for person in data.people} for data in (training, held)]
    assert not files[0] & files[1] and all("train2017" in str(file) for file in files[1])
    assert task.evaluate(Oracle(held, CODEC), batches(held))["AR"] > 0.98
    with pytest.raises(ValueError, match=r"held_out must lie in \[0, 1\), got -1"):
        PoseTask(held_out=-1)


def test_detections(root: Path, tmp_path: Path) -> None:
    """Boxes of a detector, with their scores; a second box on the same person is dropped by OKS-NMS."""
    annotated = PoseTask(root=str(root), codec=CODEC).dataset("val")
    detections = [{"image_id": p.image_id, "category_id": 1, "bbox": p.box.tolist(), "score": 0.9} for p in annotated.people]
    detections.append({**detections[0], "score": 0.8})
    detections.append({**detections[0], "category_id": 3})
    file = tmp_path / "detections.json"
    file.write_text(json.dumps(detections))
    task = PoseTask(root=str(root), codec=CODEC, detections=str(file))
    data = task.dataset("val")
    assert len(data) == 13
    found = task.results(Oracle(annotated, CODEC), batches(data), data.people)
    assert len(found) == 12
    assert 0.5 < found[0]["score"] <= 0.9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no person's box"),
        ({"images": []}, "not a COCO results file"),
        ([{"image_id": 1, "bbox": [0, 0, 9]}], "not a COCO results file"),
        ([{"image_id": 1, "bbox": [0, 0, 9, 9]}], "KeyError 'score'"),
        ([{"image_id": 1, "bbox": [0, 0, 9, 9], "score": 1, "category_id": 3}], "no person's box"),
        ([{"image_id": 77, "bbox": [0, 0, 9, 9], "score": 1}], "no person's box"),
    ],
)
def test_broken_detections(root: Path, tmp_path: Path, content: Any, message: str) -> None:
    """The error names the file and the rule."""
    file = tmp_path / "detections.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"detections\.json: .*{message}"):
        PoseTask(root=str(root), codec=CODEC, detections=str(file)).dataset("val")


def test_pictures_of_an_evaluation(root: Path, tmp_path: Path) -> None:
    """With a folder, and the same figures. Kills: joints drawn in the picture's place of the crop's."""
    task = PoseTask(root=str(root), codec=CODEC)
    data = task.dataset("val")
    oracle = Oracle(data, CODEC)
    assert task.evaluate(oracle, batches(data), tmp_path) == task.evaluate(oracle, batches(data))
    names = {"errors.json", "errors.png", "keypoints.json", "predictions.png"}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert json.loads((tmp_path / "errors.json").read_text())["pck"] > 0.99
    _, annotations = task.people("val")
    found = task.results(oracle, batches(data), data.people)

    def drawn(poses: list[dict[str, Any]]) -> draw.Picture:
        return report.examples(annotations, errors.matched(annotations.truth(), poses), COCO, max_pixels=10**9, count=3)

    sheet = drawn(found)
    legend = sheet.shape[0] - 3 * (256 + 26)
    assert legend in (26, 52) and sheet.shape[1:] == (3 * (192 + 3), 3)
    for colour in (draw.LEFT, draw.RIGHT, draw.MIDDLE, draw.WHITE):
        assert (sheet[:legend] == colour).all(axis=2).any()
    moved = [{**pose, "keypoints": [v + 9 for v in pose["keypoints"]]} for pose in found]
    white = [(drawn(f) == draw.WHITE).all(axis=2).sum() for f in (found, moved)]
    assert white[0] + 200 < white[1], "a true pose hides the truth"


def test_predict(root: Path) -> None:
    """Frames of any pictures give what `results` says of a split. Kills: crops of another box, poses under another frame."""
    task = PoseTask(root=str(root), codec=CODEC)
    data = task.dataset("val")
    oracle = Oracle(data, CODEC)
    frames = [
        predict.Frame(100 + person.image_id, read_picture(person.picture), person.box[None], np.ones(1))
        for person in data.people
    ]
    nobody = predict.Frame(5, frames[0].picture, np.empty((0, 4)), np.empty(0))
    frames.insert(3, nobody)
    answers = list(predict.poses(task, [oracle, oracle], frames, torch.device("cpu")))
    assert [frame.number for frame, _ in answers] == [frame.number for frame in frames]
    found = [{**pose, "image_id": pose["image_id"] - 100} for _, (first, _) in answers for pose in first]
    assert found == task.results(oracle, batches(data), data.people)
    assert answers[3][1] == [[], []]


def test_training_items(root: Path) -> None:
    """Shapes, and joints that stay on the person whatever the view."""
    data = PoseTask(root=str(root), codec=CODEC).dataset("train")
    np.random.seed(0)
    item = data[0]
    assert item["image"].shape == (3, 128, 96)
    assert item["image"].dtype == torch.uint8
    assert item["target"].shape == (17, 32, 24)
    assert item["weight"].shape == (17,)


def test_flipped_item_is_the_mirror(root: Path) -> None:
    """Kills: joints flipped without swapping left and right."""
    from tasks.pose.transforms import Augmentation

    still = {"half_body": 0.0, "shift_probability": 0.0, "scale": (1.0, 1.0), "rotation": 0.0}
    plain, flipped = (
        PoseTask(
            root=str(root), codec=Heatmap((96, 128), (24, 32), sigma=2.0), augmentation=Augmentation(flip=f, **still)
        ).dataset("train")[3]  # type: ignore[arg-type]
        for f in (0.0, 1.0)
    )
    difference = (plain["image"].flip(2).float() - flipped["image"].float()).abs()
    # The crop's middle lies half a pixel from the mirror's, so compare joints: within a cell.
    a, b = (i["target"].flatten(1).argmax(1) for i in (plain, flipped))
    expected = 23 - a[list(COCO.mirrored)] % 24
    seen = plain["weight"][list(COCO.mirrored)] > 0
    assert ((b % 24 - expected)[seen].abs() <= 1).all()
    assert difference.mean() < 30


def test_masked_loss(root: Path) -> None:
    """Mean over all cells, unlabelled joints as 0. Kills: a mean over the labelled ones, a forgotten mask."""
    task = PoseTask(root=str(root), codec=CODEC)
    batch = {
        "image": torch.zeros(2, 3, 128, 96, dtype=torch.uint8),
        "target": torch.ones(2, 17, 32, 24),
        "weight": torch.zeros(2, 17),
    }
    batch["weight"][0, :5] = 1
    model = nn.Conv2d(3, 17, 1).requires_grad_(False)
    model = nn.Sequential(nn.AvgPool2d(4), model)
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    nn.init.constant_(model[1].bias, 3.0)  # type: ignore[arg-type]
    assert task.loss(model, batch).item() == pytest.approx(4.0 * 5 / 34)


def test_every_parameter_gets_a_gradient() -> None:
    """What the last fusion makes for the other branches is gone: DDP would wait for it."""
    model = SMALL()
    assert model(torch.randn(2, 3, 128, 96)).shape == (2, 17, 32, 24)
    model(torch.randn(2, 3, 128, 96)).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Conv2d)])
    assert 0.0009 < float(weights.detach().std()) < 0.0011


@pytest.mark.parametrize(
    ("backbone", "deconvs"),
    [
        (partial(resnet, "resnet18"), (32, 32)),
        (partial(resnet, "resnet18", stages=3), (32,)),
        (partial(resnet, "resnet18"), ()),
        (partial(hrnet, widths=(4, 8, 8, 8), modules=(1, 1, 1), blocks=1), ()),
    ],
)
def test_simcc_networks(backbone: Any, deconvs: tuple[int, ...]) -> None:
    """Logits of every bin whatever the backbone's stride, and a gradient for every parameter."""
    codec = SimCC((96, 128), sigma=3.0)
    model = SimCCNet(codec, backbone, deconvs)
    logits = model(torch.randn(2, 3, 128, 96))
    assert logits.shape == (2, 17, 192 + 256)
    logits.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(("x", "y"), [(2, 5), (7, 0), (0, 7)])
def test_simcc_starts_as_a_heatmap(x: int, y: int) -> None:
    """A lone cell of the maps is found where it lies. Kills: rows read as columns, bins off by a cell."""
    codec = SimCC((64, 48), sigma=2.0)
    model = SimCCNet(codec, partial(resnet, "resnet18", stages=3), (4,))
    maps = torch.zeros(1, 17, 6, 8)
    maps[:, :, min(y, 5), x] = 1.0
    flat = maps.flatten(2)
    found, _ = codec.decode(torch.cat([model.columns(flat), model.rows(flat)], dim=2).detach().numpy())
    assert np.abs(found[0, 0] - [8 * x + 4, 8 * min(y, 5) + 4]).max() <= 0.5 + 4 * (x in (0, 7) or y in (0, 7))


def test_simcc_learns_one_batch(root: Path) -> None:
    """Joints of four crops are found after some steps. Kills: a loss whose sign or whose axes are wrong."""
    torch.manual_seed(0)
    task = PoseTask(root=str(root), codec=SimCC((96, 128), sigma=3.0), network=partial(SimCCNet, backbone=FLAT, deconvs=()))
    np.random.seed(0)
    batch = torch.utils.data.default_collate([task.dataset("train")[i] for i in range(4)])
    model = task.build()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found, _ = task.codec.decode(model((batch["image"] - MEAN) / STD).numpy())
    true, _ = task.codec.decode(batch["target"].numpy())
    distance = np.linalg.norm(found - true, axis=2)[batch["weight"].numpy() > 0]
    assert np.median(distance) < 3


def test_heatmaps_must_be_a_quarter() -> None:
    """The error names the rule. Kills: a size that fails inside the loss."""
    with pytest.raises(ValueError, match="heatmap_size must be a quarter of input_size"):
        PoseTask(codec=Heatmap((96, 128), (48, 64)), network=SMALL).build()


@pytest.mark.parametrize(("variant", "count"), [("hrnet_w32", 28.5e6), ("hrnet_w48", 63.6e6)])
def test_published_sizes(variant: str, count: float) -> None:
    """mmpose's parameter counts of HRNet-W32 and W48."""
    with torch.device("meta"):
        model = HeatmapHRNet(variant)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0.005)


def test_backbone_weights(tmp_path: Path) -> None:
    """ImageNet weights from a file: loaded, or refused with the first tensor that is missing."""
    torch.manual_seed(0)
    source = SMALL()
    path = tmp_path / "weights.pth"
    torch.save({**source.backbone.state_dict(), "classifier.weight": torch.zeros(2)}, path)
    loaded = PoseTask(network=SMALL, weights=str(path)).build()
    assert torch.equal(loaded.backbone.conv1.weight, source.backbone.conv1.weight)  # type: ignore[union-attr]
    torch.save({}, path)
    with pytest.raises(UserError, match=r"weights\.pth: lacks .* tensors: conv1\.weight"):
        PoseTask(network=SMALL, weights=str(path)).build()


def test_missing_picture(tmp_path: Path) -> None:
    """The error names the file."""
    person = Person(tmp_path / "gone.jpg", 1, np.array([0.0, 0.0, 9.0, 9.0]), 1.0, np.ones((17, 3)))
    with pytest.raises(UserError, match=r"gone\.jpg: no such picture"):
        PoseData(People.of([person]), CODEC)[0]


def test_sample_is_deterministic(tmp_path: Path) -> None:
    """The same generator draws the same people; another one others. Boxes hold the person, areas are the mask's."""
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample.write_split(tmp_path / name, "val", 3, np.random.default_rng(seed))
    texts = [(tmp_path / n / "annotations/person_keypoints_val2017.json").read_text() for n in "abc"]
    assert texts[0] == texts[1] != texts[2]
    pixels = [(tmp_path / n / "val2017/000000000001.jpg").read_bytes() for n in "abc"]
    assert pixels[0] == pixels[1] != pixels[2]
    for annotation in json.loads(texts[0])["annotations"]:
        x, y, width, height = annotation["bbox"]
        triples = np.array(annotation["keypoints"]).reshape(-1, 3)
        inside = triples[triples[:, 2] > 0]
        assert annotation["num_keypoints"] == len(inside) >= 8
        assert (inside[:, 0] >= x - 1).all() and (inside[:, 0] <= x + width + 1).all()
        assert (inside[:, 1] >= y - 1).all() and (inside[:, 1] <= y + height + 1).all()
        assert 0.1 * width * height < annotation["area"] <= width * height


def test_quantized_network(root: Path, tmp_path: Path) -> None:
    """Bits make a fake-quantized network that loads its own weights; step sizes are never perturbed.

    Kills: quantizers that are asked for and left out, a whole model taken for a backbone.
    """
    from tasks.quant.calibrate import calibrate
    from tasks.quant.prepare import QuantLayer

    task = PoseTask(root=str(root), codec=CODEC, network=FLAT_HEATMAPS, weight_bits=8, act_bits=8)
    torch.manual_seed(0)
    model = task.build()
    assert sum(isinstance(module, QuantLayer) for module in model.modules()) > 20
    inputs = task.crops(3, augment=False)
    assert inputs.shape == (3, 3, 128, 96)
    calibrate(model, [inputs])
    torch.save(model.state_dict(), tmp_path / "ptq.pt")
    again = replace(task, weights=str(tmp_path / "ptq.pt")).build()
    with torch.no_grad():
        assert torch.equal(model.eval()(inputs), again.eval()(inputs))
    assert [group.get("sam_rho") for group in task.parameters(model) if group.get("sam_rho") is not None] == [0.0]
    assert not any(isinstance(module, QuantLayer) for module in task.in_float().build().modules())
    with pytest.raises(ValueError, match="weight_bits must be 2 to 8"):
        PoseTask(weight_bits=9, act_bits=8)
    with pytest.raises(UserError, match="give both"):
        replace(task, act_bits=None).build()
