"""What the runs allow to be said, and the tables that say it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.compare import figures, inference, readme, records, tables, workloads


def test_interval() -> None:
    """Kills: the normal distribution's 1.96."""
    mean, half = inference.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.3027 / math.sqrt(3), rel=1e-4))
    assert math.isnan(inference.interval([1.0])[1])


def test_noise() -> None:
    """Labels that are moved, others by the seed. Kills: labels replaced by themselves, the same ones for every seed."""
    labels = torch.arange(1000) % 10
    one, other = (workloads.noisy(labels, 0.3, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert int((one != labels).sum()) == int((other != labels).sum()) == 300 and one.unique().tolist() == list(range(10))
    assert not torch.equal(one, other)


def test_splits() -> None:
    """Disjoint, and others by the seed. Kills: a training image that is tested on."""
    x = torch.arange(30.0).reshape(30, 1, 1, 1)
    data = workloads.divided(x, torch.arange(30), 10, 5, seed=3, noise=0.0)
    assert sorted(int(y) for _, part in data.values() for y in part) == list(range(30))
    assert [len(data[name][1]) for name in ("train", "val", "test")] == [10, 5, 15]
    assert float(data["train"][0].mean()) == pytest.approx(0, abs=1e-6)
    other = workloads.divided(x, torch.arange(30), 10, 5, seed=4, noise=0.0)
    assert not torch.equal(data["train"][1], other["train"][1])


def test_paired() -> None:
    """By hand: d = 1, 2, 3 has t = 2 sqrt(3), p = 0.0742. Kills: a one-sided p, a margin with the wrong sign."""
    found = inference.paired([0.01, 0.02, 0.03], margin=0.01)
    assert found.different == pytest.approx(0.0742, abs=1e-4)
    assert found.inferior == pytest.approx(0.0175, abs=1e-4), "t = 3 sqrt(3) of mean + margin"
    assert inference.paired([0.0, 0.0]).different == 1.0
    assert inference.paired([0.01, 0.01], 0.01).different == 0.0


def test_holm() -> None:
    """The classical example. Kills: Bonferroni, a p that falls below an earlier one."""
    assert inference.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert inference.holm([0.5, 0.9]) == [1.0, 1.0]


def test_margin() -> None:
    """A quarter of SAM's gain where that is less than a point; none where SAM does not gain. Kills: a margin of any gain."""
    assert inference.margin([0.10, 0.11, 0.12]) == 0.01
    assert inference.margin([0.020, 0.020, 0.020]) == pytest.approx(0.005)
    assert inference.margin([0.02, -0.02, 0.01]) is None


def test_words() -> None:
    """Kills: "no difference found" read as "as good as"; a family that is not corrected."""
    clear = inference.paired([0.1, 0.11, 0.1, 0.11])
    worse = inference.paired([-0.1, -0.11, -0.1, -0.11], 0.01)
    close = inference.paired([0.001, -0.001, 0.0005, -0.0005], 0.01)
    vague = inference.paired([0.1, -0.12, 0.05, -0.04], 0.01)
    assert inference.words([clear, worse, close, vague]) == ["better", "worse", "not worse", "no difference found"]
    edge = inference.paired([0.02, 0.03, 0.05])
    assert edge.different == pytest.approx(0.063, abs=0.01)
    once = inference.paired([0.02, 0.03, 0.04, 0.02])
    assert inference.words([once]) == ["better"]
    assert inference.words([once] * 20)[0] == "no difference found", "one of twenty questions"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Runs of four rows on three seeds, and a search."""
    values = {"base": [0.4, 0.5, 0.45], "sam": [0.7, 0.8, 0.75], "budget-1.2": [0.701, 0.801, 0.751], "gone": [0.1, 0.1, 0.1]}
    common = {"passes_per_step": 1.5, "training_loss": 0.5, "peak_memory_mb": 1.0, "loop": 2, "steps": 10, "ascents": 5}
    lines = [{"kind": "suite", "loop": 2, "metric": "accuracy", "suite": {}}]
    for row, numbers in values.items():
        settings = {"rho": 0.5} if row in ("sam", "budget-1.2") else {}
        for seed, number in enumerate(numbers):
            lines.append({"kind": "run", "row": row, "seed": seed, "accuracy": number, "settings": settings, **common})
    for rho in (0.5, 0.25):
        lines += [
            {"kind": "tune", "row": "sam", "seed": s, "accuracy": rho + s / 10, "settings": {"rho": rho}, **common}
            for s in (0, 1)
        ]
    lines.append({"kind": "run", "row": "base", "seed": 9, "accuracy": 0.0, "settings": {}, **common, "loop": 1})
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_answers(folder: Path) -> None:
    """Paired by seed. Kills: means held against each other, a run of the older loop among them."""
    answers = dict(line.strip("| ").split(" | ") for line in tables.answers([tables.record("toy", folder)]).splitlines()[2:])
    assert answers["SAM against base"] == "better, +30.00 ± 0.00"
    assert answers["ARSAM, `Budget(1.2)` against SAM"].startswith(("better, +0.10", "not worse, +0.10"))
    assert len(answers) == 2, "what was not run is not answered"


def test_tables(folder: Path) -> None:
    """Kills: rows without n, rows that are no longer defined left out, a search of other rows counted."""
    found = tables.record("toy", folder)
    text = tables.table(found)
    assert "| `gone` | `gone` | 3 | 10.00 ± 0.00 |" in text
    assert "| `sam` | SAM | 3 | 75.00 ± 12.42 | +30.00 ± 0.00 | +0.00 ± 0.00 | 1.500 | 1 | 0.5 | rho 0.5 |" in text
    assert "| 1.50 | base | 45.00 ± 12.42 (3) |" in tables.beside([found])
    assert tables.search_cost(found).startswith("The search: 4 runs for 1 rows, 0.3 times the passes")
    assert "| SAM | 0.5 |" in tables.radii([found])
    block = readme.readme("before\n<!-- results: digits -->\nold\n<!-- /results -->\nafter\n", records.FOLDER)
    assert block.startswith("before\n<!-- results: digits -->\n| ") and block.endswith("|\n<!-- /results -->\nafter\n")
    assert "old" not in block and readme.readme(block, records.FOLDER) == block


def test_figures(folder: Path) -> None:
    """Kills: a curve in the order of the search, one seed drawn for all."""
    found = tables.record("toy", folder)
    assert figures.searched(found, "sam") == [(0.25, pytest.approx(0.3), 0.5), (0.5, pytest.approx(0.55), 0.5)]
    assert figures.searched(found, "asam") == []
    assert {path.name for path in figures.draw("toy", folder)} == {"toy-passes.png", "toy-rho.png"}
    assert all(path.stat().st_size > 1000 for path in folder.glob("*.png"))


def test_a_torn_line_is_left_out(folder: Path) -> None:
    """And removed by the next study. Kills: a file that a killed study makes unreadable."""
    path = folder / "toy.jsonl"
    whole = len(records.read(path))
    with open(path, "a") as file:
        file.write('{"kind": "ru')
    assert len(records.read(path)) == whole
    with records.held(path) as book:
        book.write({"kind": "run", "loop": 2})
    assert len(records.read(path)) == whole + 1


def test_a_study_that_is_under_way(folder: Path) -> None:
    """Stands beside the finished one of the older loop. Kills: a table that loses rows when a new loop begins."""
    path = folder / "toy.jsonl"
    lines = [{**line, "loop": 3} for line in records.read(path) if line.get("row") == "base" and line["loop"] == 2]
    with open(path, "a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    found = tables.record("toy", folder)
    newer = tables.under_way(found, folder)
    assert newer is not None
    assert (found.loop, newer.loop, newer.title) == (2, 3, "toy, present loop")
    assert set(newer.runs) == {"base"} and "sam" in found.runs
    assert "toy-loop3-passes.png" in {path.name for path in figures.draw("toy", folder)}
    with open(path, "a") as file:
        for row in ("sam", "budget-1.2"):
            file.write(json.dumps({**lines[0], "row": row}) + "\n")
    assert tables.record("toy", folder).loop == 3 and tables.under_way(tables.record("toy", folder), folder) is None
