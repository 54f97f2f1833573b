"""Benchmarks: python tools/bench.py overhead | quant | step | loop | pose | compare SUITE | readme"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cli
import torch

from benchmarks.compare import figures, front, readme, records, study, tables
from benchmarks.compare.suites import SUITES
from benchmarks.speed import low_bit
from benchmarks.speed.loop_cost import loop_cost
from benchmarks.speed.overhead import overhead
from benchmarks.speed.pose_scale import PICTURES, pose
from benchmarks.speed.step_cost import step_cost
from tasks import distributed, folder, log
from tasks.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def speed(arguments: argparse.Namespace) -> None:
    """Measure, and write the record where one is wanted."""
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be >= 1, got {arguments.rounds}")
    _recorded(arguments, lambda: arguments.measure(cli.device(arguments.device), arguments.rounds))


def scale(arguments: argparse.Namespace) -> None:
    """Pose evaluation without its network on as many boxes as val2017 has detected people, and train2017's annotations."""
    if arguments.pictures < 4:
        raise UserError(f"--pictures must be >= 4, got {arguments.pictures}")
    _recorded(arguments, lambda: pose(arguments.root, arguments.pictures))


def _recorded(arguments: argparse.Namespace, measure: Callable[[], dict[str, Any]]) -> None:
    if arguments.out is not None:
        folder.check_file(arguments.out, overwrite=arguments.overwrite)
    record = measure()
    if arguments.out is not None:
        with folder.required(arguments.out):
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            log.write_json(arguments.out, record)


def files(arguments: argparse.Namespace) -> None:
    """W8A8 files beside ONNX Runtime's quantize_static, on photographs."""
    if arguments.rounds < 1:
        raise UserError(f"--rounds must be >= 1, got {arguments.rounds}")
    _recorded(arguments, lambda: low_bit.quant(arguments.networks, arguments.rounds, arguments.files))


def compare(arguments: argparse.Namespace) -> None:
    """Optimizers x seeds on one small workload; a finished run is kept, so that a call goes on where the last one stopped."""
    torch.set_num_threads(1)
    suite = SUITES[arguments.suite]
    seeds = suite.seeds if arguments.seeds is None else arguments.seeds
    if seeds < 1:
        raise UserError(f"--seeds must be >= 1, got {seeds}")
    study.chosen(suite, arguments.only)  # says now that there is no such row
    if arguments.out.resolve() != records.FOLDER.resolve():  # which is the repository's own
        distributed.first(folder.check(arguments.out, "bench", overwrite=arguments.overwrite))
        if distributed.rank() == 0:
            folder.mark(arguments.out, "bench", {"suite": suite.name})
    study.compare(suite, arguments.out, seeds, cli.device(arguments.device), arguments.only)
    if distributed.rank() == 0:
        figures.draw(suite.name, arguments.out)
        print(tables.table(tables.record(suite.name, arguments.out)))


def write_readme(arguments: argparse.Namespace) -> None:
    """Put the recorded results into README.md, docs/results.md, docs/rho.md and docs/quant.md, and draw their figures."""
    for path in sorted(records.FOLDER.glob("*.jsonl")):
        figures.draw(path.stem, records.FOLDER)
    front.draw(list(front.SUITES), records.FOLDER)
    page = ROOT / "README.md"
    page.write_text(readme.readme(page.read_text(), records.FOLDER))
    (ROOT / "docs/results.md").write_text(readme.results(records.FOLDER))
    page = ROOT / "docs/rho.md"
    page.write_text(readme.rho(page.read_text(), records.FOLDER))
    page = ROOT / "docs/quant.md"
    page.write_text(low_bit.page(page.read_text(), json.loads((ROOT / "benchmarks/quant/files.json").read_text())))


def main() -> None:
    """Parse and run."""
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--version", action="version", version=cli.VERSION)
    commands = parser.add_subparsers(required=True)
    for name, measure in (("overhead", overhead), ("step", step_cost), ("loop", loop_cost)):
        command = commands.add_parser(name, help=measure.__doc__)
        command.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
        command.add_argument("--device", default="cpu", help="default: %(default)s")
        command.add_argument("--out", type=cli.path, help="also write the table and the environment as JSON")
        command.add_argument("--overwrite", action="store_true", help="write --out even if there is such a file")
        command.set_defaults(function=speed, measure=measure)
    command = commands.add_parser("pose", help=scale.__doc__)
    command.add_argument("--root", default="data/coco", help="in COCO's layout, to be repeated; default: %(default)s")
    command.add_argument("--pictures", type=int, default=PICTURES, help="default: %(default)s")
    command.add_argument("--out", type=cli.path, help="also write the table and the environment as JSON")
    command.add_argument("--overwrite", action="store_true", help="write --out even if there is such a file")
    command.set_defaults(function=scale)
    command = commands.add_parser("quant", help=files.__doc__)
    command.add_argument("--networks", nargs="+", choices=low_bit.NETWORKS, default=low_bit.NETWORKS, metavar="NAME")
    command.add_argument("--rounds", type=int, default=20, help="default: %(default)s")
    command.add_argument(
        "--files", type=cli.path, help="folder that the files are kept in, or are taken from if they are there"
    )
    command.add_argument("--out", type=cli.path, help="also write the table and the environment as JSON")
    command.add_argument("--overwrite", action="store_true", help="write --out even if there is such a file")
    command.set_defaults(function=files)
    command = commands.add_parser("compare", help=compare.__doc__)
    command.add_argument("suite", choices=SUITES, metavar="SUITE", help=" or ".join(SUITES))
    command.add_argument("--seeds", type=int, help="default: the suite's")
    command.add_argument("--only", nargs="+", metavar="ROW", help="these rows, and those that they are compared with")
    command.add_argument("--device", default="cpu", help="default: %(default)s")
    command.add_argument("--out", type=cli.path, default=records.FOLDER, help="folder; default: benchmarks/records")
    command.add_argument("--overwrite", action="store_true", help="go on in --out whatever else it holds")
    command.set_defaults(function=compare)
    commands.add_parser("readme", help=write_readme.__doc__).set_defaults(function=write_readme)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    cli.run(main)
