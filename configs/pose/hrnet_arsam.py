"""As hrnet_adamw.py, with ARSAM as recommended: 1.2 passes per step.

    python tools/train.py configs/pose/hrnet_arsam.py

Expected: not yet measured (210 epochs of COCO are a job for GPUs).
"""

from dataclasses import replace

from configs.pose import hrnet_adamw as baseline
from configs.pose.hrnet_small_arsam import sharpness

config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
