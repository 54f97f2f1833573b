"""mmpose beside today's torch."""

from __future__ import annotations

import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("mmengine", "mmcv", "mmpose"):
        pytest.importorskip(package, reason=f"{package} is not installed; make test-mmpose")
    from mmengine.logging import HistoryBuffer

    from arsam.integrations.mmpose_standins import _AT_START, install

    install()

pytestmark = [pytest.mark.mmpose, pytest.mark.filterwarnings("default")]

BUILD = "from mmpose.models import build_pose_estimator"


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, from the root of the tree."""
    root = Path(__file__).parents[3]
    return subprocess.run([sys.executable, *options, "-c", code], cwd=root, text=True, capture_output=True)


def test_a_new_process_imports_mmpose() -> None:
    """Kills: stand-ins in this process alone; the line at the start of Python that imports torch every time."""
    # -S leaves out the .pth files, this environment's own line of `make mmpose` among them.
    bare = f"import sys; sys.path += {[p for p in sys.path if p]}; "
    assert "No module named 'xtcocotools'" in python(bare + BUILD, "-S").stderr
    called = python(bare + f"from arsam.integrations.mmpose_standins import install; install(); {BUILD}", "-S")
    assert called.returncode == 0, called.stderr
    started = python(bare + f"exec({_AT_START!r}); print('torch' in sys.modules); {BUILD}", "-S")
    assert started.returncode == 0 and started.stdout.startswith("False"), started.stderr


def test_stands_for_what_is_missing_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: a stand-in in front of the real package; a compiled operator that silently does nothing."""
    import mmcv.ops
    import pycocotools.coco
    import xtcocotools.coco

    assert xtcocotools.coco.COCO is pycocotools.coco.COCO
    with pytest.raises(NotImplementedError, match="deform_conv_forward"):
        mmcv.ops.deform_conv2d(torch.ones(1, 1, 3, 3), torch.zeros(1, 18, 1, 1), torch.ones(1, 1, 3, 3))
    for name in [x for x in sys.modules if x.partition(".")[0] == "xtcocotools"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "xtcocotools").mkdir()
    (tmp_path / "xtcocotools" / "__init__.py").touch()
    (tmp_path / "xtcocotools" / "coco.py").write_text("COCO = 'the real one'")
    monkeypatch.syspath_prepend(tmp_path)
    from xtcocotools.coco import COCO

    assert COCO == "the real one"


def test_evaluates_by_the_sigmas_of_mmpose() -> None:
    """Kills: pycocotools' own sigmas for a data set that has others, a kind of evaluation that it does not have."""
    from pycocotools.coco import COCO
    from xtcocotools.cocoeval import COCOeval

    keypoints = [x for k in range(17) for x in (20.0 + 5 * k, 30.0 + 3 * k, 2)]
    person = {"id": 1, "image_id": 1, "category_id": 1, "area": 6400.0, "bbox": [10, 20, 100, 64], "iscrowd": 0}
    gt = COCO()
    gt.dataset = {
        "info": {},
        "images": [{"id": 1}],
        "categories": [{"id": 1}],
        "annotations": [{**person, "keypoints": keypoints, "num_keypoints": 17}],
    }
    gt.createIndex()
    shifted = [x + 3.0 if i % 3 == 0 else x for i, x in enumerate(keypoints)]
    dt = gt.loadRes([{"image_id": 1, "category_id": 1, "keypoints": shifted, "score": 1.0}])
    scores = []
    for sigmas in (None, [0.5] * 17, [0.005] * 17):
        evaluation = COCOeval(gt, dt, "keypoints", sigmas, True)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        scores.append(evaluation.stats[0])
    assert scores[1] == pytest.approx(1.0) and 0.0 < scores[0] < 1.0 and scores[2] == 0.0
    with pytest.raises(NotImplementedError, match="xtcocotools"):
        COCOeval(gt, dt, "keypoints_crowd", None, True)


class _Getattr:
    """Pickles as getattr(owner, name)."""

    def __init__(self, owner: Any, name: str) -> None:
        self.call = owner, name

    def __reduce__(self) -> Any:
        return getattr, self.call


def test_checkpoints_load_and_cannot_run_code(tmp_path: Path) -> None:
    """Kills: weights_only=False, and getattr as such on the list of what may be called."""
    history = HistoryBuffer()
    history.update(2.0)
    torch.save({"message_hub": {"log_scalars": {"loss": history}}}, tmp_path / "log.pth")
    loaded = torch.load(tmp_path / "log.pth")["message_hub"]["log_scalars"]["loss"]
    assert loaded.mean() == 2.0 and loaded.statistics("max") == 2.0
    for owner, name in ((HistoryBuffer, "__init__"), (torch.Tensor, "new")):
        torch.save(_Getattr(owner, name), tmp_path / "other.pth")
        with pytest.raises((pickle.UnpicklingError, ValueError), match="no part of mmengine's log|allowed global"):
            torch.load(tmp_path / "other.pth")
