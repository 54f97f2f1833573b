"""Float model -> calibrated -> quantization-aware training -> ONNX -> ONNX Runtime: python tools/quantize.py [CONFIG]

With epochs=0: calibration and the file alone, without training.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import cli

from tasks import cache, distributed, folder, log
from tasks.errors import UserError
from tasks.quant import report, stages
from tasks.quant.run import KEPT, Run

DEFAULT = Path(os.path.relpath(Path(__file__).parent.parent / "configs/quant/resnet18_w4a4_arsam.py"))


def main() -> None:
    """Parse, run the stages, print the report."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--sample", action="store_true", help="the config's sample: small, on data that needs no download")
    parser.add_argument("--checkpoint", type=cli.path, help="float model to start from: of ours, or of another trainer")
    parser.add_argument("--out", type=cli.path, help="folder of the report; default: runs/NAME, the first that is free")
    parser.add_argument("--resume", action="store_true", help="go on: what is done in the folder is kept")
    parser.add_argument("--seed", type=int, help="the same as seed=N")
    arguments = parser.parse_intermixed_args()
    if distributed.world() > 1:
        raise UserError(
            "tools/quantize.py runs in one process: train under torchrun with tools/train.py and task.weights=ptq.pt"
        )
    words = cli.words(arguments)
    sample = arguments.sample
    if not cli.paths(words):
        words, sample = [str(DEFAULT), *words], True
        print(f"no config given: the sample of {DEFAULT.name}", flush=True)
    path, config = cli.load_config(words, sample=sample)
    resume = arguments.resume
    out = cli.run_folder(
        path, sample, arguments.out,
        resume=resume, holds=KEPT, overwrite=arguments.overwrite, inputs=cli.inputs(path, config, arguments.checkpoint),
    )  # fmt: skip
    if resume and not (out / KEPT).is_file():
        folder.check(out, "quantize")  # not another tool's
    device = cli.device(arguments.device)
    print(f"into {out}", flush=True)
    with folder.held(out), cache.beside(out):
        folder.clear(out, "quantize")
        folder.mark(out, "quantize", {"config": path})
        run = Run(
            config,
            out,
            device=device,
            name=path,
            float_checkpoint=arguments.checkpoint,
            resume=resume,
            say=lambda line: print(line, flush=True),
        )
        try:
            result = {**stages.run(run), "machine": log.environment(device)}
        except KeyboardInterrupt:
            print(f"what is done is kept in {out}; go on with:\n  {cli.going_on(out)}", file=sys.stderr)
            raise
        print()
        with folder.required(out):
            print(report.write(out, result))


if __name__ == "__main__":
    cli.run(main)
