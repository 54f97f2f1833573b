"""As lite0_adamw.py, with SAM: two passes on every step.

    python tools/train.py configs/pose/lite0_sam.py task.root=data/lspet

Expected: not yet measured; rho is not scanned for this network.
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from arsam.reuse import Nothing
from arsam.sampling import Always
from configs.pose import lite0_adamw as baseline

sharpness = partial(ARSAM, rho=0.01, sampling=partial(Always), reuse=partial(Nothing))
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
