"""Optimizers compared: the same start for all rows, runs that are kept, tables that say what the runs say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from arsam import functional
from arsam.sampling import Always, Budget
from benchmarks.compare import study as compare
from benchmarks.compare import tables
from benchmarks.compare.study import ROWS, RandomVector, Reversed, Row, Suite
from tasks.errors import UserError

NAMES = ("base", "sam", "arsam", "periodic-arsam", "budget-1.2", "periodic-1.2", "control-random")
NO_ASCENT = Row("no-ascent", lambda run: Budget(1.0, run.total), rho_of="sam")


def data() -> compare.Data:
    """Two classes of 4x4 pictures, bright on the left or on the right."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 2
    pictures = torch.randn(40, 1, 4, 4, generator=generator)
    pictures[:, 0, :, :2] += labels[:, None, None]
    return {"train": (pictures, labels), "val": (pictures[:20], labels[:20]), "test": (pictures[20:], labels[20:])}


TOY = Suite(
    "toy",
    data,
    (*(row for row in ROWS if row.name in NAMES), NO_ASCENT),
    partial(compare.network, 1, 2),
    seeds=2,
    epochs=4,
    rhos=(0.1, 0.2),
    batch_size=8,
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy suite, run."""
    out = tmp_path_factory.mktemp("toy")
    compare.compare(TOY, out, 2, CPU)
    return out


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def test_a_second_call_runs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a third seed runs that seed alone. Kills: finished runs, or the search for rho, run again."""
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").iterdir()}
    seeds: list[int] = []
    original = compare.train

    def noted(*args: Any, **kwargs: Any) -> Any:
        seeds.append(args[3])
        return original(*args, **kwargs)

    monkeypatch.setattr(compare, "train", noted)
    compare.compare(TOY, folder, 2, CPU)
    assert seeds == []
    compare.compare(TOY, folder, 3, CPU, only=["sam"])
    assert seeds == [2, 2], "base and sam"
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_the_table_says_what_the_runs_say(folder: Path) -> None:
    """Kills: a mean over other runs, differences between seeds, 1.96 for Student's t."""
    lines = {line["row"]: line for line in read(folder, "table.json")}
    assert list(lines) == [row.name for row in TOY.rows]
    for name, line in lines.items():
        values = [read(folder, f"runs/{name}-{seed}.json") for seed in range(line["seeds"])]
        assert line["accuracy"] == pytest.approx(sum(v["accuracy"] for v in values) / len(values))
        assert line["ascents"] == sum(v["ascents"] for v in values) / len(values)
        differences = [v["accuracy"] - read(folder, f"runs/sam-{seed}.json")["accuracy"] for seed, v in enumerate(values)]
        if len(differences) == 2:
            half = 12.7062 * abs(differences[0] - differences[1]) / 2  # t for one degree of freedom
            assert line["minus_sam"] == pytest.approx([sum(differences) / 2, half], rel=1e-4)
    text = (folder / "table.md").read_text()
    assert all(f"| {name} |" in text for name in lines)
    assert (folder / "pareto.png").stat().st_size > 1000 and (folder / "ageing.png").stat().st_size > 1000
    assert read(folder, "environment.json")["suite"]["epochs"] == 4


def test_rows_share_their_start_and_their_batches(folder: Path) -> None:
    """Without ascents ARSAM is the base to the last bit. Kills: weights or batches drawn after something of the row."""
    for seed in (0, 1):
        plain, other = (read(folder, f"runs/{name}-{seed}.json") for name in ("base", "no-ascent"))
        assert (plain["accuracy"], plain["training_loss"]) == (other["accuracy"], other["training_loss"])
        assert other["ascents"] == 0
        assert plain["training_loss"] != read(folder, f"runs/sam-{seed}.json")["training_loss"]


def test_rivals_get_the_ascents_of_the_row_they_are_held_against(folder: Path) -> None:
    """Kills: a share that is not taken from the run of the same seed; passes counted wrong."""
    for seed in (0, 1):
        arsam, periodic, budget = (read(folder, f"runs/{n}-{seed}.json") for n in ("arsam", "periodic-arsam", "budget-1.2"))
        assert arsam["ascents"] == periodic["ascents"] > 0
        assert budget["ascents"] == 4 and budget["passes_per_step"] == 1.2


def test_rho_is_chosen_on_held_out_images(folder: Path) -> None:
    """Kills: the worst candidate, a search on the test images, a rho that the run does not use."""
    scores = {rho: read(folder, f"tune/sam-rho{rho:g}-1000.json")["accuracy"] for rho in TOY.rhos}
    best = max(TOY.rhos, key=lambda rho: (scores[rho], -rho))
    assert read(folder, "runs/sam-0.json")["rho"] == best
    assert read(folder, "runs/control-random-0.json")["rho"] == read(folder, "runs/budget-1.2-0.json")["rho"]
    assert read(folder, "runs/base-0.json")["rho"] is None
    assert all(score * 20 == pytest.approx(round(score * 20)) for score in scores.values())


def test_other_settings_are_refused(folder: Path) -> None:
    """Runs of two kinds in one table would be compared. Errors name the folder and the way out."""
    with pytest.raises(UserError, match=r"rhos was \[0.1, 0.2\], is \[0.3\]; name another --out"):
        compare.compare(TOY, folder, 2, CPU, rho=0.3)
    path = folder / "runs/sam-1.json"
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "rho": 0.7}))
    with pytest.raises(UserError, match=r"sam-1.json: has rho 0.7, the one chosen is 0\.[12]; delete it"):
        compare.compare(TOY, folder, 2, CPU)
    path.write_text(text)
    with pytest.raises(UserError, match="no row of the suite toy"):
        compare.compare(TOY, folder, 2, CPU, only=["adam"])


def test_ageing(folder: Path) -> None:
    """A cosine, of windows that lie within the run. Kills: a PSF held against itself."""
    aged = read(folder, "ageing.json")
    assert len(aged["cosine"]) == len(aged["ages"]) >= 1
    assert len(aged["cosine_by_start"]) == len(aged["starts"])
    assert all(-1 <= c < 0.999 for values in aged["cosine_by_start"] for c in values)


def test_controls() -> None:
    """Noise with the norm of each tensor's PSF, and the PSF reversed. Kills: a global norm, a PSF left as it is."""
    g, g_s = [torch.ones(50), torch.zeros(3)], [torch.full((50,), 3.0), torch.ones(3)]
    kept = [x.clone() for x in g]
    RandomVector().keep_(kept, g_s)
    for x, a, b in zip(kept, g, g_s, strict=True):
        assert float(x.norm()) == pytest.approx(float((b - a).norm()), rel=1e-5)
    assert abs(float(kept[0] @ (g_s[0] - g[0]) / functional.global_norm([kept[0]]) ** 2)) < 0.6
    mixed = [torch.zeros(2)]
    Reversed(0.5).mix_(mixed, [torch.ones(2)], 2)
    assert mixed[0].tolist() == [-0.25, -0.25]


def test_memory_grows_with_what_is_kept() -> None:
    """Kills: a peak that does not see the backward pass or the kept PSF."""
    rows = {row.name: row for row in ROWS}
    base, periodic, budget = (compare.memory(TOY, rows[name], data()) for name in ("base", "periodic-1.2", "budget-1.2"))
    parameters = 4e-6 * sum(p.numel() for p in TOY.network().parameters())
    assert base > 3 * parameters, "weights, momentum and gradients"
    assert base < periodic < budget
    made: list[torch.Tensor] = []

    def network() -> nn.Module:
        made.append(torch.zeros(0 if made else 10**6))
        return TOY.network()

    assert compare.memory(replace(TOY, network=network), rows["base"], data()) == base, "of the first call alone"


def test_rho_beyond_the_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A best candidate at the edge is no best one yet. Kills: a search that stops at the edge, one that never stops."""

    def trained(*args: Any, split: str) -> Any:
        assert split == "val"
        return None, {"accuracy": target[0] - abs(math.log(args[4] / target[1])), "passes_per_step": 2.0, "seconds": 0.0}

    monkeypatch.setattr(compare, "train", trained)
    row = {row.name: row for row in ROWS}["sam"]
    for name, best, found in (("inside", 0.11, 0.1), ("above", 0.5, 0.4), ("below", 0.03, 0.025), ("far", 50.0, 1.6)):
        target = (0.5, best)
        (tmp_path / name / "tune").mkdir(parents=True)
        assert compare._tuned(TOY, row, data(), tmp_path / name) == pytest.approx(found)


@pytest.mark.parametrize("name", ["SAM", "GSAM", "WSAM", "FriendlySAM", "LookSAM"])
def test_the_sam_family_of_another_package(name: str) -> None:
    """Two passes on every step, and the learning rate that ours gets. Kills: a first pass left out, a base without momentum."""
    pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
    row = {row.name: row for row in ROWS}[f"pytorch-optimizer-{name}"]
    model, result = compare.train(TOY, row, data(), 0, 0.1, 0.0)
    assert result["passes_per_step"] == 2.0
    if name == "SAM":
        ours, _ = compare.train(TOY, Row("sam", lambda run: Always()), data(), 0, 0.1, 0.0)
        for a, b in zip(model.parameters(), ours.parameters(), strict=True):
            torch.testing.assert_close(a, b)


def test_interval_and_noise() -> None:
    """Kills: the normal distribution's 1.96; labels replaced by themselves."""
    mean, half = tables.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.3027 / math.sqrt(3), rel=1e-4))
    assert math.isnan(tables.interval([1.0])[1])
    labels = torch.arange(1000) % 10
    noisy = compare._noisy(labels, 0.3)
    assert int((noisy != labels).sum()) == 300 and noisy.unique().tolist() == list(range(10))


def test_answers(tmp_path: Path) -> None:
    """Paired by seed. Kills: means held against each other, the seeds' spread taken for the difference's, yes for a tie."""
    values = {"sam": [0.5, 0.7, 0.6], "arsam": [0.51, 0.71, 0.61], "base": [0.4, 0.8, 0.5], "bernoulli-arsam": [0.6, 0.8, 0.7]}
    runs = tmp_path / "toy/runs"
    runs.mkdir(parents=True)
    for row, numbers in values.items():
        for seed, number in enumerate(numbers):
            run = {"row": row, "seed": seed, "accuracy": number, "passes_per_step": 1.5}
            (runs / f"{row}-{seed}.json").write_text(json.dumps(run))
    lines = [
        {"row": row, "seeds": 3, "accuracy": 0.6, "half": 0.1, "passes_per_step": 1.5} for row in values if row in tables.TITLES
    ]
    (tmp_path / "toy/table.json").write_text(json.dumps(lines))
    text = tables.readme("before\n<!-- results: toy -->\nold\n<!-- /results -->\nafter\n", tmp_path)
    assert text.startswith("before\n<!-- results: toy -->\n| ") and text.endswith("|\n<!-- /results -->\nafter\n")
    assert "old" not in text
    answers = dict(line.strip("| ").split(" | ") for line in text.splitlines() if line.count(" | ") == 1 and line[2] != " ")
    assert answers["SAM beats its base"].startswith("no, +3.33 ± ")
    assert answers["The published rule is within SAM's interval or above it"] == "yes, +1.00 ± 0.00"
    assert answers["The published rule beats as many random ascents"] == "no, -9.00 ± 0.00"
    assert answers["The published rule beats as many late ascents"] == "not run"
    assert answers["SAM"] == "60.00 ± 10.00 at 1.50"
    assert tables.readme(text, tmp_path) == text


def test_costs() -> None:
    """A column per cost, and nothing for a suite that lacks one. Kills: cells of another cost or rule."""
    rules, costs = ("budget", "periodic", "bernoulli", "late"), ("1.05", "1.1", "1.2", "1.4")
    lines = [
        {"row": f"{rule}-{cost}", "accuracy": 0.1 * i + 0.01 * j, "half": math.nan}
        for i, rule in enumerate(rules)
        for j, cost in enumerate(costs)
    ]
    (text,) = tables._costs({"whole": lines, "half": lines[:-1]})
    assert text.splitlines()[0] == "| whole, passes per step | 1.05 | 1.1 | 1.2 | 1.4 |"
    assert text.splitlines()[3].endswith("no reuse | 10.00 | 11.00 | 12.00 | 13.00 |")
