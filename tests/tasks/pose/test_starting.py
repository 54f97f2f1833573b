"""The weights that a pose training starts from, whoever named them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tasks.errors import UserError
from tasks.pose import deployed, starting
from tasks.pose.codec import Heatmap
from tasks.pose.joints import COCO, Joints
from tasks.pose.model import HeatmapHRNet
from tasks.pose.task import PoseTask
from tasks.pose.timm_networks import TimmHeatmap

FISH = Joints(("tip", "left_fin", "right_fin", "tail"))
TINY: Any = {"widths": (4, 8, 8, 8), "modules": (1, 1, 1), "blocks": 1}


def hrnet(joints: Joints = COCO, seed: int = 0) -> HeatmapHRNet:
    torch.manual_seed(seed)
    return HeatmapHRNet(**TINY, joints=joints)


def original(model: torch.nn.Module) -> dict[str, Any]:
    """As the repositories of HRNet and SimpleBaseline name tensors: the backbone without a prefix, no joints."""
    names = {"head.": "final_layer.", "neck.": "deconv_layers."}
    state = {key: tensor for key, tensor in model.state_dict().items() if key != "_extra_state"}
    for old, new in names.items():
        state = {new + key[len(old) :] if key.startswith(old) else key: tensor for key, tensor in state.items()}
    return {key.removeprefix("backbone."): tensor for key, tensor in state.items()}


def equal(one: torch.nn.Module, other: torch.nn.Module, but: str = "-") -> bool:
    theirs = dict(other.named_parameters())
    return all(torch.equal(p, theirs[name]) for name, p in one.named_parameters() if not name.startswith(but))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "module.model."])
@pytest.mark.parametrize("whose", ["ours", "original"])
def test_names_and_prefixes(whose: str, prefix: str, tmp_path: Path) -> None:
    """All tensors are taken, by a training and by an evaluation. Kills: a prefix of two wrappers, a head left at random."""
    trained, fresh = hrnet(), hrnet(seed=1)
    state = trained.state_dict() if whose == "ours" else original(trained)
    torch.save({"state_dict": {prefix + key: tensor for key, tensor in state.items()}}, tmp_path / "w.pth")
    line = starting.start(fresh, str(tmp_path / "w.pth"))
    assert equal(trained, fresh) and line.endswith("0 left, none made anew")
    task = PoseTask(
        codec=Heatmap((64, 64), (16, 16)), network=lambda codec, joints: HeatmapHRNet(**TINY, joints=joints), joints="coco"
    )
    _, network = deployed.loaded(task, tmp_path / "w.pth")
    assert equal(trained, network)


def test_simple_baseline(tmp_path: Path) -> None:
    """With its deconvolutions. Kills: deconvolutions made anew in silence."""
    torch.manual_seed(0)
    trained, fresh = (TimmHeatmap("resnet10t", deconvs=(8, 8, 8)) for _ in range(2))
    torch.save(original(trained), tmp_path / "w.pth")
    assert starting.start(fresh, str(tmp_path / "w.pth")).endswith("0 left, none made anew")
    assert equal(trained, fresh)


def test_a_backbone_alone(tmp_path: Path) -> None:
    """Its layers of classification are left, the head is made anew. Kills: a backbone that stays random."""
    trained, fresh = hrnet(), hrnet(seed=1)
    state = {key: tensor for key, tensor in original(trained).items() if not key.startswith("final_layer")}
    torch.save({**state, "classifier.weight": torch.zeros(3, 3)}, tmp_path / "w.pth")
    assert starting.start(fresh, str(tmp_path / "w.pth")).endswith("1 left, made anew: head")
    assert equal(trained.backbone, fresh.backbone) and not equal(trained.head, fresh.head)


@pytest.mark.parametrize("others", [FISH, Joints([*COCO.names[1:], COCO.names[0]])])  # type: ignore[arg-type]
def test_other_joints(others: Joints, tmp_path: Path) -> None:
    """Of another number or of the same: the head is made anew. Kills: a head of 17 other joints, taken by its shape."""
    trained, fresh = hrnet(others), hrnet(seed=1)
    torch.save(trained.state_dict(), tmp_path / "w.pth")
    assert starting.start(fresh, str(tmp_path / "w.pth")).endswith("2 left, made anew: head")
    assert equal(trained.backbone, fresh.backbone) and not equal(trained.head, fresh.head)


def test_another_backbone(tmp_path: Path) -> None:
    """Is refused, with the first tensor that differs. Kills: the few that fit by chance are taken."""
    torch.save(hrnet().state_dict(), tmp_path / "w.pth")
    wider = HeatmapHRNet(**{**TINY, "widths": (8, 8, 8, 8)})
    with pytest.raises(UserError, match=r"w\.pth: does not fit the backbone of this config: .* is expected"):
        starting.start(wider, str(tmp_path / "w.pth"))
    with pytest.raises(UserError, match=r"w\.pth: lacks .* of the backbone's tensors"):
        starting.start(TimmHeatmap("resnet10t"), str(tmp_path / "w.pth"))
