"""From a float checkpoint to a file that is used: quantize, predict and eval as users type them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from PIL import Image

from tasks import engine
from tasks.config import load
from tasks.errors import UserError
from tasks.pictures import MEAN
from tasks.quant import export, ptq, run, stages
from tests.test_structure import imported
from tests.tools.test_commands import ROOT, inside

CONFIG = str(ROOT / "configs/quant/resnet18_w4a4_sgd.py")
SETTINGS = ["task.model=test_resnet", "task.side=32", "num_workers=0", "batch_size=8"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of pictures, whose names are not in the order of the validation split's folders, and float weights."""
    root = tmp_path_factory.mktemp("low-bit")
    for split, classes in (("train", ("apple", "pear")), ("val", ("pear",))):
        for name in classes:
            (root / "data" / split / name).mkdir(parents=True)
            for i in range(12):
                values = np.random.default_rng([i, len(name)]).integers(0, 99, (40, 50, 3), dtype=np.uint8)
                values[..., 0 if name == "apple" else 2] += 150
                Image.fromarray(values).save(root / "data" / split / name / f"{i}.png")
    torch.manual_seed(0)
    model: Any = timm.create_model("test_resnet", num_classes=2)
    torch.save({"state_dict": {f"module.{name}": value for name, value in model.state_dict().items()}}, root / "float.pth")
    return root


@pytest.fixture(scope="module")
def quantized(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of quantize.py, without training."""
    out = tmp_path_factory.mktemp("out") / "run"
    with pytest.MonkeyPatch.context() as patch:
        words = [CONFIG, "--sample", "--checkpoint", str(world / "float.pth"), *SETTINGS, "task.classes=2", "epochs=0"]
        words += [f"task.root={world / 'data'}", "task.calibration.method=minmax", "task.weight_bits=8", "task.act_bits=8"]
        assert inside("quantize", *words, "--out", str(out), cwd=world, monkeypatch=patch) == 0
    return out


def test_calibration_alone(quantized: Path) -> None:
    """epochs=0. Kills: a stage of training, a report without it that fails, float training although weights are there."""
    report = json.loads((quantized / "report.json").read_text())
    assert list(report["stages"]) == ["float", "ptq", "ptq_bn", "onnx"]
    assert report["kept"] in ("ptq", "ptq_bn")
    assert report["passes_per_step"] == 0
    assert report["calibration"]["method"] == "minmax"
    assert set(report["cost"]["low_bit"]) == {"latency_ms", "latency_ms_batch_8", "load_seconds", "resident_mb", "needed_mb"}
    assert not (quantized / "qat").exists() and not (quantized / "float").exists()
    text = (quantized / "report.md").read_text()
    assert "training: none (epochs=0)" in text and "times" in text


def test_the_file_tells_how_it_is_fed(quantized: Path) -> None:
    """And nothing of this machine. Kills: stack traces with folders, metadata that json cannot read."""
    model = onnx.load(quantized / "model.onnx")
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert about["mean"] == [0.5, 0.5, 0.5] != list(MEAN)
    assert about["size"] == [32, 32] and about["resize_mode"] == "stretch" and about["interpolation"] == "bilinear"
    assert about["classes"] == ["apple", "pear"] and about["bits"] == {"weight": 8, "act": 8} and about["version"]
    content = (quantized / "model.onnx").read_bytes()
    for place in (str(ROOT), str(Path(timm.__file__).parent), "site-packages"):
        assert place.encode() not in content


def test_predicting(quantized: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same classes, by name, from the checkpoint and from the file. Kills: labels of the folder, another preprocessing."""
    answers = {}
    for name, file in (("onnx", quantized / "model.onnx"), ("torch", world / "float.pth")):
        words = [CONFIG, "--sample", *SETTINGS, "task.classes=2", f"task.root={world / 'data'}", "--checkpoint", str(file)]
        code = inside("predict", *words, str(world / "data/val"), "--out", name, cwd=tmp_path, monkeypatch=monkeypatch)
        assert code == 0
        answers[name] = json.loads((tmp_path / name / "classes.json").read_text())
    assert len(answers["onnx"]) == 12
    for mine, theirs in zip(answers["onnx"], answers["torch"], strict=True):
        assert mine["file_name"] == theirs["file_name"]
        scores = [{c["class"]: c["score"] for c in answer["classes"]} for answer in (mine, theirs)]
        assert set(scores[0]) == {"apple", "pear"}
        assert scores[0]["pear"] == pytest.approx(scores[1]["pear"], abs=0.05)


def test_evaluating(
    quantized: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file's own figure of the report, over a split that lacks a class. Kills: labels by the place of a folder."""
    words = [CONFIG, "--sample", *SETTINGS, "task.classes=2", f"task.root={world / 'data'}"]
    file = str(quantized / "model.onnx")
    assert inside("eval", *words, "--checkpoint", file, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((quantized / "report.json").read_text())
    assert figures["top1"] == pytest.approx(report["stages"]["onnx"]["top1"])
    # "pear" alone is label 1: the share of pictures for which the second logit is the larger
    words[words.index(f"task.root={world / 'data'}")] = f"task.root={world / 'nowhere'}"
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    assert inside("eval", *words, "--checkpoint", str(tmp_path / "no.onnx"), cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "no.onnx: not an ONNX file" in capsys.readouterr().err


def test_going_on(
    quantized: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is done is kept; another config is refused; training goes without labels.

    Kills: a second training, stages kept at the end alone, a stage that asks for labels of pictures that have none.
    """
    words = [CONFIG, "--sample", "--checkpoint", str(world / "float.pth"), *SETTINGS, "task.classes=2", "epochs=1"]
    words += [f"task.root={world / 'data'}", f"task.unlabelled={world / 'data/train/pear'}", "task.distill=1"]
    words += ["task.calibration.rounding=learned", "task.asymmetric=True", "--out", str(tmp_path / "run")]

    def go_on(*without: tuple[Any, str], killed_by: str | None = None) -> int:
        """The command, which fails if it calls one of these again; killed where it calls `killed_by`."""

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in without:
                patch.setattr(owner, name, None)
            if killed_by is not None:
                patch.setattr(ptq if killed_by == "corrected" else stages, killed_by, killed)
            return inside("quantize", *words, "--resume", cwd=tmp_path, monkeypatch=monkeypatch)

    assert go_on(killed_by="corrected") == 130
    calibrated, trained = (ptq, "prepared"), (engine, "train")
    assert go_on(calibrated, killed_by="reestimate_batch_norm") == 130
    said = capsys.readouterr().out
    assert "epoch   1" in said and "training: 1 epochs of 12 items, 8 at a time (epochs=1): about" in said
    done = calibrated, (ptq, "corrected"), trained
    assert go_on(*done, killed_by="check") == 130
    assert go_on(*done, (stages, "reestimate_batch_norm")) == 0
    kept = json.loads((tmp_path / "run/stages.json").read_text())
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert set(report["stages"]) == {"float", "ptq", "ptq_bn", "qat", "onnx"} and "reestimated" in report
    (tmp_path / "run/report.json").unlink()
    capsys.readouterr()
    assert go_on(*done, (stages, "reestimate_batch_norm"), (export, "export"), (engine, "evaluate")) == 0
    said = capsys.readouterr().out
    assert "epoch   1" not in said and said.count(": done") == 2
    assert json.loads((tmp_path / "run/stages.json").read_text()) == kept
    assert inside("quantize", *words, "--resume", "seed=7", cwd=tmp_path, monkeypatch=monkeypatch) == 2
    assert "of another config" in capsys.readouterr().err


def test_the_example_of_deployment(quantized: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty lines that need three packages answer as predict.py does. Kills: a resize or channel order of its own."""
    example = ROOT / "examples/deploy_classifier.py"
    assert {name.split(".")[0] for name in imported(example)} - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}
    docs = (ROOT / "docs/deploy.md").read_text().partition("<!-- classifier -->")[2].partition("<!-- /classifier -->")[0]
    assert example.read_text().endswith(docs.partition("```python")[2].partition("```")[0]), "the same lines in the docs"
    pictures = [str(world / f"data/val/pear/{i}.png") for i in range(6)]
    command = [sys.executable, str(example), str(quantized / "model.onnx"), *pictures]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    words = [CONFIG, "--sample", *SETTINGS, "--checkpoint", str(quantized / "model.onnx"), *pictures, "--out", "o"]
    assert inside("predict", *words, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    answers = json.loads((tmp_path / "o/classes.json").read_text())
    for line, answer in zip(lines, answers, strict=True):
        name, score = line.rpartition(": ")[2].split()
        assert name == answer["classes"][0]["class"]
        assert float(score) == pytest.approx(answer["classes"][0]["score"], abs=0.01)


@pytest.mark.parametrize("content", ["[]", "5", "{}", "text", "[" * 100_000])
def test_a_record_of_anybodys(content: str, tmp_path: Path) -> None:
    """Of the stages. Kills: a traceback out of a file that was changed by hand."""
    (tmp_path / run.KEPT).write_text(content)
    begun = run.Run(load(CONFIG, sample=True), tmp_path, device=torch.device("cpu"), name="c", resume=True)
    with pytest.raises(UserError, match=r"stages\.json: not written by this tool"):
        begun.take_up()
