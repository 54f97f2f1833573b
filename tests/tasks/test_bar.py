"""The line of a terminal, at its widths."""

from __future__ import annotations

import pytest

from tasks import bar

PARTS = [
    ("loss 0.00891", "loss 0.00891"),
    ("1.20 passes/step", "1.20 passes/step"),
    ("1234 images/s", "1234 img/s"),
    ("140 ascents", "140 ascents"),
]


@pytest.mark.parametrize(("width", "shown"), [(140, 4), (60, 4), (59, 3), (48, 3), (47, 2), (20, 1), (5, 0)])
def test_what_matters_least_goes_first(width: int, shown: int) -> None:
    """Whole words, whatever the width. Kills: a number that is cut off, and then reads as another."""
    text = bar.fit(PARTS, "1:02:03", width)
    assert len(text) <= max(width, len("1:02:03"))
    assert [short in text or long in text for long, short in PARTS] == [True] * shown + [False] * (4 - shown)
    assert text.endswith(("1:02:03", "1:02:03 left"))
    if width == 60:  # of 80, less "epoch 3/210 45%|..| "
        assert text == "loss 0.00891 1.20 passes/step 1234 img/s 140 ascents 1:02:03"
