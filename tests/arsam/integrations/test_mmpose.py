"""The example configs of mmpose, trained by mmpose's own runner on pictures in COCO's layout."""

from __future__ import annotations

import os
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("mmengine", "mmcv", "mmpose"):
        pytest.importorskip(package, reason=f"{package} is not installed; make test-mmpose")
    from arsam.integrations.mmpose_standins import install

    install()
    from mmengine.config import Config
    from mmengine.runner import Runner

pytestmark = [pytest.mark.mmpose, pytest.mark.filterwarnings("default")]

EXAMPLES = Path(__file__).parents[3] / "examples" / "mmpose"
PEOPLE = 16
SMALL: dict[str, Any] = {  # two steps an epoch, every other one an ascent
    **{
        f"{loader}_dataloader.{name}": x
        for loader in ("train", "val")
        for name, x in {"batch_size": 8, "num_workers": 0}.items()
    },
    **{f"{loader}_dataloader.persistent_workers": False for loader in ("train", "val")},
    "train_dataloader.dataset.indices": PEOPLE,
    "val_dataloader.dataset.indices": 8,
    "train_cfg.max_epochs": 2,
    "train_cfg.val_interval": 2,
    "default_hooks.checkpoint.interval": 1,
    "optim_wrapper.sampling": {"type": "Periodic", "every": 2},
    "randomness": {"seed": 5},
}


@pytest.fixture(scope="module", autouse=True)
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """ARSAM_DATA/coco where there is such a folder, people drawn otherwise."""
    from tasks.pose.sample import write_split

    with pytest.MonkeyPatch.context() as patch:
        if not (Path(os.environ.get("ARSAM_DATA", "data")) / "coco" / "annotations").is_dir():
            root = tmp_path_factory.mktemp("data")
            for seed, split in enumerate(("train", "val")):
                write_split(root / "coco", split, PEOPLE, np.random.default_rng(seed))
            patch.setenv("ARSAM_DATA", str(root))
        yield


def train(name: str, folder: Path, **more: Any) -> tuple[Any, list[float], int]:
    """(runner, loss of each step, forward passes of training) of one run."""
    config = Config.fromfile(EXAMPLES / f"{name}.py")
    config.merge_from_dict(SMALL)
    # mmengine does not restore the generators that the random transforms draw from, so without them
    pipeline = [x for x in config.train_dataloader.dataset.pipeline if not x["type"].startswith("Random")]
    config.train_dataloader.dataset.pipeline = pipeline
    config.merge_from_dict({"work_dir": str(folder), "experiment_name": folder.name, "log_level": "ERROR", **more})
    runner = Runner.from_cfg(config)
    losses: list[float] = []
    forwards = 0
    step = runner.model.train_step

    def count(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        nonlocal forwards
        forwards += kwargs["mode"] == "loss"

    def train_step(*args: Any, **kwargs: Any) -> Any:
        log = step(*args, **kwargs)
        losses.append(log["loss"].item())
        return log

    runner.model.register_forward_pre_hook(count, with_kwargs=True)
    runner.model.train_step = train_step
    runner.train()
    return runner, losses, forwards


def test_hrnet_trains_evaluates_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: a second forward on each step, a resumed run that goes on with other gradients, no AP."""
    whole, losses, forwards = train("hrnet_small", tmp_path / "whole")
    assert "Average Precision  (AP)" in capsys.readouterr().out
    stats = whole.optim_wrapper.optimizer.stats
    assert {name: stats[name] for name in ("steps", "ascents", "reuses")} == {"steps": 4, "ascents": 2, "reuses": 2}
    assert forwards == stats["steps"] + stats["ascents"]
    checkpoint = str(tmp_path / "whole" / "epoch_1.pth")
    resumed, rest, _ = train("hrnet_small", tmp_path / "resumed", resume=True, load_from=checkpoint)
    assert rest == losses[2:]
    assert resumed.optim_wrapper.optimizer.stats == stats
    for x, y in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True):
        assert x.equal(y)


@pytest.mark.parametrize("name", ["simcc_resnet18", "rtmpose_tiny"])
def test_others_train(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: a config that does not fit mmpose's own, or imports what is not there."""
    runner, losses, forwards = train(name, tmp_path / name, **{"train_cfg.max_epochs": 1, "train_cfg.val_interval": 1})
    stats = runner.optim_wrapper.optimizer.stats
    assert len(losses) == stats["steps"] == 2 and forwards == 3
    assert np.isfinite(losses).all()
    assert "Average Precision  (AP)" in capsys.readouterr().out


def test_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: options of the command line that do not arrive."""
    options = {**SMALL, "train_cfg.max_epochs": 1, "optim_wrapper.sampling": None, "randomness": None, "val_cfg": None}
    flags = [f"{name}={x}" for name, x in options.items() if x is not None and not isinstance(x, dict)]
    flags += ["optim_wrapper.sampling.type=Never", "optim_wrapper.rho=0.25", "optim_wrapper.accumulative_counts=2"]
    argv = ["train.py", str(EXAMPLES / "hrnet_small.py"), "--work-dir", str(tmp_path), "--cfg-options", *flags]
    monkeypatch.setattr(sys, "argv", argv)
    ran: list[Any] = []
    train = Runner.train
    monkeypatch.setattr(Runner, "train", lambda self: ran.append(self) or train(self))
    runpy.run_path(str(EXAMPLES / "train.py"), run_name="__main__")
    wrapper = ran[0].optim_wrapper
    assert wrapper.optimizer.stats["steps"] == 1 and wrapper.optimizer.param_groups[0]["sam_rho"] == 0.25
    assert (tmp_path / "last_checkpoint").read_text().endswith("epoch_1.pth")
