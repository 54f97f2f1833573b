"""torch.distributed.checkpoint's own calls on an ARSAM: accelerate's and Lightning's FSDP2 make them, knowing nothing of it.

torch carries two things from an optimizer's state_dict to a checkpoint by parameter name: "state", an entry per parameter, and
"param_groups". What stands beside them is dropped without a word. And it makes the base's state by a step without a closure,
all gradients zero and every lr 0, which is no step of a training.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict

from arsam import ARSAM, reuse, sampling

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
BASES: dict[str, Any] = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-1),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
}
RULES: dict[str, Any] = {
    "decayed": lambda: {"sampling": sampling.Periodic(3), "reuse": reuse.Decayed(0.7, None)},
    "orthogonal": lambda: {"sampling": sampling.Periodic(3), "reuse": reuse.Orthogonal()},
    "adaptive": lambda: {"sampling": sampling.Adaptive(window=4, blocks=2, monitor=2), "reuse": reuse.Decayed(0.7, 2)},
    "gradient norm": lambda: {"sampling": sampling.GradientNorm(1.0, -1.0, 12), "reuse": reuse.Nothing()},
}
OPTIONS = {
    "sharded": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
# torch cannot load a full state without a tensor in it, which plain SGD's is
CASES = [(base, options) for base in BASES for options in OPTIONS if (base, options) != ("SGD", "full")]


def make(base: str, rules: str) -> tuple[nn.Module, ARSAM]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    model[0].bias.requires_grad_(False)
    rest = [*model[2].parameters()]
    groups = [{"params": [model[0].weight]}, {"params": rest, "lr": 2e-2}]
    return model, ARSAM(BASES[base](groups), rho=0.1, model=model, **RULES[rules]())


def train(model: nn.Module, optimizer: ARSAM, steps: int, start: int = 0) -> list[Tensor]:
    for step in range(start, start + steps):
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))

        def closure(inputs: Tensor = inputs) -> Tensor:
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    optimizer.zero_grad()  # as loops end a step: torch then makes state by a step of its own
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("base", "options"), CASES)
@pytest.mark.parametrize("rules", RULES)
def test_goes_on_bitwise_by_name(base: str, rules: str, options: str) -> None:
    """Kills: a PSF, counters or a rule's state that torch drops, a fresh optimizer that refuses torch's step."""
    model, optimizer = make(base, rules)
    train(model, optimizer, 5)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=OPTIONS[options]))  # as from a file
    other, fresh = make(base, rules)
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, fresh, state, options=OPTIONS[options])
    assert fresh.stats == optimizer.stats
    for x, y in zip(train(model, optimizer, 6, 5), train(other, fresh, 6, 5), strict=True):
        assert torch.equal(x, y)
    assert fresh.stats == optimizer.stats


@pytest.mark.parametrize(("base", "options"), CASES)
def test_through_files(base: str, options: str, tmp_path: Path) -> None:
    """A load fills what the fresh optimizer lists. Kills: entries that a fresh optimizer's state does not have."""
    model, optimizer = make(base, "decayed")
    train(model, optimizer, 5)
    dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer, options=OPTIONS[options])}, checkpoint_id=tmp_path / "a")
    other, fresh = make(base, "decayed")
    other.load_state_dict(model.state_dict())
    state = {"optimizer": get_optimizer_state_dict(other, fresh, options=OPTIONS[options])}
    assert fresh.stats["steps"] == 0
    dcp.load(state, checkpoint_id=tmp_path / "a")
    set_optimizer_state_dict(other, fresh, state["optimizer"], options=OPTIONS[options])
    for x, y in zip(train(model, optimizer, 6, 5), train(other, fresh, 6, 5), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("base", BASES)
def test_asking_changes_nothing(base: str) -> None:
    """Kills: torch's own step counted, or taken for a step that lacks its closure."""
    model, optimizer = make(base, "decayed")
    other, plain = make(base, "decayed")
    if base == "AdamW":  # whose own count moves with torch's step; once it has state, torch takes none
        train(model, optimizer, 1)
        train(other, plain, 1)
    for step in range(optimizer.stats["steps"], 7):
        get_optimizer_state_dict(model, optimizer)
        assert optimizer.stats["steps"] == step
        train(model, optimizer, 1, step)
        train(other, plain, 1, step)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))
