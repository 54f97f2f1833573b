"""EfficientNet-Lite0 in 4 bits on CIFAR-10 at 64 pixels, fine-tuned in float from ImageNet first, with SGD: the baseline.

    python tools/quantize.py configs/quant/lite0_cifar10_sgd.py

Float: ImageNet's weights with a new classifier, trained with labels. Then calibrated, and trained in 4 bits towards the float
network's answers. task.limit=5000 takes a tenth of the pictures. Expected: not yet measured.
"""

from dataclasses import replace
from functools import partial

from torch.optim import SGD

from configs.quant import lite0_w4a4_sgd as photographs
from tasks.config import Config
from tasks.schedule import cosine

task = replace(photographs.task, root="data/cifar10", weights=None, classes=10, side=64)
start = replace(task, weights="efficientnet_lite0", distill=0.0)
config = replace(
    photographs.config,
    task=task,
    optimizer=partial(SGD, lr=0.005, momentum=0.9),
    epochs=5,
    batch_size=64,
    eval_every=1,
    pretraining=Config(
        start,
        partial(SGD, lr=0.02, momentum=0.9, weight_decay=1e-4),
        schedule=partial(cosine, warmup=100),
        epochs=3,
        batch_size=64,
    ),
)
sample = photographs.sample
