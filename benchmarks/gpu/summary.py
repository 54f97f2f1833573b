"""The table of a folder of runs named ROW-SEED.

PYTHONPATH=. python benchmarks/gpu/summary.py runs/cifar10-resnet18
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

from tasks.tables import interval


def main(folder: Path) -> None:
    """Mean and 95 % interval of each metric over the seeds of a row, with its passes per step and its time."""
    rows: dict[str, list[dict[str, float]]] = {}
    for path in sorted(folder.glob("*/result.json")):
        result = json.loads(path.read_text())
        line = {**result["metrics"], "passes/step": result["passes_per_step"], "train_seconds": result["train_seconds"]}
        rows.setdefault(path.parent.name.rpartition("-")[0], []).append(line)
    if not rows:
        sys.exit(f"{folder}: holds no finished run (ROW-SEED/result.json)")
    names = list(next(iter(rows.values()))[0])
    print(f"| row | seeds | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for row, lines in rows.items():
        spreads = [interval([line[name] for line in lines]) for name in names]
        cells = [f"{mean:.4g}" + ("" if math.isnan(half) else f" ± {half:.2g}") for mean, half in spreads]
        print(f"| {row} | {len(lines)} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
