"""A network of one's own, as the documentation has it: a config file of the user's with a function that builds it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tasks import config as configs
from tasks.quant import ptq
from tasks.quant.correct import distance
from tests.test_docs import BLOCKS
from tests.tools.test_commands import inside

SETTINGS = ["task.root=digits", "task.side=32", "task.limit=64", "task.calibration.pictures=16"]


def written(folder: Path, name: str = "mobilenet_v3_small") -> Path:
    """The page's config file, for a torchvision network."""
    (block,) = BLOCKS["quant.md"]
    (folder / "mine.py").write_text(block.replace("mobilenet_v3_small", name))
    return folder / "mine.py"


def test_the_documented_config(tmp_path: Path) -> None:
    """Near to float at 8 bits. Kills: a block that is no config, a network of torchvision that prepare cannot take."""
    config = configs.override(configs.load(str(written(tmp_path))), SETTINGS)
    task: Any = config.task
    torch.manual_seed(0)
    model = task.in_float().build().eval()
    low = task.quantize(model)
    reference = ptq.prepared(task, low, torch.device("cpu"))
    x = next(task.inputs(8, augment=False, start=16))
    with torch.no_grad():
        assert distance(low, [(x, reference(x))]) < 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_through_the_command_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a file that answers as the network. Kills: what torch.onnx, the graph's passes or ONNX Runtime cannot take."""
    path = written(tmp_path, name)
    task: Any = configs.load(str(path)).task
    torch.manual_seed(0)
    torch.save(task.model().state_dict(), tmp_path / "float.pth")
    words = [str(path), "--checkpoint", str(tmp_path / "float.pth"), *SETTINGS, "epochs=0", "num_workers=0", "--out", "out"]
    assert inside("quantize", *words, cwd=tmp_path, monkeypatch=monkeypatch) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["check"]["distance"] < 0.02
