"""As hrnet_adamw.py, with ARSAM by the published rule after the authors' warm-up of 3 epochs of full SAM.

    python tools/train.py configs/pose/hrnet_published.py

Expected: not yet measured (210 epochs of COCO are a job for GPUs).
"""

from dataclasses import replace

from configs.pose import hrnet_adamw as baseline
from configs.pose.hrnet_small_published import sharpness

config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
