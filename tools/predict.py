"""Find poses, or classes, in pictures, folders and videos: python tools/predict.py CONFIG --checkpoint FILE INPUT..."""

from __future__ import annotations

import argparse
from pathlib import Path

import cli

from tasks import folder, inputs
from tasks.classification import classes
from tasks.classification import deployed as classifiers
from tasks.classification.task import Classification
from tasks.config import Config
from tasks.errors import UserError
from tasks.pose import answers, deployed
from tasks.pose.detector import detector
from tasks.pose.task import PoseTask


def main() -> None:
    """Parse, predict, draw."""
    parser = cli.parser(__doc__ or "", inputs="pictures, folders, patterns or videos")
    parser.add_argument("--checkpoint", type=cli.path, required=True, help="a run's best.pt, one of mmpose, or a model.onnx")
    parser.add_argument("--compare", type=cli.path, metavar="CHECKPOINT", help="another checkpoint, drawn beside the first")
    parser.add_argument(
        "--boxes", type=cli.path, metavar="JSON", help="people's boxes, a COCO results file; default: whole pictures"
    )
    parser.add_argument("--detector", help="find the people with this detector of torchvision, such as fasterrcnn_resnet50_fpn")
    parser.add_argument("--detector-weights", type=cli.path, metavar="FILE", help="its weights, trained on COCO")
    parser.add_argument("--detector-threshold", type=float, default=0.5, metavar="S", help="of boxes; default: %(default)s")
    parser.add_argument("--threshold", type=float, metavar="T", help="joints below are not drawn; default: the task's")
    parser.add_argument("--skip-broken", action="store_true", help="leave out what cannot be read")
    parser.add_argument("--out", type=cli.path, help="folder of the answers; default: runs/NAME-predictions, the first free")
    parser.add_argument("--sample", action="store_true", help="the config's sample")
    arguments = parser.parse_intermixed_args()
    named = cli.paths(arguments.words)
    if len(named) < 2:
        raise UserError("expected a config file and at least one picture: predict.py CONFIG --checkpoint FILE INPUT...")
    path, config = cli.load_config([word for word in arguments.words if word not in named[1:]], sample=arguments.sample)
    task = config.task
    if isinstance(task, Classification):
        classify(config, task, path, named[1:], arguments)
        return
    if not isinstance(task, PoseTask):
        raise UserError(f"{path}: not a config of the pose task")
    if (arguments.detector is None) != (arguments.detector_weights is None):
        raise UserError("--detector and --detector-weights: give both, or neither")
    device = cli.device(arguments.device)
    lenient = arguments.skip_broken or task.skip_broken
    found = answers.readable(inputs.expanded(named[1:]), task.max_pixels, lenient)
    detect = None
    if arguments.detector is not None:
        detect = detector(arguments.detector, arguments.detector_weights, device, arguments.detector_threshold)
    checkpoints = [arguments.checkpoint] + ([arguments.compare] if arguments.compare else [])
    out = cli.run_folder(
        str(Path(path).with_stem(f"{Path(path).stem}-predictions")),
        False,
        arguments.out,
        resume=False,
        holds="keypoints.json",
        overwrite=arguments.overwrite,
        inputs=cli.inputs(path, config, *found, *checkpoints, arguments.boxes, arguments.detector_weights),
    )
    finder = answers.Finder(found, arguments.boxes, detect)
    networks = []
    for file in checkpoints:
        task, network = deployed.loaded(task, file)
        networks.append(network.to(device).eval())
    targets = dict(zip(found, inputs.targets(found, out), strict=True))
    threshold = task.score_threshold if arguments.threshold is None else arguments.threshold
    with folder.required(out), folder.held(out):
        folder.mark(out, "predict", {"config": path, "checkpoints": [str(file) for file in checkpoints]})
        drawing = answers.Drawing(out, task, [str(file) for file in checkpoints], threshold, device)
        for video in filter(inputs.is_video, found):
            answers.of_video(drawing, networks, finder, video, targets[video])
        still = {file: target for file, target in targets.items() if not inputs.is_video(file)}
        answers.of_pictures(drawing, networks, finder, still, lenient)


def classify(config: Config, task: Classification, path: str, words: list[str], arguments: argparse.Namespace) -> None:
    """The classes of pictures: on the screen, and with their scores in classes.json."""
    files = [file for file in inputs.expanded(words) if not inputs.is_video(file)]
    if not files:
        raise UserError(f"{', '.join(words)}: videos, which have no class; name pictures")
    out = cli.run_folder(
        str(Path(path).with_stem(f"{Path(path).stem}-predictions")),
        False,
        arguments.out,
        resume=False,
        holds="classes.json",
        overwrite=arguments.overwrite,
        inputs=cli.inputs(path, config, *files, arguments.checkpoint),
    )
    task, model = classifiers.load(task, arguments.checkpoint)
    with folder.required(out), folder.held(out):
        folder.mark(out, "predict", {"config": path, "checkpoints": [str(arguments.checkpoint)]})
        classes.write(task, model, files, out)


if __name__ == "__main__":
    cli.run(main)
