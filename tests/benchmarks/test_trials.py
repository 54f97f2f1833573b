"""The trials: the pages show what the records hold, and a trial that was cut off goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.trials import bound, cases, pages


def test_the_pages_show_the_records() -> None:
    """Kills: a table edited by hand, or records without `python -m benchmarks.trials` after them."""
    texts = [page.read_text() for page in pages.PAGES]
    assert any("<!-- trial: " in text for text in texts)
    for text in texts:
        assert pages.filled(text) == text


def test_a_trial_goes_on(tmp_path: Path) -> None:
    """Kills: a case that is run twice, or lost."""
    ran: list[int] = []

    def run(number: int) -> dict[str, int]:
        ran.append(number)
        if len(ran) == 2:
            raise KeyboardInterrupt
        return {"square": number**2}

    threads = torch.get_num_threads()
    every = [{"number": n} for n in (1, 2, 3)]
    with pytest.raises(KeyboardInterrupt):
        cases.measure("trial", every, run, tmp_path)
    cases.measure("trial", every, run, tmp_path)
    torch.set_num_threads(threads)
    assert ran == [1, 2, 2, 3] and [line["square"] for line in cases.read("trial", tmp_path)] == [1, 4, 9]
    assert cases.cell([0.5, 0.7], 100) == "60.0 ± 14.1"


def test_a_bound_is_noted_before_it_binds() -> None:
    """||beta^j PSF|| / ||g||. Kills: a ratio of the bounded PSF, or without the decay."""
    rule = bound.Noting(0.5)
    g = [torch.tensor([3.0, 4.0])]
    rule.mix_(g, [torch.tensor([0.0, 10.0])], 2, spacing=10.0, size=torch.tensor(10.0))
    assert float(rule.noted()[0]) == pytest.approx(0.81 * 2)
    assert float(g[0][1]) == pytest.approx(4.0 + 2.5)
