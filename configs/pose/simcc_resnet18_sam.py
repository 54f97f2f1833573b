"""As simcc_resnet18_adamw.py, with SAM: two passes on every step.

    python tools/train.py configs/pose/simcc_resnet18_sam.py task.root=data/lspet

Expected: AP 0.028, AP50 0.119 on lspet (one seed, bf16, no spread known).
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from arsam.reuse import Nothing
from arsam.sampling import Always
from configs.pose import simcc_resnet18_adamw as baseline

sharpness = partial(ARSAM, rho=0.01, sampling=partial(Always), reuse=partial(Nothing))
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
