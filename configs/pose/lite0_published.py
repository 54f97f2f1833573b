"""As lite0_adamw.py, with the published rule after the authors' warm-up of 3 epochs of full SAM.

    python tools/train.py configs/pose/lite0_published.py task.root=data/lspet

Expected: not yet measured; rho is not scanned for this network.
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.pose import lite0_adamw as baseline
from tasks.config import Epochs

sharpness = partial(ARSAM.published, rho=0.01, warmup=Epochs(3))
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
