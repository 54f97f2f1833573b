"""Train and evaluate a config: python tools/train.py configs/pose/hrnet_small_arsam.py --sample"""

from __future__ import annotations

import sys
from pathlib import Path

import cli

from tasks import distributed, engine
from tasks.signals import Stopped


def main() -> None:
    """Parse, train, print."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--sample", action="store_true", help="the config's sample: small, on data that needs no download")
    parser.add_argument("--out", type=cli.path, help="the run's folder; default: runs/NAME, the first that is free")
    parser.add_argument("--resume", action="store_true", help="go on from last.pt in the run's folder")
    parser.add_argument("--seed", type=int, help="the same as seed=N")
    arguments = parser.parse_intermixed_args()
    path, config = cli.load_config(cli.words(arguments), sample=arguments.sample)
    out = cli.run_folder(
        path, arguments.sample, arguments.out,
        resume=arguments.resume, overwrite=arguments.overwrite, inputs=cli.inputs(path, config),
    )  # fmt: skip
    if distributed.rank() == 0:
        print(f"{Path(path).stem}: {config.task.name}, {config.epochs} epochs, into {out}", flush=True)
    try:
        result = engine.train(config, out, device=cli.device(arguments.device), resume=arguments.resume, name=path)
    except Stopped as stop:
        if distributed.rank() == 0 and stop.state:
            print(f"{stop.state}; go on with:\n  {cli.going_on(out)}", file=sys.stderr)
        raise
    if distributed.rank():
        return
    cli.print_table(result["metrics"])
    print(
        f"passes per step {result['passes_per_step']:.3f} ({result['ascents']} ascents in {result['steps']} steps), "
        f"{result['train_seconds']:.0f} s of training, {result['images_per_second']:.0f} images/s"
    )
    print(f"results in {out / 'result.json'}")


if __name__ == "__main__":
    cli.run(main)
