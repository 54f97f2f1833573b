"""mmpose's checkpoints: names, safe reading, and the same figures from the same weights."""

from __future__ import annotations

import importlib.util
import pickle
import sys
import types
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tasks import checkpoint
from tasks.errors import UserError
from tasks.pose import joint_sets, mmpose_weights, sample
from tasks.pose.codec import SimCC
from tasks.pose.joints import same_names
from tasks.pose.model import HeatmapHRNet, SimCCNet, hrnet, resnet
from tasks.pose.timm_networks import TimmHeatmap

TINY = {"widths": (4, 8, 8, 8), "modules": (1, 1, 1), "blocks": 1}
CODEC = SimCC((64, 64), sigma=2.0)
NETWORKS = {
    "heatmaps": partial(HeatmapHRNet, **TINY),
    "SimpleBaseline": partial(TimmHeatmap, "resnet18", deconvs=(8, 8, 8)),
    "SimCC": partial(SimCCNet, CODEC, partial(resnet, "resnet18"), (8, 8)),
    "SimCC without deconvolutions": partial(SimCCNet, CODEC, partial(hrnet, **TINY), ()),
}
HEADS = {
    "heatmaps": {"head.final_layer.weight", "head.final_layer.bias"},
    "SimpleBaseline": {
        "head.final_layer.weight",
        "head.final_layer.bias",
        *(f"head.deconv_layers.{i}.weight" for i in (0, 1, 3, 4, 6, 7)),
        *(f"head.deconv_layers.{i}.{name}" for i in (1, 4, 7) for name in ("bias", "running_mean", "running_var")),
        *(f"head.deconv_layers.{i}.num_batches_tracked" for i in (1, 4, 7)),
    },
    "SimCC": {
        *(f"head.deconv_head.deconv_layers.{i}.weight" for i in (0, 1, 3, 4)),
        *(f"head.deconv_head.deconv_layers.{i}.{name}" for i in (1, 4) for name in ("bias", "running_mean", "running_var")),
        *(f"head.deconv_head.deconv_layers.{i}.num_batches_tracked" for i in (1, 4)),
        *(f"head.deconv_head.final_layer.{name}" for name in ("weight", "bias")),
        *(f"head.mlp_head_{axis}.{name}" for axis in "xy" for name in ("weight", "bias")),
    },
    "SimCC without deconvolutions": {
        *(f"head.final_layer.{name}" for name in ("weight", "bias")),
        *(f"head.mlp_head_{axis}.{name}" for axis in "xy" for name in ("weight", "bias")),
    },
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_there_and_back(kind: str) -> None:
    """mmpose's names, and the same tensors after both ways. Kills: a prefix that is renamed one way only."""
    torch.manual_seed(0)
    model, other = NETWORKS[kind](), NETWORKS[kind]()
    theirs = mmpose_weights.to_mmpose(model.state_dict())
    assert {key for key in theirs if not key.startswith("backbone.")} == HEADS[kind]
    other.load_state_dict(theirs)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    inside = nn.ModuleDict({"net": NETWORKS[kind]()})
    inside.load_state_dict({f"net.{key}": value for key, value in theirs.items()})


def test_names_before_mmpose_1() -> None:
    """keypoint_head was the head's name. Kills: files of 2022 refused."""
    model = NETWORKS["heatmaps"]()
    old = {key.replace("head.", "keypoint_head.final_layer."): value for key, value in model.state_dict().items()}
    NETWORKS["heatmaps"]().load_state_dict(old)


class HistoryBuffer:
    """As mmengine's: what its checkpoints hold of the log."""

    def __init__(self) -> None:
        self._log_history = np.arange(3.0)
        self._statistics_methods = {"mean": HistoryBuffer.mean}

    def mean(self) -> float:
        """A method, which a pickle holds as getattr(HistoryBuffer, "mean")."""
        return float(self._log_history.mean())


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('ran')",)


def test_file_of_mmengine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are read, its log and arrays are not rebuilt. Kills: a file that is refused, an unpickler that runs all."""
    module: Any = types.ModuleType("mmengine.logging.history_buffer")
    module.HistoryBuffer = HistoryBuffer
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    monkeypatch.setattr(HistoryBuffer.mean, "__module__", module.__name__)
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    torch.manual_seed(0)
    model = NETWORKS["heatmaps"]()
    content = {
        "meta": {"epoch": 210, "dataset_meta": {"sigmas": np.ones(17, np.float32), "loss": np.float64(0.5)}},
        "message_hub": {"log_scalars": {"train/loss": HistoryBuffer()}},
        "state_dict": mmpose_weights.to_mmpose(model.state_dict()),
    }
    torch.save(content, tmp_path / "mmpose.pth")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "mmpose.pth", weights_only=True)
    loaded = NETWORKS["heatmaps"]()
    checkpoint.load_weights(loaded, tmp_path / "mmpose.pth")
    assert torch.equal(loaded.head.weight, model.head.weight)
    assert not isinstance(checkpoint.load(tmp_path / "mmpose.pth")["meta"]["dataset_meta"]["sigmas"], np.ndarray)
    torch.save({**content, "meta": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: not a readable checkpoint"):
        checkpoint.load_weights(loaded, tmp_path / "evil.pth")


def test_written_for_mmpose(tmp_path: Path) -> None:
    """The command's file, and its refusal of what is no pose network."""
    model = NETWORKS["SimCC"]()
    torch.save({"model": model.state_dict(), "average": None}, tmp_path / "best.pt")
    mmpose_weights.main([str(tmp_path / "best.pt"), str(tmp_path / "out.pth")])
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert torch.equal(written["state_dict"]["head.mlp_head_x.weight"], model.columns.weight)
    torch.save({"head.weight": torch.zeros(1), "lateral.0.0.weight": torch.zeros(1)}, tmp_path / "added.pt")
    with pytest.raises(UserError, match=r"added\.pt: mmpose's HeatmapHead has no top-down additions"):
        mmpose_weights.main([str(tmp_path / "added.pt"), str(tmp_path / "out.pth")])
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt: not a pose network"):
        mmpose_weights.main([str(tmp_path / "other.pt"), str(tmp_path / "out.pth")])


@pytest.mark.mmpose
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["heatmap HRNet", "SimCC-ResNet18", "UDP HRNet", "SimpleBaseline-ResNet18"])
def test_parity(name: str, tmp_path: Path) -> None:
    """mmpose and we agree on crops, targets, outputs, loss and AP. Kills: a reduction, a shift or a rounding of our own."""
    if importlib.util.find_spec("mmpose") is None:
        pytest.skip("mmpose is not installed: make mmpose")
    from tests.tasks.pose import mmpose_parity

    sample.write_split(tmp_path, "val", 24, np.random.default_rng(5))
    for key, (there, here) in mmpose_parity.compare(name, tmp_path, 40).items():
        assert here == pytest.approx(there, abs=0.018 if key == "crops" else 1e-5), key


@pytest.mark.mmpose
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "theirs"),
    [("coco", "coco"), ("wholebody", "coco_wholebody"), ("mpii", "mpii"), ("crowdpose", "crowdpose"), ("ap10k", "ap10k"),
     ("hand", "coco_wholebody_hand"), ("face", "coco_wholebody_face")],
)  # fmt: skip
def test_ready_sets_are_mmposes(name: str, theirs: str) -> None:
    """Names, pairs, halves, sigmas, limbs. Kills: a slip of the pen in one of 133 numbers."""
    if importlib.util.find_spec("mmpose") is None:
        pytest.skip("mmpose is not installed: make mmpose")
    import runpy

    import mmpose

    file = Path(mmpose.__file__).parent / f".mim/configs/_base_/datasets/{theirs}.py"
    published = runpy.run_path(str(file))["dataset_info"]
    joints, listed = joint_sets.SETS[name], [published["keypoint_info"][k] for k in sorted(published["keypoint_info"])]
    names = [joint["name"] for joint in listed]
    if name != "hand":  # whose fingers are written "thumb1" here and there
        assert same_names(joints.names, names)
    assert list(joints.mirrored) == [names.index(joint["swap"]) if joint["swap"] else k for k, joint in enumerate(listed)]
    np.testing.assert_allclose(joints.sigmas, published["sigmas"], atol=1e-9)
    if name in ("coco", "wholebody", "mpii", "crowdpose", "ap10k"):
        kinds = [joint["type"] for joint in listed]
        assert [k for k, kind in zip(joints.upper, kinds, strict=True) if kind] == [kind == "upper" for kind in kinds if kind]
    limbs = {frozenset(names.index(end) for end in limb["link"]) for limb in published["skeleton_info"].values()}
    ours = {frozenset(limb) for limb in joints.limbs}
    assert limbs <= ours <= limbs | {frozenset((9, 91)), frozenset((10, 112))}  # the whole body's wrists and hands
