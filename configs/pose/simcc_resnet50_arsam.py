"""As simcc_resnet50_adamw.py, with ARSAM as recommended: 1.2 passes per step.

    python tools/train.py configs/pose/simcc_resnet50_arsam.py task.weights=resnet50.pth

Expected: not yet measured (210 epochs of COCO are a job for GPUs).
"""

from dataclasses import replace

from configs.pose import simcc_resnet50_adamw as baseline
from configs.pose.simcc_resnet18_arsam import sharpness

config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
