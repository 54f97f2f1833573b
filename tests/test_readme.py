"""The README's snippets run as they stand."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm.optim
import timm.utils
import torch
import torch.distributed as dist
from torch import nn

import arsam
from arsam import ARSAM, sampling
from benchmarks.compare import readme, records

README = (Path(__file__).parent.parent / "README.md").read_text()
SECTION = README.split("## In your loop")[1].split("## What it does")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)


def block(word: str) -> str:
    (found,) = (code for code in BLOCKS if word in code)
    return found


@pytest.fixture
def names() -> dict[str, Any]:
    """What the snippets take for granted."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    loader = [(torch.randn(16, 8), torch.randint(3, (16,))) for _ in range(60)]
    optimizer = ARSAM(torch.optim.SGD(model.parameters(), lr=0.1), sampling=sampling.Periodic(3), model=model)
    return {
        "ARSAM": ARSAM, "arsam": arsam, "torch": torch, "timm": timm, "model": model, "network": model, "loader": loader,
        "criterion": nn.CrossEntropyLoss(), "optimizer": optimizer, "device": "cpu",
        "scheduler": SimpleNamespace(step=lambda: None),
        "batches_of": lambda n: [loader[i : i + n] for i in range(0, len(loader), n)],
    }  # fmt: skip


def run(word: str, names: dict[str, Any]) -> None:
    """Run a block; the weights have moved, and the optimizer was stepped."""
    before = copy.deepcopy(list(names["model"].parameters()))
    exec(compile(block(word), "README.md", "exec"), names)
    optimizer = getattr(names["optimizer"], "optimizer", names["optimizer"])
    assert optimizer.stats["ascents"] > 0
    assert not all(torch.equal(a, b) for a, b in zip(before, names["network"].parameters(), strict=True))


@pytest.mark.parametrize(
    "word", ["scheduler.step()", "    criterion(model(inputs), targets).backward()\n    if", "scaled_step(", "batches_of"]
)
def test_loops(names: dict[str, Any], word: str) -> None:
    """Kills: an example that no longer fits the optimizer."""
    run(word, names)


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
def test_ddp(names: dict[str, Any]) -> None:
    """Kills: the same."""
    run("DistributedDataParallel", names)


def test_accelerate(names: dict[str, Any]) -> None:
    """Kills: the same."""
    accelerate = pytest.importorskip("accelerate", reason="needs the extra loops")
    names["accelerator"] = accelerate.Accelerator(cpu=True)
    names["loader"] = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(torch.randn(160, 8), torch.randint(3, (160,))), batch_size=8
    )
    run("accelerator.prepare", names)


def test_lightning(names: dict[str, Any]) -> None:
    """Kills: the same."""
    pytest.importorskip("lightning", reason="needs the extra loops")
    importlib.import_module("arsam.integrations.lightning")
    exec(compile(block("SharpnessAware"), "README.md", "exec"), names)
    module = names["Model"]()
    module.network = names["network"]
    assert isinstance(module.configure_optimizers(), ARSAM)


def test_timm(names: dict[str, Any]) -> None:
    """Kills: the same."""
    exec(compile(block("create_optimizer_v2") + block("scheduler.step()").split("\n", 1)[1], "README.md", "exec"), names)
    assert names["optimizer"].stats["steps"] == 60


def test_openmmlab() -> None:
    """Kills: a snippet that is no config. That the wrapper trains is shown by the integration's own tests."""
    names: dict[str, Any] = {}
    exec(block("ARSAMOptimWrapper"), names)
    assert names["optim_wrapper"]["type"] == "ARSAMOptimWrapper"


def test_every_block_is_run() -> None:
    """Kills: a new example that no test runs."""
    assert len(BLOCKS) == 9


def test_the_results_are_those_of_the_records() -> None:
    """Kills: a table edited by hand, or records without `python tools/bench.py readme` after them."""
    assert "<!-- results: " in README
    assert readme.readme(README, records.FOLDER) == README
    page = (Path(__file__).parent.parent / "docs/rho.md").read_text()
    assert readme.rho(page, records.FOLDER) == page and "<!-- rho -->" in page
    assert readme.results(records.FOLDER) == (Path(__file__).parent.parent / "docs/results.md").read_text()


def test_the_records_keep_what_a_budget_promises() -> None:
    """Passes per step to within one step on every recorded run. Kills: a record of other rules than its name says."""
    found = [line for path in records.FOLDER.glob("*.jsonl") for line in records.read(path)]
    runs = [line for line in found if line["kind"] == "run" and line["row"].startswith("budget-")]
    assert len(runs) > 50
    for run in runs:
        share = float(run["row"].split("-")[1]) - 1
        assert abs(run["ascents"] - share * run["steps"]) <= 1, run
        part = 0.5 if run["row"].endswith("half-batch") and run["loop"] > 1 else 1.0
        assert run["passes_per_step"] == pytest.approx(1 + part * run["ascents"] / run["steps"]), run


def test_the_recipe_for_rho() -> None:
    """It finds the best of a ladder, inside. Kills: a search that stops at its edge, or that never ends."""
    page = (Path(__file__).parent.parent / "docs/rho.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "docs/rho.md", "exec"), names)
    for peak, found in ((0.1, 0.1), (0.4, 0.4), (0.02, 0.0177), (100.0, 1.6)):
        tried: list[float] = []

        def train(rho: float, tried: list[float] = tried) -> tuple[float, Any]:
            tried.append(rho)
            return rho, SimpleNamespace(stats={})

        best = names["find_rho"](train, lambda rho, peak=peak: -abs(rho / peak - 1) if rho < peak else peak / rho - 1)
        assert best == pytest.approx(found, rel=0.05) and len(tried) == len(set(tried)) <= 11
