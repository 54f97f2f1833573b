"""SimCC-ResNet50 at 256x192 on COCO with AdamW: the baseline, on mmpose's schedule.

    python tools/train.py configs/pose/simcc_resnet50_adamw.py task.weights=resnet50.pth

Expected: not yet measured (210 epochs of COCO are a job for GPUs).
The learning rate belongs to 512 people per step, and to a backbone that ImageNet has trained.
"""

from dataclasses import replace
from functools import partial

from torch.optim import AdamW

from configs.pose import hrnet_adamw as heatmap
from configs.pose.simcc_resnet18_adamw import sample as small_sample
from tasks.pose.codec import SimCC
from tasks.pose.model import SimCCNet, resnet
from tasks.pose.task import PoseTask

config = replace(
    heatmap.config,
    task=PoseTask(
        codec=SimCC((192, 256), split_ratio=2.0, sigma=6.0),
        network=partial(SimCCNet, backbone=partial(resnet, "resnet50"), deconvs=(256, 256, 256)),
    ),
    optimizer=partial(AdamW, lr=1e-3, weight_decay=1e-4),
)
# On two cores the wide network at full resolution would take days; its sample is the small one.
sample = small_sample
