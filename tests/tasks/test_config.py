"""Configs: overrides, their errors, and what becomes of epochs."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path

import pytest
from torch.optim import SGD, AdamW

from arsam import ARSAM, reuse, sampling
from tasks import config as configs
from tasks.config import Epochs
from tasks.errors import UserError
from tasks.schedule import in_steps
from tests.tasks import toy

ROOT = Path(__file__).parents[2]
SHIPPED = sorted(ROOT.glob("configs/*/[a-z]*.py"))


def overridden(*assignments: str) -> configs.Config:
    return configs.override(toy.config, list(assignments))


def test_overrides_reach_fields_and_arguments() -> None:
    """Dataclass fields, nested ones, arguments of partials, new arguments of partials. Kills: a config changed in place."""
    config = overridden(
        "epochs=3", "task.count=7", "optimizer.lr=0.5", "optimizer.weight_decay=0", "sharpness.sampling.window=10",
        "clip_norm=1", "schedule.floor=0.1", "ema=None",
    )  # fmt: skip
    assert (config.epochs, config.task.count, config.clip_norm, config.ema) == (3, 7, 1, None)  # type: ignore[attr-defined]
    assert config.optimizer.keywords == {"lr": 0.5, "weight_decay": 0}  # type: ignore[attr-defined]
    assert config.sharpness.keywords["sampling"].keywords["window"] == 10  # type: ignore[union-attr]
    assert config.schedule.keywords["floor"] == 0.1  # type: ignore[attr-defined]
    assert toy.config.epochs == 5
    assert toy.config.sharpness.keywords["sampling"].keywords["window"] == 8  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["Tail(fraction=0.3)", "partial(Tail, fraction=0.3)", "Tail(0.3)"])
def test_rules_by_name(text: str) -> None:
    """Rules and optimizers can be named in an override; nothing is built."""
    rule = overridden(f"sharpness.sampling={text}").sharpness.keywords["sampling"]  # type: ignore[union-attr]
    assert isinstance(rule, partial)
    assert rule.func is sampling.Tail
    assert rule(total_steps=10).fraction == 0.3


def test_whole_parts_by_name() -> None:
    """sharpness=None is the baseline; a baseline becomes ARSAM by one override; Epochs too can be written."""
    assert overridden("sharpness=None").sharpness is None
    config = overridden(
        "sharpness=ARSAM(rho=0.02, reuse=Decayed(beta=0.9, horizon=10))", "sharpness.rho=0.03", "optimizer=SGD(lr=0.1)",
        "schedule=multistep(milestones=(Epochs(2), 30))",
    )  # fmt: skip
    assert config.sharpness.func is ARSAM  # type: ignore[union-attr]
    assert config.sharpness.keywords["rho"] == 0.03  # type: ignore[union-attr]
    assert config.sharpness.keywords["reuse"].func is reuse.Decayed  # type: ignore[union-attr]
    assert config.optimizer.func is SGD  # type: ignore[attr-defined]
    assert in_steps(config.schedule, 7).keywords["milestones"] == (14, 30)
    assert overridden("sharpness.sampling=Always").sharpness.keywords["sampling"].func is sampling.Always  # type: ignore[union-attr]


def test_values_that_need_no_quotes() -> None:
    """Paths and names."""
    config = configs.override(configs.load(str(SHIPPED[0])), ["task.root=../some/where", "precision=bf16"])
    assert config.task.root == "../some/where"  # type: ignore[attr-defined]
    assert config.precision == "bf16"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("epoch=3", "unknown name epoch; did you mean epochs?"),
        ("nonsense=3", "known names: task, optimizer"),
        ("task.cout=3", "did you mean count?"),
        ("optimizer.learning=1", "unknown name learning"),
        ("sharpness.sampling.windw=3", "did you mean window?"),
        ("epochs=many", "expected int, got many"),
        ("epochs=2.5", "expected int, got 2.5"),
        ("epochs=True", "expected int, got True"),
        ("epochs=None", "expected int, got None"),
        ("epochs=-1", "epochs must be >= 0, got -1"),
        ("precision=fp8", "expected Literal['fp32', 'bf16', 'fp16'], got fp8"),
        ("ema=1.5", "ema must lie in (0, 1)"),
        ("clip_norm=0", "clip_norm must be > 0"),
        ("epochs.deep=1", "nothing named deep"),
        ("sharpness.sampling=Tial(0.3)", "unknown name Tial; did you mean Tail?"),
        ("sharpness.sampling=Tail(fractoin=0.3)", "Tail has no argument fractoin; it takes fraction, total_steps"),
        ("sharpness.sampling=os.system('x')", "call a plain name"),
        pytest.param("epochs=-10**" + "(" * 300, "expected int, got -10**((", id="more brackets than the parser has room for"),
    ],
)
def test_bad_overrides(assignment: str, message: str) -> None:
    """One error, that quotes the assignment and shows the way out."""
    with pytest.raises(UserError, match=re.escape(message)) as error:
        overridden(assignment)
    assert assignment in str(error.value)


def test_override_inside_a_missing_part() -> None:
    """On a baseline, sharpness.rho needs something to be set on."""
    with pytest.raises(UserError, match=re.escape("start from sharpness=ARSAM(rho=0.05)")):
        overridden("sharpness=None", "sharpness.rho=0.1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such config file"),
        ("config = 3", "expected a variable `config`"),
        ("import nothing_of_this_name", "ModuleNotFoundError"),
        ("config = (", "SyntaxError"),
    ],
)
def test_bad_files(content: str | None, message: str, tmp_path: Path) -> None:
    """The error names the file."""
    path = tmp_path / "own.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=f"own.py: .*{message}"):
        configs.load(str(path))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs(path: Path) -> None:
    """Each has config and sample, and a docstring; an ARSAM or SAM config is its baseline but for `sharpness`."""
    config, sample = (configs.load(str(path), sample=s) for s in (False, True))
    assert f"{path.stem}.py" in path.read_text() or "As " in path.read_text().splitlines()[0]
    configs.describe(config)
    family, _, rule = path.stem.rpartition("_")
    if rule in ("sam", "arsam", "published"):
        baseline = next((p for p in SHIPPED if p.stem in (f"{family}_adamw", f"{family}_sgd")), None)
        if baseline is None:  # a variant in something else, of an ARSAM config
            assert config.sharpness is not None
            return
        for mine, theirs in ((config, False), (sample, True)):
            assert mine.sharpness is not None
            assert configs.load(str(baseline), sample=theirs) == dataclasses.replace(mine, sharpness=None) or (
                configs.describe(configs.load(str(baseline), sample=theirs))
                == configs.describe(dataclasses.replace(mine, sharpness=None))
            )
    else:
        assert config.sharpness is None


def test_data_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """ARSAM_DATA stands for a leading data, and for nothing else."""
    monkeypatch.delenv("ARSAM_DATA", raising=False)
    assert configs.data_path("data/coco") == Path("data/coco")
    monkeypatch.setenv("ARSAM_DATA", "/big")
    assert configs.data_path("data/coco") == Path("/big/coco")
    assert configs.data_path("my/data/coco") == Path("my/data/coco")
    assert configs.data_path("/data/coco") == Path("/data/coco")


def test_epochs_become_steps() -> None:
    """In the arguments of partials, inside partials, and in tuples."""
    rule = partial(sampling.Adaptive, warmup=Epochs(3), window=5)
    nested = partial(ARSAM, sampling=rule, rho=0.1)
    assert in_steps(nested, 10).keywords["sampling"].keywords == {"warmup": 30, "window": 5}
    assert in_steps(partial(AdamW, lr=0.1), 10).keywords == {"lr": 0.1}
