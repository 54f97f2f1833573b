"""The commands as users type them: files, exit codes, messages."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tasks.pose import sample

ROOT = Path(__file__).parents[2]
SMALL = str(ROOT / "configs/pose/hrnet_small_arsam.py")
FAST = ["batch_size=4", "num_workers=0", "epochs=2", "task.network.blocks=1", "task.network.widths=(4, 8, 8, 8)"]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve drawn people a split, in COCO's layout."""
    folder = tmp_path_factory.mktemp("people")
    for seed, split in enumerate(("train", "val")):
        sample.write_split(folder, split, 12, np.random.default_rng([7, seed]))
    return folder


def command(tool: str, *arguments: str, cwd: Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / f"{tool}.py"), *arguments]


def call(tool: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a tool in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(tool, *arguments, cwd=cwd), capture_output=True, text=True, cwd=cwd, timeout=300, env=environment, check=False
    )


def inside(tool: str, *arguments: str, cwd: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a tool in this process, which saves the imports; its exit code."""
    monkeypatch.chdir(cwd)
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setattr(sys, "argv", [f"{tool}.py", *arguments])
    try:
        runpy.run_path(str(ROOT / "tools" / f"{tool}.py"), run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_train_then_eval(people: Path, tmp_path: Path) -> None:
    """Arguments in any order; the checkpoint evaluates to the figures of the run. Quiet without a terminal."""
    done = call("train", "--seed", "5", "task.limit=8", SMALL, f"task.root={people}", "--out", "run", *FAST, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert "passes per step" in done.stdout
    files = {p.name for p in (tmp_path / "run").iterdir()}
    pictures = {"curves.png", "errors.png", "predictions.png"}
    poses = {"errors.json", "keypoints.json"}
    assert files == {"run.json", "metrics.jsonl", "last.pt", "best.pt", "result.json"} | poses | pictures
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert (result["seed"], result["steps"], result["task"], result["config"]) == (5, 4, "pose", SMALL)
    assert list(result["metrics"]) == ["AP", "AP50", "AP75", "APM", "APL", "AR", "AR50", "AR75", "ARM", "ARL"]
    again = call(
        "eval", f"task.root={people}", "--checkpoint", "run/last.pt", *FAST, SMALL, "task.limit=8", cwd=tmp_path
    )  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == result["metrics"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network's checkpoint that goes with SMALL and TINY."""
    import torch

    from tasks.pose.model import HeatmapHRNet

    file = tmp_path_factory.mktemp("weights") / "best.pt"
    torch.save(HeatmapHRNet(widths=(4, 8, 8, 8), modules=(1, 1, 1), blocks=1).state_dict(), file)
    return file


TINY = FAST[-2:]


def test_predict(
    people: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Drawn pictures and COCO results: of whole pictures, of boxes, of two checkpoints side by side."""
    pictures = [str(people / f"val2017/{number:012d}.jpg") for number in (3, 5)]
    arguments = [SMALL, *TINY, "--checkpoint", str(weights), *pictures]
    assert inside("predict", *arguments, "--out", "whole", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert "000000000003.jpg: 1 person" in capsys.readouterr().out
    files = {"run.json", "keypoints.json", "000000000003.jpg", "000000000005.jpg"}
    assert {file.name for file in (tmp_path / "whole").iterdir()} == files
    assert inside("predict", *arguments, "--out", "whole", cwd=tmp_path, monkeypatch=monkeypatch) == 0, "the folder is its own"
    capsys.readouterr()
    found = json.loads((tmp_path / "whole/keypoints.json").read_text())
    assert [(pose["image_id"], len(pose["keypoints"]), pose["category_id"]) for pose in found] == [(3, 51, 1), (5, 51, 1)]
    assert found[0]["file_name"] == pictures[0]
    boxes = [
        {"file_name": "000000000005.jpg", "bbox": [10, 10, 60, 90], "score": 0.5},
        {"image_id": 5, "bbox": [60, 10, 60, 90], "score": 0.5},
        {"image_id": 4, "bbox": [60, 10, 60, 90], "score": 0.5},
    ]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    extra = ["--boxes", "boxes.json", "--compare", str(weights)]
    assert inside("predict", *arguments, *extra, "task.soft_nms=True", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    folder = tmp_path / "runs/hrnet_small_arsam-predictions"
    assert [pose["image_id"] for pose in json.loads((folder / "keypoints.json").read_text())] == [5, 5]
    assert (folder / "keypoints.json").read_text() == (folder / "keypoints-compared.json").read_text()
    assert "000000000003.jpg: 0 people" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SMALL, "--checkpoint", "WEIGHTS"], "at least one picture"),
        ([SMALL, *TINY, "gone.jpg", "--checkpoint", "WEIGHTS"], "gone.jpg: no such picture"),
        ([SMALL, *TINY, "text.jpg", "--checkpoint", "WEIGHTS"], "text.jpg: not a readable picture"),
        ([SMALL, "PICTURE", "--checkpoint", "WEIGHTS"], "does not fit the model of this config"),
        ([SMALL, *TINY, "PICTURE", "--checkpoint", "WEIGHTS", "--boxes", "gone.json"], "gone.json: no such file"),
        ([SMALL, *TINY, "PICTURE", "--checkpoint", "WEIGHTS", "--boxes", "empty.json"], "empty.json: no person's box"),
        ([str(ROOT / "configs/quant/resnet18_w4a4_sgd.py"), "PICTURE", "--checkpoint", "WEIGHTS"], "does not fit the model"),
    ],
)
def test_mistakes_in_predicting(
    arguments: list[str], message: str, people: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Exit code 2, one line that names the culprit, and nothing written."""
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.json").write_text("[]")
    names = {"PICTURE": str(people / "val2017/000000000001.jpg"), "WEIGHTS": str(weights)}
    arguments = [names.get(word, word) for word in arguments]
    assert inside("predict", *arguments, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 2
    assert not (tmp_path / "runs").exists()


def test_default_folders(people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """runs/NAME, then runs/NAME-2; nothing is overwritten."""
    arguments = [SMALL, f"task.root={people}", *FAST, "epochs=1"]
    for _ in range(2):
        assert inside("train", *arguments, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"hrnet_small_arsam", "hrnet_small_arsam-2"}
    assert inside("train", *arguments, "--resume", cwd=tmp_path, monkeypatch=monkeypatch) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupt_writes_a_checkpoint(number: signal.Signals, people: Path, tmp_path: Path) -> None:
    """No traceback, the exit code of the signal, and a word on where the state lies and what goes on."""
    arguments = [SMALL, f"task.root={people}", "--out", "run", *FAST, "epochs=300"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command("train", *arguments, cwd=tmp_path),
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run/last.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert b"stopping after this step, saving" in errors
    assert f"saved in {Path('run/last.pt')}; go on with:".encode() in errors
    assert errors.rstrip().endswith(b"--resume")
    assert b"Traceback" not in errors
    import torch

    step = torch.load(tmp_path / "run/last.pt", weights_only=True)["progress"]["step"]
    assert 0 < step < 900
    assert (tmp_path / "run/result.json").exists() is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected one config file"),
        (["nowhere.py"], "nowhere.py: no such config file"),
        ([SMALL, SMALL], "expected one config file"),
        ([SMALL, "epoch=2"], "epoch=2: unknown name epoch; did you mean epochs?"),
        ([SMALL, "epochs=x"], "epochs=x: expected int, got x"),
        ([SMALL, "batch_size=0"], "batch_size must be >= 1"),
        ([SMALL, "task.limit=0"], "limit must be >= 1"),
        ([SMALL, "task.codec.sigma=-1"], "sigma must be > 0"),
        ([SMALL, "task.root=gone"], "person_keypoints_train2017.json: no such file; see README"),
        ([SMALL, "--device", "cuda:99"], "--device cuda:99"),
        ([SMALL, "--device", "gpu"], "--device gpu"),
        ([SMALL, "--resume"], "holds no run to resume"),
        ([SMALL, "--out", "taken"], "taken: already holds a run"),
        ([SMALL, "task.root=broken"], "person_keypoints_train2017.json: not readable as JSON"),
        ([SMALL, "task.root=list"], "not a COCO annotation file"),
        ([SMALL, "task.root=empty"], "nobody to learn from"),
        ([SMALL, "task.root=PEOPLE", "sharpness.rho=-1"], "rho must be >= 0"),
        ([SMALL, "task.root=PEOPLE", "sharpness.sampling=Adaptive(window=3)"], "window must be >= 2"),
        ([SMALL, "task.root=PEOPLE", "sharpness.sampling=Tail()"], "fraction"),
        ([SMALL, "task.root=PEOPLE", "optimizer.lr=-1"], "Invalid learning rate"),
        ([SMALL, "task.root=PEOPLE", "task.weights=gone.pth"], "gone.pth: no such checkpoint"),
    ],
)
def test_mistakes_in_training(
    arguments: list[str], message: str, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Exit code 2, one line that names the culprit, and nothing written."""
    monkeypatch.delenv("ARSAM_DATA", raising=False)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/run.json").write_text("{}")
    for name, content in (("broken", "{"), ("list", "[]"), ("empty", '{"images": [], "annotations": []}')):
        (tmp_path / name / "annotations").mkdir(parents=True)
        (tmp_path / name / "train2017").mkdir()
        (tmp_path / name / "annotations/person_keypoints_train2017.json").write_text(content)
    arguments = [word.replace("PEOPLE", str(people)) for word in arguments]
    assert inside("train", *arguments, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 2
    assert not (tmp_path / "runs").exists()


def test_missing_picture_in_a_worker(people: Path, tmp_path: Path) -> None:
    """The message crosses the process that loads."""
    import shutil

    shutil.copytree(people, tmp_path / "holes")
    for picture in (tmp_path / "holes/train2017").iterdir():
        picture.unlink()
    done = call("train", SMALL, "task.root=holes", *FAST, "num_workers=1", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "no such picture" in done.stderr
    assert "Traceback" not in done.stderr


def test_quantize(tmp_path: Path) -> None:
    """All stages on a tiny model: the report, the two files, and the folder that is not overwritten.

    Kills: a stage that wants a teacher of the model that has none.
    """
    tiny = [
        "task.model=test_resnet",
        "task.distill=0.5",
        "task.limit=80",
        "epochs=1",
        "pretraining.epochs=2",
        "num_workers=0",
        "pretraining.num_workers=0",
    ]
    done = call("quantize", *tiny, "--out", "run", "--seed", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "no config given: the sample of resnet18_w4a4_arsam.py" in done.stdout
    assert [done.stdout.index(f"[{i}/3]") for i in (1, 2, 3)] == sorted(done.stdout.index(f"[{i}/3]") for i in (1, 2, 3))
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert set(report["stages"]) == {"float", "ptq", "ptq_bn", "qat", "onnx"}
    for stage in report["stages"].values():
        assert 0 <= stage["top1"] <= 1
        assert stage["size_mb"] > 0
    assert {"agreement", "latency_ms", "bits", "passes_per_step", "machine", "seed", "config"} <= report.keys()
    assert report["bits"] == {"weight": 4, "act": 4}
    assert report["seed"] == 3
    assert set(report["latency_ms"]) == {"float", "low_bit"}
    assert report["stages"]["onnx"]["size_mb"] == pytest.approx((tmp_path / "run/model.onnx").stat().st_size / 1e6)
    assert report["stages"]["onnx"]["size_mb"] < report["stages"]["float"]["size_mb"] / 3
    for name in ("float.onnx", "report.md", "report.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0
    again = call("quantize", "--out", "run", cwd=tmp_path)
    assert again.returncode == 2
    assert "already holds a run" in again.stderr


def test_quantize_a_pose_network(people: Path, tmp_path: Path) -> None:
    """The same stages, measured in AP; the file agrees with the fake-quantized network. Kills: top-1 of heatmaps."""
    config = str(ROOT / "configs/pose/hrnet_small_w8a8_arsam.py")
    tiny = [f"task.root={people}", *FAST, "epochs=1", "pretraining.epochs=2", "pretraining.num_workers=0"]
    done = call("quantize", config, *tiny, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["metric"] == "AP"
    assert list(report["stages"]) == ["float", "ptq", "ptq_bn", "qat", "onnx"]
    for stage in report["stages"].values():
        assert set(stage) == {"AP", "size_mb"}
    assert report["stages"]["onnx"]["AP"] == pytest.approx(report["stages"]["qat"]["AP"], abs=0.01)
    assert report["agreement"] > 0.1, "chance, for the flat heatmaps of so little training, is 1 in 768"
    assert "| stage | AP | MB |" in (tmp_path / "run/report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task.weight_bits=9"], "weight_bits must be 2 to 8"),
        (["task.model=nothing18"], "timm knows no model nothing18"),
        (["--checkpoint", "gone.pt"], "gone.pt: no such checkpoint"),
        (["pretraining=None"], "give --checkpoint FLOAT.pt"),
        (["task.root=nowhere"], "nowhere: no images found"),
        ([SMALL], "not a config with task.weight_bits"),
    ],
)
def test_mistakes_in_quantizing(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    """Exit code 2 and one line."""
    assert inside("quantize", *arguments, "--out", "run", cwd=tmp_path, monkeypatch=monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 2


def test_eval_without_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing, or of no use."""
    assert inside("eval", SMALL, "--checkpoint", "gone.pt", cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "gone.pt: no such checkpoint" in capsys.readouterr().err
    (tmp_path / "text.pt").write_text("weights")
    assert inside("eval", SMALL, "--checkpoint", "text.pt", cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "text.pt: not a readable checkpoint" in capsys.readouterr().err
    assert inside("eval", SMALL, cwd=tmp_path, monkeypatch=monkeypatch) == 2


def test_overhead_table(tmp_path: Path) -> None:
    """The table, and the same numbers as JSON."""
    done = call("bench", "overhead", "--rounds", "1", "--out", "table.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["kept"] == 1.0
    names = {row["name"] for row in record["rows"]}
    assert {"SGD, 2 passes", "ARSAM as SAM", "textbook SAM", "ARSAM, every 5th step"} <= names
    for row in record["rows"]:
        assert row["name"] in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cifar16"], "cifar10: no images found"),
        (["quick", "--only", "adam"], "adam: no row of the suite quick; its rows are base, sam"),
        (["quick", "--seeds", "0"], "--seeds must be >= 1"),
    ],
)
def test_compare_names_the_culprit(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, before anything is trained. Kills: a traceback, a row that is left out in silence."""
    monkeypatch.delenv("ARSAM_DATA", raising=False)
    assert inside("bench", "compare", *arguments, cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.json"))
