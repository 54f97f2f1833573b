"""SimCC-ResNet18 at 128x96 with AdamW: two classifications per joint, for two CPU cores, the baseline.

Without ResNet's last stage: of a crop this small, it would leave 4x3 cells.

    python tools/train.py configs/pose/simcc_resnet18_adamw.py task.root=data/lspet

Expected: AP 0.033, AP50 0.130 on lspet (one seed, bf16, no spread known; 16 minutes on a shared core of an EPYC).
"""

from dataclasses import replace
from functools import partial

from configs.pose import hrnet_small_adamw as small
from tasks.pose.codec import SimCC
from tasks.pose.model import SimCCNet, resnet
from tasks.pose.task import SAMPLE
from tasks.schedule import cosine

task = replace(
    small.task,
    codec=SimCC((96, 128), split_ratio=2.0, sigma=3.0),
    network=partial(SimCCNet, backbone=partial(resnet, "resnet18", stages=3), deconvs=(128,)),
)
schedule = partial(cosine, warmup=100)
config = replace(small.config, task=task, schedule=schedule, eval_every=2)
sample = replace(small.sample, task=replace(task, root=SAMPLE), schedule=schedule)
