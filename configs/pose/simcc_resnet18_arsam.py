"""As simcc_resnet18_adamw.py, with ARSAM as recommended: 1.2 passes per step.

    python tools/train.py configs/pose/simcc_resnet18_arsam.py task.root=data/lspet

Expected: not yet measured.
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.pose import simcc_resnet18_adamw as baseline

sharpness = partial(ARSAM, rho=0.01)
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
