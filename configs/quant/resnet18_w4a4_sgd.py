"""ResNet-18 with 4-bit weights and activations (LSQ) on ImageNet-style folders with SGD: the baseline.

    python tools/quantize.py configs/quant/resnet18_w4a4_sgd.py --checkpoint resnet18.pth
    python tools/train.py configs/quant/resnet18_w4a4_sgd.py task.weights=resnet18.pth

Expected: not yet measured (90 epochs of ImageNet are a job for GPUs).
"""

from dataclasses import replace
from functools import partial

from torch.optim import SGD

from tasks.classification.data import DIGITS
from tasks.classification.task import Classification
from tasks.config import Config, Epochs
from tasks.schedule import cosine

task = Classification(root="data/imagenet", model="resnet18", classes=1000, side=224, weight_bits=4, act_bits=4)
sgd = partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-4)
config = Config(
    task=task,
    optimizer=partial(SGD, lr=0.01, momentum=0.9, weight_decay=1e-4),
    schedule=partial(cosine, warmup=Epochs(1)),
    epochs=90,
    batch_size=256,
    num_workers=8,
    pretraining=Config(task, sgd, schedule=partial(cosine, warmup=Epochs(5)), epochs=90, batch_size=256, num_workers=8),
)

digits = replace(task, root=DIGITS, classes=10, side=48)
small = {"batch_size": 32, "num_workers": 1, "eval_every": 2}
sample = replace(
    config,
    task=digits,
    epochs=5,
    pretraining=Config(digits, partial(SGD, lr=0.05, momentum=0.9), schedule=partial(cosine, warmup=20), epochs=6, **small),
    **small,
)
