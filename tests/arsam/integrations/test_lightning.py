"""Lightning against a plain loop, and what Lightning does to an ARSAM that it is given as it is."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from arsam import ARSAM, sampling, scaled_step
from tests.reference import counts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning", reason="lightning is not installed; pip install '.[loops]'")
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import StochasticWeightAveraging
    from lightning.pytorch.plugins import MixedPrecision

    EXAMPLE = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "lightning_trainer.py"))

pytestmark = pytest.mark.filterwarnings("default")

STEPS = 12
PRECISIONS = ["32-true", "bf16-mixed", "16-mixed"]


class Watched(EXAMPLE["Digits"]):  # type: ignore[misc]
    """The example's module with its passes counted and its logged losses kept."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.passes = 0
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.passes += 1
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())


class Plain(Watched):
    """Without what SharpnessAware does."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        LightningModule.optimizer_step(self, *args, **kwargs)


def fit(model: Any, precision: str = "32-true", steps: int = STEPS, checkpoint: str | None = None, **settings: Any) -> Trainer:
    plugins = []
    if precision == "16-mixed":  # Lightning takes bfloat16 instead on a CPU, unless it is given the plugin
        plugins = [MixedPrecision("16-mixed", device="cpu", scaler=GradScaler("cpu", init_scale=2.0**10))]
    settings = {"enable_checkpointing": False, **settings}
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        precision=None if plugins else precision,  # type: ignore[arg-type]
        plugins=plugins,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(model, EXAMPLE["loader"](), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return trainer


def by_hand(precision: str, clip: float | None = None) -> tuple[Any, list[float], ARSAM]:
    """The same training in a loop of one's own: (model, losses of the first passes, optimizer)."""
    model = Watched()
    optimizer = model.configure_optimizers()
    scaler = GradScaler("cpu", init_scale=2.0**10, enabled=precision == "16-mixed")
    dtype = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16, "16-mixed": torch.half}[precision]
    losses = []
    for (inputs, labels), _ in zip(EXAMPLE["loader"](), range(STEPS), strict=False):

        def closure(inputs: Tensor = inputs, labels: Tensor = labels) -> Tensor:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=precision != "32-true", cache_enabled=False):
                loss = nn.functional.cross_entropy(model.net(inputs), labels)
            scaler.scale(loss).backward()  # type: ignore[union-attr]
            return loss

        losses.append(scaled_step(optimizer, closure, scaler).item())
    return model, losses, optimizer


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equals_the_plain_loop(precision: str) -> None:
    """Kills: a second pass on every step or none, running statistics that move, the loss of the second pass reported."""
    model = Watched()
    trainer = fit(model, precision)
    other, losses, optimizer = by_hand(precision)
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert counts(trainer.optimizers[0]) == counts(optimizer)
    assert model.passes == STEPS + optimizer.stats["ascents"] == STEPS + 3
    assert trainer.global_step == STEPS
    assert model.losses == losses
    assert trainer.callback_metrics["loss_epoch"].item() == pytest.approx(sum(losses) / STEPS, rel=1e-5)


def test_as_it_is_it_trains_and_reports_the_wrong_loss() -> None:
    """The broken variant: the weights are right, what Lightning says of the run is not."""
    model = Plain()
    trainer = fit(model)
    other, losses, _ = by_hand("32-true")
    assert torch.equal(model.net[0].weight, other.net[0].weight)
    assert model.losses != losses and model.losses[1] == losses[1]
    assert trainer.callback_metrics["loss_epoch"].item() != pytest.approx(sum(losses) / STEPS, rel=1e-5)


def test_as_it_is_it_cannot_scale_losses() -> None:
    """The broken variant: the first ascent under 16-mixed is an error, not a step without ascent."""
    with pytest.raises(RuntimeError, match="step\\(\\) was called without a closure"):
        fit(Plain(), "16-mixed")


def test_accumulation_is_refused() -> None:
    """Kills: a second pass over the last of the accumulated batches alone, which the broken variant would do."""
    with pytest.raises(ValueError, match="accumulate_grad_batches must be 1"):
        fit(Watched(), accumulate_grad_batches=2)
    with pytest.raises(RuntimeError, match="added its gradient to one that was there before"):
        fit(Plain(), accumulate_grad_batches=2, steps=1)


def test_clips_once_and_hooks_run_once() -> None:
    """Kills: clipping of g before PSF is taken from it, the hooks of a step run per pass."""

    class Hooked(Watched):
        before_step = 0

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.before_step += 1

    class HookedPlain(Plain):
        before_step = 0

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.before_step += 1

    model, broken = Hooked(), HookedPlain()
    fit(model, gradient_clip_val=1e-3)
    assert model.before_step == STEPS
    fit(broken, gradient_clip_val=1e-3)
    assert broken.before_step == STEPS + 3
    assert not torch.equal(model.net[0].weight, broken.net[0].weight)
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        fit(Watched(), "16-mixed", gradient_clip_val=1e-3)


def test_resumes(tmp_path: Path) -> None:
    """Kills: a checkpoint without PSF or counters."""
    whole = Watched()
    first = Watched()
    fit(whole, steps=-1, max_epochs=2)
    trainer = fit(first, steps=-1, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Watched()
    fit(resumed, steps=-1, max_epochs=2, checkpoint=str(tmp_path / "half.ckpt"))
    assert resumed.losses == whole.losses[28:]
    state = torch.load(tmp_path / "half.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["arsam"]["kept"]
    state["optimizer_states"][0]["arsam"]["kept"] = {}
    torch.save(state, tmp_path / "broken.ckpt")
    broken = Watched()
    fit(broken, steps=-1, max_epochs=2, checkpoint=str(tmp_path / "broken.ckpt"))
    assert broken.losses != whole.losses[28:]


def test_other_optimizers_pass_through() -> None:
    """Kills: a module that trains with ARSAM only."""

    class Other(Watched):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    model = Other()
    fit(model, accumulate_grad_batches=2, steps=3)
    assert model.passes == 6


def test_never_is_free() -> None:
    """Kills: a second pass where no ascent is due."""

    class Free(Watched):
        def configure_optimizers(self) -> Any:
            return ARSAM(torch.optim.SGD(self.parameters(), lr=0.1), sampling=sampling.Never())

    model = Free()
    fit(model)
    assert model.passes == STEPS


class Manual(LightningModule):
    """Manual optimization: the loop that owns its backward, inside a training_step."""

    def __init__(self, accumulate: int = 1, wrapped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = EXAMPLE["Digits"]().net
        self.automatic_optimization = False
        self.accumulate, self.wrapped = accumulate, wrapped
        self.batches: list[Any] = []

    configure_optimizers = EXAMPLE["Digits"].configure_optimizers

    def of(self, optimizer: Any) -> Any:
        """Lightning's own wrapper, which pretends to be of our class, or the ARSAM in it."""
        return optimizer if self.wrapped else optimizer.optimizer

    def backward_all(self) -> None:
        for inputs, labels in self.batches:
            self.manual_backward(nn.functional.cross_entropy(self.net(inputs), labels) / len(self.batches))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        if len(self.batches) < self.accumulate:
            return
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.backward_all()
        if self.of(optimizer).due:
            with self.of(optimizer).perturb():
                self.backward_all()
        optimizer.step()
        self.batches = []


@pytest.mark.parametrize("wrapped", [False, True], ids=["optimizer.optimizer", "optimizer"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_manual_optimization_equals_the_plain_loop(precision: str, wrapped: bool) -> None:
    """Lightning hands step() a closure that does nothing, and its wrapper inherits our methods.

    Kills: an ascent that this closure throws away, or that stays on the wrapper.
    """
    model = Manual(wrapped=wrapped)
    trainer = fit(model, precision)
    other, _, optimizer = by_hand(precision)
    for (name, x), y in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    assert trainer.optimizers[0].stats["ascents"] == optimizer.stats["ascents"] == 3  # type: ignore[attr-defined]


def test_manual_optimization_accumulates() -> None:
    """Kills: a second pass over the last batch alone, which automatic optimization could not but do."""
    torch.manual_seed(0)
    model = Manual(accumulate=2)
    fit(model, steps=6)
    torch.manual_seed(0)
    other = EXAMPLE["Digits"]()
    optimizer = other.configure_optimizers()
    data = list(EXAMPLE["loader"]())[:12]
    for i in range(0, 12, 2):

        def closure(some: Any = data[i : i + 2]) -> None:
            optimizer.zero_grad()
            for inputs, labels in some:
                (nn.functional.cross_entropy(other.net(inputs), labels) / 2).backward()

        optimizer.step(closure)
    for (name, x), y in zip(model.net.state_dict().items(), other.net.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, msg=name)


def test_manual_optimization_without_the_second_pass_is_refused() -> None:
    """Kills: a step that silently goes without its ascent."""

    class Forgetful(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.batches = [batch]
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.backward_all()
            optimizer.step()

    with pytest.raises(RuntimeError, match="second pass"):
        fit(Forgetful())


def test_both_passes_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Automatic and manual. Kills: dropout masks of the second pass that are not the first's."""
    for kind in (Watched, Manual):
        model = kind()
        model.net.append(nn.Dropout(0.5))
        model.net.append(nn.Linear(10, 10))
        masks: list[Tensor] = []
        model.net[4].register_forward_hook(
            lambda _, inputs, output, masks=masks: masks.append((output == 0) & (inputs[0] != 0))
        )
        if kind is Watched:
            monkeypatch.setattr(model, "on_train_batch_end", lambda *_: None)
        fit(model)
        assert len(masks) == STEPS + 3
        pairs = [(0, 1), (6, 7), (12, 13)]  # the ascents are at steps 0, 5 and 10
        assert all(torch.equal(masks[i], masks[j]) for i, j in pairs)
        assert not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weight_averaging_with_batch_norm(precision: str) -> None:
    """Its last epoch re-estimates BatchNorm without gradients. Kills: refused accumulation, passes and steps in that epoch."""

    class Averaged(Watched):
        def __init__(self) -> None:
            super().__init__()
            self.epochs: list[int] = []

        def on_train_epoch_end(self) -> None:
            self.epochs.append(self.passes)

    model = Averaged()
    averaging = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=2, annealing_epochs=1)
    trainer = fit(model, precision, steps=-1, max_epochs=3, callbacks=[averaging])
    batches = len(EXAMPLE["loader"]())
    stats = trainer.optimizers[0].stats  # type: ignore[attr-defined]
    assert stats["steps"] == 3 * batches and stats["ascents"] == -(-3 * batches // 5)
    assert model.epochs[-1] - model.epochs[-2] == batches
    again = EXAMPLE["Digits"]().net
    again.load_state_dict(model.net.state_dict())
    again[1].reset_running_stats()
    again[1].momentum = None  # the plain mean over all batches
    with torch.no_grad():
        for inputs, _ in EXAMPLE["loader"]():
            again(inputs)
    torch.testing.assert_close(model.net[1].running_mean, again[1].running_mean, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(model.net[1].running_var, again[1].running_var, atol=1e-2, rtol=1e-2)


def test_a_batch_that_is_left_out() -> None:
    """training_step returns None, on an ascent too. Kills: a second pass over such a batch."""

    class Picky(Watched):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 5 else loss

        def on_train_batch_end(self, *args: Any) -> None:
            pass

    model = Picky()
    fit(model)
    assert model.passes == STEPS + 2


def test_the_documented_clipping_hook() -> None:
    """On a zero gradient, whose norm is falsy. Kills: a hook that returns the norm, which torch takes for arguments."""
    weight = nn.Parameter(torch.ones(3))
    base = torch.optim.SGD([weight], lr=0.1)

    def clip(*_: Any) -> None:
        torch.nn.utils.clip_grad_norm_([weight], 1.0)

    base.register_step_pre_hook(clip)
    optimizer = ARSAM(base, sampling=sampling.Never())
    for factor in (0.0, 100.0):
        optimizer.zero_grad()
        (factor * weight).sum().backward()
        optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.ones(3) - 0.1 / 3**0.5)


def test_script(capsys: pytest.CaptureFixture[str]) -> None:
    """Kills: an example that does not run as it stands."""
    EXAMPLE["main"]()
    assert "'ascents': " in capsys.readouterr().out
