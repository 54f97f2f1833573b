"""SimCC-ResNet18 at 128x96 with AdamW: two classifications per joint, for two CPU cores, the baseline.

Without ResNet's last stage: of a crop this small, it would leave 4x3 cells.

    python tools/train.py configs/pose/simcc_resnet18_adamw.py task.root=data/lspet

Expected: AP 0.033, AP50 0.130 on lspet (one seed, bf16, no spread known; 16 minutes on a shared core of an EPYC).
"""

from dataclasses import replace
from functools import partial

from torch.optim import AdamW

from tasks.config import Config
from tasks.pose.codec import SimCC
from tasks.pose.model import SimCCNet, resnet
from tasks.pose.task import SAMPLE, PoseTask
from tasks.pose.transforms import Augmentation
from tasks.schedule import cosine

task = PoseTask(
    codec=SimCC((96, 128), split_ratio=2.0, sigma=3.0),
    network=partial(SimCCNet, backbone=partial(resnet, "resnet18", stages=3), deconvs=(128,)),
    augmentation=Augmentation(half_body=0.0, shift=0.1, scale=(0.75, 1.3), rotation=40.0),
)
config = Config(
    task=task,
    optimizer=partial(AdamW, lr=3e-3, weight_decay=1e-2),
    schedule=partial(cosine, warmup=100),
    epochs=16,
    batch_size=32,
    num_workers=1,
    eval_every=2,
)

sample = replace(
    config,
    task=replace(task, root=SAMPLE),
    epochs=10,
    batch_size=16,
    eval_every=5,
)
