"""A float network as an ONNX file: python tools/export.py CONFIG --checkpoint runs/NAME/best.pt"""

from __future__ import annotations

import tempfile
from pathlib import Path

import cli

from tasks import folder
from tasks.classification import deployed as classifiers
from tasks.classification.task import Classification
from tasks.errors import UserError
from tasks.pose import deployed
from tasks.pose.task import PoseTask

TOLERANCE = 1e-3  # of the largest answer


def main() -> None:
    """Parse, export, compare."""
    parser = cli.parser(__doc__ or "")
    parser.add_argument("--checkpoint", type=cli.path, required=True, help="a run's best.pt or last.pt, or one of mmpose")
    parser.add_argument("--out", type=cli.path, metavar="FILE.onnx", help="default: beside the checkpoint, under its name")
    parser.add_argument("--sample", action="store_true", help="the config's sample")
    arguments = parser.parse_intermixed_args()
    path, config = cli.load_config(arguments.words, sample=arguments.sample)
    task = config.task
    if not isinstance(task, (PoseTask, Classification)):
        raise UserError(f"{path}: not a config of the pose task or of image classification")
    out = arguments.out or arguments.checkpoint.with_suffix(".onnx")
    if out.suffix.lower() != ".onnx":
        raise UserError(f"{out}: an ONNX file is named *.onnx; name another --out")
    folder.check_file(out, overwrite=arguments.overwrite, inputs=cli.inputs(path, config, arguments.checkpoint))
    load = deployed.loaded if isinstance(task, PoseTask) else classifiers.load
    task, network = load(task, arguments.checkpoint)  # type: ignore[arg-type]
    if task.quantized:
        raise UserError(f"{path}: has task.weight_bits; tools/quantize.py writes low-bit files")
    with folder.required(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as aside:
            written = Path(aside) / out.name
            apart = deployed.write(task, network, written)
            if apart > TOLERANCE:
                raise UserError(f"{out}: ONNX Runtime's answers differ from torch's by {apart:.1e} of the largest; not written")
            written.rename(out)
    *_, height, width = task.example().shape
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, for {width}x{height} pixels; {apart:.1e} from torch's answers")


if __name__ == "__main__":
    cli.run(main)
