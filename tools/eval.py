"""Evaluate a checkpoint: python tools/eval.py CONFIG --checkpoint runs/NAME/best.pt"""

from __future__ import annotations

import json
from contextlib import ExitStack
from dataclasses import replace

import cli
import torch

from tasks import checkpoint, distributed, engine, folder, state
from tasks.classification import deployed as classifiers
from tasks.classification.task import Classification
from tasks.pose import deployed
from tasks.pose.task import PoseTask
from tasks.quant.runtime import InRuntime


def main() -> None:
    """Parse, evaluate, print."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument(
        "--checkpoint",
        type=cli.path,
        required=True,
        help="a run's best.pt, a state_dict, or a model.onnx",
    )
    parser.add_argument("--sample", action="store_true", help="the config's sample")
    parser.add_argument(
        "--out", type=cli.path, help="folder for pictures and the poses as COCO results; default: none are written"
    )
    arguments = parser.parse_intermixed_args()
    path, config = cli.load_config(arguments.words, sample=arguments.sample)
    if arguments.out is not None:
        cli.run_folder(
            path, arguments.sample, arguments.out,
            resume=False, overwrite=arguments.overwrite, inputs=cli.inputs(path, config, arguments.checkpoint),
        )  # fmt: skip
    device = cli.device(arguments.device)
    task = config.task
    if isinstance(task, (PoseTask, Classification)):
        load = deployed.loaded if isinstance(task, PoseTask) else classifiers.load
        task, model = load(task, arguments.checkpoint)  # type: ignore[arg-type]
        config = replace(config, task=task)
        device = torch.device("cpu") if isinstance(model, InRuntime) else device
    else:
        model = state.build_model(config.task)
        checkpoint.load_weights(model, arguments.checkpoint)
    model.to(device).to(memory_format=state.memory_format(config))
    with ExitStack() as until_the_end:
        if arguments.out is not None and distributed.rank() == 0:
            until_the_end.enter_context(folder.held(arguments.out))
            folder.mark(arguments.out, "eval", {"config": path, "checkpoint": str(arguments.checkpoint)})
        metrics = engine.evaluate(config, model, device, arguments.out)
    if distributed.rank() == 0:
        cli.print_table(metrics)
        print(json.dumps(metrics))


if __name__ == "__main__":
    cli.run(main)
