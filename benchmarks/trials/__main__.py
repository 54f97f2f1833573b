"""Write the trials' tables into the pages that show them: python -m benchmarks.trials."""

from __future__ import annotations

from benchmarks.trials.pages import PAGES, filled

for page in PAGES:
    page.write_text(filled(page.read_text()))
