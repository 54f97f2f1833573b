"""Optimizers compared: the same start for all rows, runs that are kept, settings chosen on held-out images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare import records, study, tables
from benchmarks.compare.schema import Settings
from tasks.errors import UserError
from tests.benchmarks.compare.toy import TOY

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy suite, run."""
    out = tmp_path_factory.mktemp("toy")
    study.compare(TOY, out, 2, CPU)
    return out


def lines(folder: Path, kind: str = "run") -> list[dict[str, Any]]:
    return [line for line in records.read(folder / "toy.jsonl") if line["kind"] == kind]


def run(folder: Path, row: str, seed: int) -> dict[str, Any]:
    (found,) = (line for line in lines(folder) if (line["row"], line["seed"]) == (row, seed))
    return found


def test_a_second_call_runs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a third seed runs that seed alone. Kills: finished runs, or the search, run again."""
    before = (folder / "toy.jsonl").read_text()
    seeds: list[int] = []
    original = study.run

    def noted(*args: Any, **kwargs: Any) -> Any:
        seeds.append(args[3])
        return original(*args, **kwargs)

    monkeypatch.setattr(study, "run", noted)
    study.compare(TOY, folder, 2, CPU)
    assert seeds == []
    study.compare(TOY, folder, 3, CPU, only=["sam"])
    assert seeds == [2, 2], "base and sam"
    assert (folder / "toy.jsonl").read_text().startswith(before)


def test_rows_share_their_start_and_their_batches(folder: Path) -> None:
    """Without ascents ARSAM is the base to the last bit. Kills: weights or batches drawn after something of the row."""
    for seed in (0, 1):
        plain, other = run(folder, "base", seed), run(folder, "no-ascent", seed)
        assert (plain["accuracy"], plain["training_loss"]) == (other["accuracy"], other["training_loss"])
        assert other["ascents"] == 0
        assert plain["training_loss"] != run(folder, "sam", seed)["training_loss"]
    assert run(folder, "base", 0)["training_loss"] != run(folder, "base", 1)["training_loss"]


def test_rivals_get_the_ascents_of_the_row_they_are_held_against(folder: Path) -> None:
    """Kills: a share that is not taken from the run of the same seed; passes counted wrong."""
    for seed in (0, 1):
        published, periodic, budget = (run(folder, n, seed) for n in ("published", "periodic-published", "budget-1.2"))
        assert published["ascents"] == periodic["ascents"] > 0
        assert budget["ascents"] == 2 and budget["passes_per_step"] == 1.2


def test_settings_are_chosen_on_held_out_images(folder: Path) -> None:
    """Kills: the worst candidate, a search on the test images, a setting that the run does not use, an edge left alone."""
    tried = {line["settings"]["rho"]: line["accuracy"] for line in lines(folder, "tune") if line["row"] == "sam"}
    best = max(tried, key=lambda rho: (tried[rho], -rho))
    assert run(folder, "sam", 0)["settings"] == {"rho": best}
    assert sum(rho < best for rho in tried) > 0 or len(tried) == 10
    assert run(folder, "control-random", 0)["settings"] == run(folder, "budget-1.2", 0)["settings"]
    assert run(folder, "base", 0)["settings"] == {}
    tuned = run(folder, "base-tuned", 0)
    assert list(tuned["settings"]) == ["lr", "weight_decay", "epochs"] and tuned["settings"]["epochs"] <= 1
    assert 1 <= tuned["epoch"] <= 2
    assert {line["seed"] for line in lines(folder, "tune")} == {1000}
    assert all(line["accuracy"] * 20 == pytest.approx(round(line["accuracy"] * 20)) for line in lines(folder, "tune"))


def test_other_settings_are_refused(folder: Path, tmp_path: Path) -> None:
    """Runs of two kinds in one table would be compared. Errors name the file and the way out."""
    found = records.read(folder / "toy.jsonl")

    def changed(kind: str, row: str | None, **fields: Any) -> None:
        own = ({**line, **fields} if (line["kind"], line.get("row")) == (kind, row) else line for line in found)
        (tmp_path / "toy.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))

    changed("suite", None, suite={**found[0]["suite"], "epochs": 9})
    with pytest.raises(UserError, match=r"epochs was 9, is 2; name another --out"):
        study.compare(TOY, tmp_path, 2, CPU)
    changed("run", "sam", settings={"rho": 7.0})
    with pytest.raises(UserError, match=r"sam, seed 0 has \{'rho': 7.0\}, those chosen are .*remove the line"):
        study.compare(TOY, tmp_path, 2, CPU)
    with pytest.raises(UserError, match="no row of the suite toy"):
        study.compare(TOY, tmp_path, 2, CPU, only=["adam"])


def test_ageing(folder: Path) -> None:
    """A cosine, of windows that lie within the run. Kills: a PSF held against itself."""
    (aged,) = lines(folder, "ageing")
    assert len(aged["cosine"]) == len(aged["ages"]) >= 1
    assert len(aged["cosine_by_start"]) == len(aged["starts"])
    assert all(-1 <= c < 0.999 for values in aged["cosine_by_start"] for c in values)


def test_memory_grows_with_what_is_kept(folder: Path) -> None:
    """Kills: a peak that does not see the backward pass or the kept PSF."""
    base, sam, budget = (run(folder, name, 0)["peak_memory_mb"] for name in ("base", "periodic-1.2", "budget-1.2"))
    parameters = 4e-6 * sum(p.numel() for p in TOY.network(0).parameters())
    assert base > 3 * parameters, "weights, momentum and gradients"
    assert base < sam < budget


@pytest.mark.parametrize("name", [row.name for row in TOY.rows])
def test_the_table_has_a_line_for_each_row(folder: Path, name: str) -> None:
    """With the mean of its runs. Kills: a mean over other runs."""
    text = tables.table(tables.record("toy", folder))
    values = [line["accuracy"] for line in lines(folder) if line["row"] == name]
    assert f"| `{name}` |" in text
    (line,) = (line for line in text.splitlines() if f"| `{name}` |" in line)
    assert f"| {len(values)} | {100 * sum(values) / len(values):.2f} ± " in line


def test_a_search_reads_each_candidate_on_every_tuning_seed(tmp_path: Path) -> None:
    """The mean over the seeds decides. Kills: the first seed alone."""
    asked: list[tuple[float, int]] = []

    def found(row: Any, seed: int, settings: Settings, ascents: float, split: str) -> Any:
        assert split == "val"
        asked.append((settings["rho"], seed))
        score = (0.9 if settings["rho"] == 0.2 else 0.1) if seed == 1000 else (0.0 if settings["rho"] == 0.2 else 0.9)
        return {"accuracy": score, "passes_per_step": 2.0}

    suite = replace(TOY, rhos=(0.1, 0.2), tune_seeds=2)
    with records.held(tmp_path / "toy.jsonl") as book:
        settings = study._tuned(suite, suite.row("sam"), book, found)
    assert settings["rho"] != 0.2
    assert {seed for _, seed in asked} == {1000, 1001} and len(asked) == len(set(asked))


@pytest.mark.parametrize("content", [b"text\n", b"5\n", b"{}\n", b"\xff\xfe\n", b"[" * 100_000 + b"\n"])
def test_records_of_anybodys(content: bytes, tmp_path: Path) -> None:
    """Kills: a traceback out of a file of somebody else's; but a line that was cut off is none."""
    (tmp_path / "quick.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=r"quick\.jsonl: not the records of a study"):
        records.read(tmp_path / "quick.jsonl")
    (tmp_path / "quick.jsonl").write_bytes(content[:-1])
    assert records.read(tmp_path / "quick.jsonl") == []
