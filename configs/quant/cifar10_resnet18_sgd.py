"""ResNet-18 in float on CIFAR-10 with SGD, the baseline of the paper's own experiment: 200 epochs, cutout, label smoothing.

    python tools/train.py configs/quant/cifar10_resnet18_sgd.py

CIFAR-100: task.root=data/cifar100 task.classes=100. Expected: not yet measured (200 epochs are a job for a GPU).
"""

from dataclasses import replace
from functools import partial

from torch.optim import SGD

from tasks.classification.data import DIGITS
from tasks.classification.task import Classification
from tasks.config import Config
from tasks.schedule import cosine

task = Classification(root="data/cifar10", model="resnet18", stem="small", cutout=16, label_smoothing=0.1)
config = Config(
    task=task,
    optimizer=partial(SGD, lr=0.05, momentum=0.9, weight_decay=1e-3),
    schedule=cosine,
    epochs=200,
    batch_size=128,
    num_workers=4,
)
sample = replace(
    config, task=replace(task, root=DIGITS, model="resnet10t", stem="model", cutout=8), epochs=8, batch_size=32, num_workers=1
)
