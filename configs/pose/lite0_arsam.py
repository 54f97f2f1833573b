"""As lite0_adamw.py, with ARSAM as recommended: 1.2 passes per step, the reuse fading with the spacing.

    python tools/train.py configs/pose/lite0_arsam.py task.root=data/lspet

Expected: not yet measured; rho is not scanned for this network.
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.pose import lite0_adamw as baseline

sharpness = partial(ARSAM, rho=0.01)
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
