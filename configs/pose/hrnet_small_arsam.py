"""As hrnet_small_adamw.py, with ARSAM as recommended: 1.2 passes per step.

    python tools/train.py configs/pose/hrnet_small_arsam.py task.root=data/lspet

Expected: not yet measured.
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.pose import hrnet_small_adamw as baseline

sharpness = partial(ARSAM, rho=0.001)
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
