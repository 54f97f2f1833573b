"""A pose network's way into other hands: the ONNX file, what it says of itself, and the lines in docs/deploy.md that run it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch

from tasks import config as configs
from tasks.errors import UserError
from tasks.pose import deployed, predict
from tasks.pose.codec import Heatmap, SimCC, UDPHeatmap
from tasks.pose.data import read_picture
from tasks.pose.joints import Joints
from tests.tools.test_commands import ROOT, SMALL, TINY, inside

FISH = Joints(("tip", "left_fin", "right_fin", "tail"), limbs=((0, 3),))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of four joints with random weights, a photo, a video, and the network as an ONNX file."""
    folder = tmp_path_factory.mktemp("deployed")
    task = configs.override(configs.load(SMALL), TINY).task
    torch.manual_seed(0)
    model = task.network(codec=task.codec, joints=FISH)  # type: ignore[attr-defined]
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
    torch.nn.init.constant_(model.head.bias, 100.0)  # a map without a positive value has no maximum
    torch.save(model.state_dict(), folder / "best.pt")
    rng = np.random.default_rng(0)
    video = cv2.VideoWriter(str(folder / "clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (80, 60))
    for number in range(3):
        picture = cv2.resize(rng.integers(0, 255, (6, 8, 3)).astype(np.uint8), (80, 60), interpolation=cv2.INTER_CUBIC)
        picture[:6] = picture[-6:] = picture[:, :6] = picture[:, -6:] = 0  # libraries differ in the last pixel at a border
        cv2.imwrite(str(folder / f"{number}.png"), picture)
        video.write(picture)
    video.release()
    with pytest.MonkeyPatch.context() as patch:
        arguments = [SMALL, *TINY, "task.codec.unbiased=False", "--checkpoint", "best.pt", "--out", "pose.onnx"]
        assert inside("export", *arguments, cwd=folder, monkeypatch=patch) == 0
    return folder


def test_the_file_says_how_it_is_fed(world: Path) -> None:
    """Kills: joints of the config in place of the checkpoint's, paths of this machine in the file."""
    content = (world / "pose.onnx").read_bytes()
    about = {entry.key: json.loads(entry.value) for entry in onnx.load_from_string(content).metadata_props}
    assert about["task"] == "pose"
    assert about["size"] == [96, 128]
    assert about["codec"]["name"] == "Heatmap"
    assert about["joints"]["names"] == list(FISH.names)
    assert about["joints"]["mirrored"] == [0, 2, 1, 3]
    np.testing.assert_allclose(about["mean"], [0.485, 0.456, 0.406])


def test_predicted_by_the_file(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same poses from checkpoint and file, of pictures and of a video; a config of another codec gives way to the file's.

    Kills: a file that is fed without mean and standard deviation, a video of one frame, joints of the config.
    """
    found = []
    for name, extra in (("best.pt", ["task.codec.unbiased=False"]), ("pose.onnx", ["task.codec.sigma=3.0"])):
        arguments = [SMALL, *TINY, *extra, "--checkpoint", name, "0.png", "[12].png", "clip.avi", "--out", f"{name}-out"]
        assert inside("predict", *arguments, cwd=world, monkeypatch=monkeypatch) == 0
        answers = json.loads((world / f"{name}-out/keypoints.json").read_text())
        lines = (world / f"{name}-out/clip.jsonl").read_text().splitlines()
        found.append([*answers, *(pose for line in lines for pose in json.loads(line)["poses"])])
        assert [pose["file_name"] for pose in answers] == ["0.png", "1.png", "2.png"]
        assert len(lines) == 3
        capture = cv2.VideoCapture(str(world / f"{name}-out/clip.mp4"))
        assert capture.get(cv2.CAP_PROP_FRAME_COUNT) == 3
        assert capture.get(cv2.CAP_PROP_FRAME_WIDTH) == 80
    for one, other in zip(*found, strict=True):
        assert len(one["keypoints"]) == 12
        np.testing.assert_allclose(one["keypoints"], other["keypoints"], atol=2e-3)


class Blobs(torch.nn.Module):
    """Heatmaps of how red, green, blue and yellow a crop is: no weights, and maxima that one can see."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        red, green, blue = (torch.nn.functional.avg_pool2d(images, 4) + 3).unbind(dim=1)
        return torch.stack([red - green - blue, green - red - blue, blue - red - green, red + green - 2 * blue], dim=1)


class Bins(Blobs):
    """The same as SimCC's bins, 2 to a pixel."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = torch.nn.functional.interpolate(super().forward(images), scale_factor=8.0, mode="bilinear")
        return torch.cat([maps.amax(dim=2), maps.amax(dim=3)], dim=2)


CODECS = {
    "heatmaps": Heatmap((96, 128), (24, 32)),
    "DARK": Heatmap((96, 128), (24, 32), unbiased=True),
    "UDP": UDPHeatmap((96, 128), (24, 32)),
    "SimCC": SimCC((96, 128)),
}


@pytest.mark.parametrize("name", CODECS)
def test_every_codec_survives_the_file(name: str, tmp_path: Path) -> None:
    """Under a config of another codec the file's poses are torch's. Kills: a codec that the file's reader does not know."""
    config = configs.load(SMALL).task
    task = dataclasses.replace(config, codec=CODECS[name], joints=FISH)  # type: ignore[type-var]
    model = Bins() if name == "SimCC" else Blobs()
    deployed.write(task, model, tmp_path / "a.onnx")  # type: ignore[arg-type]
    read, network = deployed.loaded(config, tmp_path / "a.onnx")  # type: ignore[arg-type]
    assert read.codec == CODECS[name]
    picture = np.random.default_rng(0).integers(0, 255, (12, 10, 3)).astype(np.uint8)
    frames = [predict.whole(1, cv2.resize(picture, (90, 110), interpolation=cv2.INTER_CUBIC))]  # type: ignore[arg-type]
    ((_, ((one,), (other,))),) = (
        (frame, (first, second))
        for (frame, (first,)), (_, (second,)) in zip(
            predict.poses(task, [model], frames, torch.device("cpu")),  # type: ignore[arg-type]
            predict.poses(read, [network], frames, torch.device("cpu")),
            strict=True,
        )
    )
    np.testing.assert_allclose(one["keypoints"], other["keypoints"], atol=2e-3)
    assert np.ptp(np.array(one["keypoints"]).reshape(-1, 3)[:, 0]) > 5


def test_the_lines_in_the_docs(tmp_path: Path) -> None:
    """Run as they stand, they find what the project finds. Kills: a crop that is off by half a pixel, x and y swapped."""
    text = (ROOT / "docs/deploy.md").read_text()
    code = text.partition("<!-- snippet -->")[2].partition("```python")[2].partition("```")[0]
    assert len(code.strip().splitlines()) < 40
    task = configs.override(configs.load(SMALL), [*TINY, "task.codec.unbiased=False", "task.flip_test=False"]).task
    task = dataclasses.replace(task, joints=FISH)  # type: ignore[type-var]
    picture = np.zeros((90, 110, 3), np.float64)
    grid = np.stack(np.meshgrid(np.arange(110), np.arange(90)), axis=2)
    colours = ((250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0))
    for colour, place in zip(colours, ((30.3, 25.1), (71.6, 30.4), (40.2, 60.7), (80.1, 64.9)), strict=True):
        picture += np.exp(-((grid - place) ** 2).sum(axis=2) / 60)[..., None] * colour
    cv2.imwrite(str(tmp_path / "a.png"), np.clip(picture, 0, 255).astype(np.uint8)[..., ::-1])
    assert deployed.write(task, Blobs(), tmp_path / "blobs.onnx") < 1e-5  # type: ignore[arg-type]
    done = subprocess.run(
        [sys.executable, "-c", code, "blobs.onnx", "a.png"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    assert [word[0] for word in words] == list(FISH.names)
    frames = [predict.whole(1, read_picture(tmp_path / "a.png"))]
    ((_, ((pose,),)),) = predict.poses(task, [Blobs()], frames, torch.device("cpu"))  # type: ignore[arg-type]
    expected = np.array(pose["keypoints"]).reshape(-1, 3)
    given = np.array([word[1:] for word in words], dtype=np.float64)
    np.testing.assert_allclose(given[:, :2], expected[:, :2], atol=0.02)
    np.testing.assert_allclose(given[:, 2], expected[:, 2], atol=0.05)
    assert np.abs(given[0, :2] - [30.3, 25.1]).max() < 3


def test_nothing_is_overwritten(world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: a file of the user's that gives way, pictures drawn over the photos they were made of."""
    before = {file.name: file.read_bytes() for file in world.iterdir() if file.is_file()}
    export = [SMALL, *TINY, "--checkpoint", "best.pt", "--out", "pose.onnx"]
    assert inside("export", *export, cwd=world, monkeypatch=monkeypatch) == 2
    assert "pose.onnx: is there already" in capsys.readouterr().err
    onto = [SMALL, *TINY, "--checkpoint", "best.pt", "0.png", "--out", "."]
    assert inside("predict", *onto, cwd=world, monkeypatch=monkeypatch) == 2
    assert "holds 0.png, which is read" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in world.iterdir() if file.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "0.png.onnx"], "0.png.onnx: no such file"),
        (["--checkpoint", "torn.onnx"], "torn.onnx: not an ONNX file that can be run"),
        (["--checkpoint", "best.pt", "task.joints=coco"], "was trained on 4 joints"),
        (["--checkpoint", "pose.onnx", "task.joints=coco"], "pose.onnx: finds 4 joints"),
        (["--checkpoint", "best.pt", "--detector", "fasterrcnn_resnet50_fpn"], "--detector-weights: give both"),
        (
            ["--checkpoint", "best.pt", "--detector", "yolo", "--detector-weights", "best.pt"],
            "torchvision has no such detector",
        ),
        (["--checkpoint", "best.pt", "empty"], "empty: holds no picture and no video"),
        (["--checkpoint", "best.pt", "*.tif"], "[*].tif: matches no file"),
        (["--checkpoint", "best.pt", "torn.mp4"], "torn.mp4: not a video that OpenCV can decode"),
    ],
)
def test_mistakes(
    world: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and a line that names the culprit."""
    (world / "torn.onnx").write_bytes((world / "pose.onnx").read_bytes()[:2000])
    (world / "torn.mp4").write_bytes(b"\0" * 500)
    (world / "empty").mkdir(exist_ok=True)
    assert inside("predict", SMALL, *TINY, "0.png", *arguments, "--out", "none", cwd=world, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message.replace("[*]", "*") in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "meta"),
    [("w32_udp-8xb64.pth", {}), ("a.pth", {"cfg": "codec = dict(type='UDPHeatmap')"}), ("b.pth", {"config": "use_udp=True"})],
)
def test_udp_is_told_apart(
    world: Path, name: str, meta: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its tensors look the same and its joints lie elsewhere. Kills: poses that are silently beside the right ones."""
    torch.save({"meta": meta, "state_dict": torch.load(world / "best.pt")}, world / name)
    arguments = [SMALL, *TINY, "--checkpoint", name, "0.png", "--out", f"{name}-out"]
    assert inside("predict", *arguments, cwd=world, monkeypatch=monkeypatch) == 0
    assert f"{name}: trained with UDP, and cropped and decoded so" in capsys.readouterr().out
    found = json.loads((world / f"{name}-out/keypoints.json").read_text())[0]["keypoints"]
    task = dataclasses.replace(configs.override(configs.load(SMALL), TINY).task, codec=UDPHeatmap((96, 128), (24, 32), 1.5, 9))  # type: ignore[type-var]
    task, network = deployed.loaded(task, world / "best.pt")  # type: ignore[arg-type]
    frames = [predict.whole(0, read_picture(world / "0.png"))]
    ((_, ((pose,),)),) = predict.poses(task, [network.eval()], frames, torch.device("cpu"))
    assert found == pose["keypoints"]


def test_udp_that_is_not_decoded(world: Path, tmp_path: Path) -> None:
    """Offsets beside the heatmaps, or heatmaps where SimCC is asked for. Kills: a third of the channels taken for joints."""
    task = configs.override(configs.load(SMALL), TINY).task
    combined = "codec = dict(type='UDPHeatmap', heatmap_type='combined')"
    torch.save({"meta": {"cfg": combined}, "state_dict": torch.load(world / "best.pt")}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: trained with UDP's offsets"):
        deployed.loaded(task, tmp_path / "a.pth")  # type: ignore[arg-type]
    torch.save({"meta": {}, "state_dict": torch.load(world / "best.pt")}, tmp_path / "w32_udp.pth")
    with pytest.raises(UserError, match="where the config's codec is SimCC"):
        deployed.loaded(dataclasses.replace(task, codec=SimCC((96, 128))), tmp_path / "w32_udp.pth")  # type: ignore[type-var, arg-type]


class Found(torch.nn.Module):
    """Answers as torchvision's detectors do: corners, labels, scores."""

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        assert images[0].shape == (3, 60, 80) and images[0].max() <= 1
        corners = torch.tensor([[10.0, 5, 40, 55], [1, 1, 70, 50], [20, 5, 60, 50], [30, 5, 30, 50]])
        return [{"boxes": corners, "labels": torch.tensor([1, 3, 1, 1]), "scores": torch.tensor([0.9, 0.9, 0.4, 0.9])}]


def test_a_detector(world: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """People's boxes of enough score; nobody is an answer too. Kills: corners taken for sizes, cars taken for people."""
    from tasks.pose import detector

    monkeypatch.setattr(detector, "get_model", lambda name, **_: Found())
    torch.save({}, tmp_path / "detector.pt")
    name = "fasterrcnn_resnet50_fpn"
    find = detector.detector(name, tmp_path / "detector.pt", torch.device("cpu"), 0.5)
    boxes, scores = find(read_picture(world / "0.png"))
    assert boxes.tolist() == [[10, 5, 30, 50]]
    assert scores.tolist() == pytest.approx([0.9])
    for number, (threshold, count) in enumerate((("0.3", 2), ("0.99", 0))):
        extra = ["--detector", name, "--detector-weights", str(tmp_path / "detector.pt"), "--detector-threshold", threshold]
        arguments = [SMALL, *TINY, "--checkpoint", "best.pt", "0.png", *extra, "--out", str(tmp_path / f"{number}")]
        assert inside("predict", *arguments, cwd=world, monkeypatch=monkeypatch) == 0
        assert len(json.loads((tmp_path / f"{number}/keypoints.json").read_text())) == count


def test_odd_inputs(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Two pictures of one name, one that is broken, grey, with 16 bits, with transparency; no joint above the threshold.

    Kills: an answer that overwrites another, a broken picture that stops the others, joints drawn below the threshold.
    """
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.png").write_bytes((world / "0.png").read_bytes())
    picture = cv2.imread(str(world / "0.png"))
    assert picture is not None
    cv2.imwrite(str(tmp_path / "b/grey.png"), picture[..., 0])
    cv2.imwrite(str(tmp_path / "b/deep.png"), picture.astype(np.uint16) * 257)
    cv2.imwrite(str(tmp_path / "b/clear.png"), np.dstack([picture, np.full((60, 80), 128, np.uint8)]))
    (tmp_path / "b/torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 no picture")
    arguments = [
        SMALL,
        *TINY,
        "task.codec.unbiased=False",
        "--checkpoint",
        str(world / "best.pt"),
        "a",
        "b/*.*",
        "--threshold",
        "1e9",
    ]
    assert inside("predict", *arguments, "--out", "none", cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "torn.jpg: not a readable picture" in capsys.readouterr().err
    assert inside("predict", *arguments, "--skip-broken", "--out", "out", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert "1 of 6 inputs are left out" in capsys.readouterr().err
    found = json.loads((tmp_path / "out/keypoints.json").read_text())
    assert [pose["file_name"] for pose in found] == ["a/1.png", "b/1.png", "b/clear.png", "b/deep.png", "b/grey.png"]
    drawn = sorted((tmp_path / "out").glob("*.jpg"))
    assert len(drawn) == 5
    plain = cv2.resize(picture, None, fx=8, fy=8, interpolation=cv2.INTER_CUBIC)
    shown = next(cv2.imread(str(file)) for file in drawn if "clear" in file.name)
    assert shown is not None and np.abs(shown.astype(int) - plain).mean() < 6
    by_file = {pose["file_name"]: pose["keypoints"] for pose in found}
    np.testing.assert_allclose(by_file["b/deep.png"], by_file["a/1.png"], atol=1e-3)
    np.testing.assert_allclose(by_file["b/clear.png"], by_file["a/1.png"], atol=1e-3)


def test_a_video_without_frames(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kills: an empty answer that looks like one."""
    cv2.VideoWriter(str(tmp_path / "none.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (80, 60)).release()
    arguments = [SMALL, *TINY, "--checkpoint", str(world / "best.pt"), "none.avi", "--out", "out"]
    assert inside("predict", *arguments, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "none.avi: not a video that OpenCV can decode" in capsys.readouterr().err


def test_torchvisions_detector(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One with random weights reads its file and answers with boxes inside the picture. Kills: weights of another network."""
    from torchvision.models import get_model

    from tasks.pose import detector

    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    torch.manual_seed(0)
    torch.save(get_model(name, weights=None, weights_backbone=None).state_dict(), tmp_path / "detector.pt")
    find = detector.detector(name, tmp_path / "detector.pt", torch.device("cpu"), 0.0)
    boxes, scores = find(read_picture(world / "0.png"))
    assert len(boxes) == len(scores) and ((boxes[:, :2] + boxes[:, 2:]) <= (80, 60)).all()
    with pytest.raises(UserError, match="does not fit the model"):
        detector.detector("fasterrcnn_resnet50_fpn", tmp_path / "detector.pt", torch.device("cpu"))
