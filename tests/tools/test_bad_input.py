"""Every way of giving the tools something wrong: exit code 2, one or two lines that name the culprit, no traceback."""

from __future__ import annotations

import copy
import json
import pickle
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tasks import checkpoint
from tasks.config import describe, load, override
from tasks.pose import sample
from tasks.pose.model import HeatmapHRNet
from tests.tools.test_commands import FAST, ROOT, SMALL, TINY, inside

QUANT = str(ROOT / "configs/quant/resnet18_w4a4_arsam.py")
FLOAT = str(ROOT / "configs/quant/cifar10_resnet18_sgd.py")
POSE = ["train", SMALL, *FAST, "epochs=1"]
IMAGES = [
    "train",
    FLOAT,
    "epochs=1",
    "batch_size=2",
    "num_workers=0",
    "task.model=test_resnet",
    "task.stem=model",
    "task.side=32",
]
EVAL = ["eval", SMALL, *FAST, "task.root=W/people"]
PREDICT = ["predict", SMALL, *TINY, "W/people/val2017/000000000001.jpg"]
QUANTIZE = ["quantize", "task.model=test_resnet", "task.limit=20", "--out", "run"]


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def huge_png(side: int = 30_000) -> bytes:
    """A header that promises 900 million pixels, and a few bytes of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


def whole_jpeg() -> bytes:
    """A picture of noise."""
    import io

    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


JPEG = whole_jpeg()
PICTURES = {"empty": b"", "text": b"no picture", "cut": JPEG[: len(JPEG) // 2], "huge": huge_png()}

# name -> what becomes of a good annotation file
ANNOTATIONS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "nine-values": lambda d: d["annotations"][0].update(keypoints=[0] * 9),
    "nowhere": lambda d: d["annotations"][0].update(image_id=10**6),
    "no-image-id": lambda d: d["annotations"][0].pop("image_id"),
    "nan-box": lambda d: d["annotations"][0]["bbox"].__setitem__(0, float("nan")),
    "inf-box": lambda d: d["annotations"][0]["bbox"].__setitem__(2, float("inf")),
    "negative-box": lambda d: d["annotations"][0]["bbox"].__setitem__(2, -5),
    "three-box": lambda d: d["annotations"][0]["bbox"].pop(),
    "text-box": lambda d: d["annotations"][0].update(bbox=["a", "b", "c", "d"]),
    "nan-joint": lambda d: d["annotations"][0]["keypoints"].__setitem__(0, float("nan")),
    "text-joint": lambda d: d["annotations"][0]["keypoints"].__setitem__(0, "left"),
    "odd-crowd": lambda d: d["annotations"][0].update(iscrowd="no"),
    "negative-area": lambda d: d["annotations"][0].update(area=-1),
    "number": lambda d: d["annotations"].__setitem__(0, 5),
    "no-list": lambda d: d.update(annotations={"1": 2}),
    "images-no-list": lambda d: d.update(images=7),
    "no-name": lambda d: d["images"][0].pop("file_name"),
    "number-name": lambda d: d["images"][0].update(file_name=5),
    "climbing": lambda d: d["images"][0].update(file_name="../secret.jpg"),
    "absolute": lambda d: d["images"][0].update(file_name="/etc/passwd"),
}
RAW = {"torn": b'{"images": [', "list": b"[]", "nothing": b"", "binary": b"\xff\x00\xfe", "deep": b"[" * 200_000}
DETECTIONS = {
    "numbers": [1, 2],
    "boxless": [{"image_id": 1, "score": 1.0}],
    "nan": [{"image_id": 1, "bbox": [0, 0, float("nan"), 5], "score": 1.0}],
    "cats": [{"image_id": 1, "bbox": [0, 0, 5, 5], "score": 1.0, "category_id": 17}],
    "elsewhere": [{"image_id": 99, "bbox": [0, 0, 5, 5], "score": 1.0}],
}
CONFIGS = {
    "syntax": "config = (",
    "raises": "raise OSError('no luck')",
    "exits": "import sys; sys.exit(0)",
    "empty": "",
    "number": "config = 5",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that can be wrong with configs, data and checkpoints."""
    root = tmp_path_factory.mktemp("world")
    for seed, split in enumerate(("train", "val")):
        sample.write_split(root / "people", split, 6, np.random.default_rng([7, seed]))
    (root / "secret.jpg").write_bytes(JPEG)
    source = root / "people/annotations/person_keypoints_train2017.json"

    def data(name: str, content: bytes) -> None:
        (root / name / "annotations").mkdir(parents=True)
        (root / name / "annotations/person_keypoints_train2017.json").write_bytes(content)
        (root / name / "train2017").symlink_to(root / "people/train2017")

    for name, change in ANNOTATIONS.items():
        changed = copy.deepcopy(json.loads(source.read_text()))
        change(changed)
        data(name, json.dumps(changed).encode())
    for name, content in RAW.items():
        data(name, content)
    data("unseen", source.read_bytes())
    (root / "unseen/train2017").unlink()
    for name, content in {**PICTURES, "gone": None}.items():
        data(f"picture-{name}", source.read_bytes())
        folder = root / f"picture-{name}/train2017"
        folder.unlink()
        folder.mkdir()
        classes = root / f"class-{name}/train/a"
        classes.mkdir(parents=True)
        (classes / "whole.jpg").write_bytes(JPEG)
        for picture in (root / "people/train2017").iterdir() if content is not None else []:
            (folder / picture.name).write_bytes(content)
        if content is not None:
            (classes / "broken.jpg").write_bytes(content)
        (root / f"class-{name}/val").symlink_to(root / f"class-{name}/train")
    for number in range(12):
        (root / f"classes/train/{number}").mkdir(parents=True)
        (root / f"classes/train/{number}/a.jpg").write_bytes(JPEG)
    (root / "nothing-there/train").mkdir(parents=True)
    (root / "cifar/cifar-10-batches-py").mkdir(parents=True)
    (root / "cifar/cifar-10-batches-py/data_batch_1").write_bytes(pickle.dumps(Bomb(root / "marker")))
    (root / "cifar/cifar-10-batches-py/batches.meta").write_bytes(pickle.dumps(Bomb(root / "marker")))
    (root / "tar").mkdir()
    (root / "tar/train.tar").write_bytes(b"no tar")
    for name, found in DETECTIONS.items():
        (root / f"{name}.json").write_text(json.dumps(found))
    for name, text in CONFIGS.items():
        (root / f"{name}.py").write_text(text)
    (root / "text.txt").write_text("config = 5")
    checkpoints(root)
    return root


def checkpoints(root: Path) -> None:
    """Files that are no checkpoints, or not the right ones, and runs whose last.pt is such a file."""
    good = HeatmapHRNet(widths=(4, 8, 8, 8), modules=(1, 1, 1), blocks=1).state_dict()
    checkpoint.save(root / "good.pt", good)
    whole = bytearray((root / "good.pt").read_bytes())
    (root / "torn.pt").write_bytes(whole[: len(whole) // 2])
    place = whole.index(good["head.weight"].numpy().tobytes()) + 3
    whole[place] ^= 0x10
    (root / "flipped.pt").write_bytes(whole)
    (root / "text.pt").write_text("weights")
    (root / "empty.pt").write_bytes(b"")
    torch.save([1, 2], root / "list.pt")
    torch.save({1: torch.zeros(2)}, root / "numbers.pt")
    torch.save({"other.weight": torch.zeros(2)}, root / "other.pt")
    torch.save({**good, "head.weight": torch.zeros(1, 1, 1, 1)}, root / "shape.pt")
    torch.save({"model": Bomb(root / "marker")}, root / "bomb.pt")
    (root / "bare-bomb.pt").write_bytes(pickle.dumps({"model": Bomb(root / "marker")}))
    config = override(load(SMALL), [f"task.root={root}/people", *FAST, "epochs=1"])
    rubbish = {"config": describe(config), "progress": {"step": "seven"}, "model": 5}
    for name, content in (
        ("bomb", root / "bomb.pt"),
        ("weights", root / "good.pt"),
        ("text", root / "text.pt"),
        ("rubbish", None),
    ):
        (root / f"run-{name}").mkdir()
        (root / f"run-{name}/run.json").write_text("{}")
        if content is None:
            torch.save(rubbish, root / f"run-{name}/last.pt")
        else:
            (root / f"run-{name}/last.pt").write_bytes(content.read_bytes())
    (root / "run-config").mkdir()
    torch.save({**rubbish, "config": {**rubbish["config"], "batch_size": 3}}, root / "run-config/last.pt")


RESUME = [*POSE, "task.root=W/people", "--resume", "--out"]
LAST = r"last\.pt: "
CASES: list[tuple[list[str], str]] = [
    # configs
    (["train"], "expected one config file"),
    (["train", "nowhere.py"], r"nowhere\.py: no such config file"),
    (["train", SMALL, FLOAT], "expected one config file"),
    (["train", "W"], "no such config file"),
    (["train", "W/text.txt"], r"text\.txt: a config is a Python file"),
    (["train", "W/syntax.py"], r"syntax\.py: SyntaxError"),
    (["train", "W/raises.py"], r"raises\.py: OSError: no luck"),
    (["train", "W/exits.py"], r"exits\.py: SystemExit"),
    (["train", "W/empty.py"], "expected a variable `config`"),
    (["train", "W/number.py"], "expected a variable `config` that is a"),
    (["train", "W/empty.py", "--sample"], "expected a variable `sample`"),
    # overrides
    (["train", SMALL, "epoch=2"], "unknown name epoch; did you mean epochs"),
    (["train", SMALL, "task.limt=2"], "did you mean limit"),
    (["train", SMALL, "epochs=x"], "epochs=x: expected int, got x"),
    (["train", SMALL, "epochs=2.5"], "expected int"),
    (["train", SMALL, "epochs=None"], "expected int"),
    (["train", SMALL, "epochs.more=1"], r"epochs\.more=1: "),
    (["train", SMALL, "epochs=" + "(" * 500], "expected int"),
    (["train", SMALL, "batch_size=0"], "batch_size must be >= 1"),
    (["train", SMALL, "accumulate=0"], "accumulate must be >= 1"),
    (["train", SMALL, "seed=-1"], "seed must"),
    (["train", SMALL, "seed=1180591620717411303424"], "seed must"),
    (["train", SMALL, "precision=fp8"], "precision=fp8: expected"),
    (["train", SMALL, "ema=1.5"], r"ema must lie in \(0, 1\)"),
    (["train", SMALL, "clip_norm=0"], "clip_norm must be > 0"),
    (["train", SMALL, "task.limit=0"], "limit must be >= 1"),
    (["train", SMALL, "task.codec.sigma=-1"], "sigma must be > 0"),
    (["train", SMALL, "task=None"], "task=None: expected"),
    (["train", SMALL, "optimizer=Adamw(lr=1)"], "did you mean Adam"),
    (["train", SMALL, "optimizer=AdamW(rate=1)"], "AdamW has no argument rate"),
    (["train", SMALL, "optimizer=os.system('true')"], "call a plain name"),
    (["train", SMALL, "sharpness.sampling=Tail(fracton=0.3)"], "Tail has no argument fracton"),
    ([*POSE, "task.root=W/people", "optimizer.lr=-1"], "Invalid learning rate"),
    ([*POSE, "task.root=W/people", "sharpness.rho=-1"], "rho must be >= 0"),
    ([*POSE, "task.root=W/people", "sharpness.sampling=Adaptive(window=3)"], "window must be >= 2"),
    ([*POSE, "task.root=W/people", "sharpness.sampling=Tail()"], "fraction"),
    # arguments
    (["train", SMALL, "--seed", "x"], "argument --seed: invalid int value"),
    (["train", SMALL, "--sead", "3"], "unrecognized arguments: --sead"),
    (["train", SMALL, "--device", "gpu"], "--device gpu"),
    (["train", SMALL, "--device", "cuda:99"], "--device cuda:99"),
    (["train", SMALL, "--device", "meta"], "--device meta"),
    (["eval", SMALL], "--checkpoint"),
    ([*POSE, "task.root=W/people", "--out", "W/secret.jpg"], r"secret\.jpg: cannot be written"),
    (["train", SMALL, "--out", "W/run-text"], "already holds a run"),
    # annotations
    *(([*POSE, f"task.root=W/{name}"], message) for name, message in (
        ("gone", r"train2017\.json: no such file; see README"),
        ("torn", "not readable as JSON"),
        ("list", "not a COCO annotation file"),
        ("nothing", "not readable as JSON"),
        ("binary", "not readable as JSON"),
        ("deep", "not readable as JSON"),
        ("unseen", "train2017: no such folder"),
        ("nine-values", r"annotation \d+ has 9 keypoint values, expected 51"),
        ("nowhere", r"annotation \d+ names the picture 1000000"),
        ("no-image-id", r"annotation \d+ is not one of COCO's \(KeyError: 'image_id'\)"),
        ("nan-box", r"annotation \d+ has NaN or inf"),
        ("inf-box", r"annotation \d+ has NaN or inf"),
        ("negative-box", r"annotation \d+ has a negative size"),
        ("three-box", r"annotation \d+ is not one of COCO's"),
        ("text-box", r"annotation \d+ is not one of COCO's"),
        ("nan-joint", r"annotation \d+ has NaN or inf"),
        ("text-joint", r"annotation \d+ is not one of COCO's"),
        ("odd-crowd", r"annotation \d+ has iscrowd 'no', expected a whole number"),
        ("negative-area", r"annotation \d+ has a negative size"),
        ("number", "annotation number 1 is not one of COCO's"),
        ("no-list", "its annotations are no list"),
        ("images-no-list", "not a COCO annotation file"),
        ("no-name", "each of its images needs an id and a file_name"),
        ("number-name", "file_name 5 must name a file below"),
        ("climbing", r"file_name '\.\./secret\.jpg' must name a file below"),
        ("absolute", "file_name '/etc/passwd' must name a file below"),
    )),
    # pictures
    ([*POSE, "task.root=W/picture-gone"], r"\.jpg: no such picture"),
    ([*POSE, "task.root=W/picture-empty"], r"\.jpg: not a readable picture"),
    ([*POSE, "task.root=W/picture-text"], r"\.jpg: not a readable picture"),
    ([*POSE, "task.root=W/picture-cut"], r"\.jpg: not a readable picture \(it is cut off\)"),
    ([*POSE, "task.root=W/picture-huge"], r"\.jpg: not a readable picture \(Image size .* exceeds limit"),
    ([*POSE, "task.root=W/picture-text", "task.skip_broken=True"], "nobody to learn from"),
    ([*IMAGES, "task.root=W/class-empty"], r"broken\.jpg: not a readable picture"),
    ([*IMAGES, "task.root=W/class-text"], r"broken\.jpg: not a readable picture"),
    ([*IMAGES, "task.root=W/class-cut"], r"broken\.jpg: not a readable picture \(image file is truncated"),
    ([*IMAGES, "task.root=W/class-huge"], r"broken\.jpg: not a readable picture \(Image size .* exceeds limit"),
    ([*IMAGES, "task.root=W/classes"], "holds 12 classes in train, got 10"),
    ([*IMAGES, "task.root=W/nothing-there"], "nothing-there/train: no pictures in it"),
    ([*IMAGES, "task.root=W/tar"], "tar: "),
    ([*IMAGES, "task.root=W/cifar"], "cifar: "),
    ([*IMAGES, "task.root=W/gone"], "gone: no images found"),
    (["predict", SMALL, *TINY, "W/picture-huge/train2017/000000000001.jpg", "--checkpoint", "W/good.pt"], "exceeds limit"),
    # detections
    ([*EVAL, "--checkpoint", "W/good.pt", "task.detections=W/gone.json"], r"gone\.json: no such file"),
    *(([*EVAL, "--checkpoint", "W/good.pt", f"task.detections=W/{name}.json"], message) for name, message in (
        ("numbers", "not a COCO results file"),
        ("boxless", "not a COCO results file"),
        ("nan", "not a COCO results file.* NaN or inf"),
        ("cats", "no person's box"),
        ("elsewhere", "no person's box"),
    )),
    # checkpoints
    *(([*tool, "--checkpoint", f"W/{name}.pt"], message) for tool in (EVAL, PREDICT) for name, message in (
        ("gone", r"gone\.pt: no such checkpoint"),
        ("text", "not a readable checkpoint"),
        ("empty", "not a readable checkpoint"),
        ("torn", "not a readable checkpoint"),
        ("flipped", "not a readable checkpoint"),
        ("bomb", "not a readable checkpoint"),
        ("bare-bomb", "not a readable checkpoint"),
        ("list", "expected a dict, found list"),
        ("numbers", "its keys are no names"),
        ("other", r"other\.pt: does not fit the model .* Missing key\(s\)"),
        ("shape", r"shape\.pt: does not fit the model .* size mismatch for head\.weight"),
    )),
    *(([*POSE, "task.root=W/people", f"task.weights=W/{name}.pt"], message) for name, message in (
        ("gone", "no such checkpoint"),
        ("bomb", "not a readable checkpoint"),
        ("flipped", "not a readable checkpoint"),
        ("other", "lacks .* of the backbone's tensors"),
    )),
    *(([*QUANTIZE, "--checkpoint", f"W/{name}.pt"], message) for name, message in (
        ("gone", "no such checkpoint"),
        ("bomb", "not a readable checkpoint"),
        ("flipped", "not a readable checkpoint"),
        ("other", "does not fit the model"),
    )),
    # resuming
    (["train", SMALL, "--resume"], "holds no run to resume"),
    ([*RESUME, "W/nowhere"], LAST + "no such checkpoint"),
    ([*RESUME, "W/run-bomb"], LAST + "not a readable checkpoint"),
    ([*RESUME, "W/run-text"], LAST + "not a readable checkpoint"),
    ([*RESUME, "W/run-weights"], LAST + "holds weights only"),
    ([*RESUME, "W/run-rubbish"], LAST + "not the checkpoint of a run of this version"),
    ([*RESUME, "W/run-config"], LAST + "made with another config: batch_size was 3, is 4"),
    # bits and models
    ([*QUANTIZE, "task.weight_bits=9"], "weight_bits must be 2 to 8"),
    ([*QUANTIZE, "task.act_bits=1"], "act_bits must be 2 to 8"),
    (["train", QUANT, "--sample", "task.weight_bits=None"], "give both, or neither"),
    ([*QUANTIZE, "task.model=resnet81"], "timm knows no model resnet81; did you mean"),
    ([*QUANTIZE, "task.layers={'nothing*': (4, 4)}", "--checkpoint", "W/good.pt"], "nothing|does not fit"),
    (["quantize", SMALL, "--out", "run"], "not a config with task.weight_bits"),
    (["predict", QUANT, "--sample", "W/secret.jpg", "--checkpoint", "W/good.pt"], "does not fit the model"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # timm's open tar
@pytest.mark.parametrize(("arguments", "message"), CASES, ids=[f"{i:03d}-{m[:30]}" for i, (_, m) in enumerate(CASES)])
def test_bad_input(
    arguments: list[str], message: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Kills: a traceback, a picture that timm replaces by its neighbour, a pickle that runs, a file outside the folder."""
    monkeypatch.delenv("ARSAM_DATA", raising=False)
    arguments = [re.sub(r"(^|=)W(?=/|$)", rf"\1{world}", word) for word in arguments]
    assert inside(arguments[0], *arguments[1:], cwd=tmp_path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    lines = [
        line for line in error.splitlines() if not line.startswith(("warning: 6 of 6", "  "))
    ]  # the list that was asked for
    assert len(lines) in (1, 2), error
    assert lines[-1].startswith("error: ")
    assert re.search(message, error), error
    assert not (world / "marker").exists(), "a file from outside ran code"


def test_enough() -> None:
    """The table is not to shrink."""
    assert len(CASES) >= 120
