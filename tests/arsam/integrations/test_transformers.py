"""The Trainer of transformers against a plain loop."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.amp.grad_scaler import GradScaler
from torch.nn.utils import clip_grad_norm_

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for package in ("accelerate", "transformers"):
        pytest.importorskip(package, reason=f"{package} is not installed; pip install '.[loops]'")
    from transformers import Trainer, TrainingArguments

    from arsam.integrations.transformers import SharpnessAwareTrainer

    EXAMPLE = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "transformers_trainer.py"))

pytestmark = pytest.mark.filterwarnings("default")

STEPS = 12
SCALE = 2.0**10


class Counted(EXAMPLE["Digits"]):  # type: ignore[misc]
    """The example's model with its forward passes counted."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.passes = 0

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> Any:
        self.passes += 1
        return super().forward(inputs, labels)


class InOrder:
    """What makes runs comparable: batches in order, losses of the steps on record."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return None

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self.losses = [*getattr(self, "losses", []), logs["loss"]]
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


class Aware(InOrder, SharpnessAwareTrainer):
    """The integration."""


class Plain(InOrder, Trainer):
    """The broken variant: no second pass."""


def fit(
    kind: type, folder: Path, resume: bool = False, scaler: GradScaler | None = None, **settings: Any
) -> tuple[Counted, Any]:
    model = Counted()
    optimizer = EXAMPLE["optimizer_for"](model)
    settings = {
        "max_steps": STEPS,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        **settings,
    }
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=64, use_cpu=True, report_to="none", disable_tqdm=True, **settings
    )
    trainer = kind(model, arguments, train_dataset=EXAMPLE["data"](), optimizers=(optimizer, None))
    if scaler is not None:  # accelerate wants a GPU for fp16
        trainer.accelerator.state._mixed_precision = "fp16"
        trainer.accelerator.scaler = scaler
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def by_hand(accumulate: int = 1, clip: float = torch.inf, dtype: torch.dtype = torch.float32) -> tuple[Counted, Any]:
    model = Counted()
    optimizer = EXAMPLE["optimizer_for"](model)
    scaler = GradScaler("cpu", init_scale=SCALE, enabled=dtype == torch.half)
    data = EXAMPLE["data"]()
    batches = [data[i : i + 64] for i in range(0, 64 * STEPS * accumulate, 64)]

    def backward(some: list[Any]) -> None:
        for rows in some:
            inputs, labels = torch.stack([x["inputs"] for x in rows]), torch.tensor([x["labels"] for x in rows])
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = model(inputs, labels)["loss"]
            scaler.scale(loss / len(some)).backward()  # type: ignore[union-attr]

    for i in range(0, len(batches), accumulate):
        optimizer.zero_grad()
        backward(batches[i : i + accumulate])
        if optimizer.due:
            with optimizer.perturb(scaler):
                backward(batches[i : i + accumulate])
        scaler.unscale_(optimizer)
        clip_grad_norm_(model.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
    return model, optimizer


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "clipped": ({"max_grad_norm": 0.1}, {"clip": 0.1}),
    "accumulated": ({"gradient_accumulation_steps": 2}, {"accumulate": 2}),
    "bf16": ({"bf16": True}, {"dtype": torch.bfloat16}),
    "fp16": (
        {"bf16": True, "max_grad_norm": 0.1, "gradient_accumulation_steps": 2},
        {"dtype": torch.half, "clip": 0.1, "accumulate": 2},
    ),
    "fp16, unclipped": ({"bf16": True}, {"dtype": torch.half}),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_loop(case: str, tmp_path: Path) -> None:
    """Kills: a second pass over the last of the accumulated batches, running statistics that move, a scaled PSF."""
    settings, plain = CASES[case]
    scaler = GradScaler("cpu", init_scale=SCALE) if case.startswith("fp16") else None
    model, trainer = fit(Aware, tmp_path, scaler=scaler, **settings)
    other, optimizer = by_hand(**plain)
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    stats = trainer.optimizer.optimizer.stats
    assert stats == optimizer.stats and stats["steps"] == STEPS and stats["ascents"] == 3
    assert model.passes == (STEPS + 3) * settings.get("gradient_accumulation_steps", 1)


def test_both_passes_draw_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kills: dropout masks of the second pass that are not the first's."""
    masks: list[torch.Tensor] = []

    class Dropped(Counted):
        def __init__(self) -> None:
            super().__init__()
            self.net.append(torch.nn.Dropout(0.5))  # of numbers that are never 0 themselves
            self.net[4].register_forward_hook(lambda _, inputs, output: masks.append((output == 0) & (inputs[0] != 0)))

    monkeypatch.setitem(globals(), "Counted", Dropped)
    fit(Aware, tmp_path)
    assert len(masks) == STEPS + 3
    assert all(torch.equal(masks[i], masks[i + 1]) for i in (0, 6, 12))  # the ascents are at steps 0, 5 and 10
    assert not torch.equal(masks[1], masks[2])


def test_without_it_the_first_ascent_is_an_error(tmp_path: Path) -> None:
    """Kills: a step that silently goes without its ascent."""
    with pytest.raises(RuntimeError, match="an ascent is due"):
        fit(Plain, tmp_path)


def test_resumes(tmp_path: Path) -> None:
    """Kills: a checkpoint without PSF or counters; one that is refused."""
    settings = {"save_strategy": "steps", "save_steps": 8}
    whole, trainer = fit(Aware, tmp_path / "whole", **settings)
    (tmp_path / "half").mkdir()
    (tmp_path / "whole" / "checkpoint-8").rename(tmp_path / "half" / "checkpoint-8")
    resumed, rest = fit(Aware, tmp_path / "half", resume=True, **settings)
    assert rest.losses[-4:] == trainer.losses[-4:]
    for x, y in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        assert torch.equal(x, y)
    assert rest.optimizer.optimizer.stats == trainer.optimizer.optimizer.stats


def test_script(capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: an example that does not run as it stands."""
    EXAMPLE["main"]()
    assert "'ascents': " in capsys.readouterr().out
