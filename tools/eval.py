"""Evaluate a checkpoint: python tools/eval.py CONFIG --checkpoint runs/NAME/best.pt"""

from __future__ import annotations

import json
from pathlib import Path

import cli

from tasks import checkpoint, distributed, engine, folder, state


def main() -> None:
    """Parse, evaluate, print."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a run's best.pt or last.pt, or a state_dict")
    parser.add_argument("--sample", action="store_true", help="the config's sample")
    parser.add_argument("--out", type=Path, help="folder for pictures; default: none are written")
    arguments = parser.parse_intermixed_args()
    _, config = cli.load_config(arguments.words, sample=arguments.sample)
    device = cli.device(arguments.device)
    model = config.task.build()
    checkpoint.load_weights(model, arguments.checkpoint)
    model.to(device).to(memory_format=state.memory_format(config))
    if arguments.out is not None:
        with folder.required(arguments.out):
            arguments.out.mkdir(parents=True, exist_ok=True)
    metrics = engine.evaluate(config, model, device, arguments.out)
    if distributed.rank() == 0:
        cli.print_table(metrics)
        print(json.dumps(metrics))


if __name__ == "__main__":
    cli.run(main)
