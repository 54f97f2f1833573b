"""As hrnet_small_adamw.py, with ARSAM by the published rule after the authors' warm-up of 3 epochs of full SAM.

    python tools/train.py configs/pose/hrnet_small_published.py task.root=data/lspet

Expected: AP 0.060, AP50 0.256 on lspet at 1.20 passes per step (one seed, bf16, no spread known).
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.pose import hrnet_small_adamw as baseline
from tasks.config import Epochs

sharpness = partial(ARSAM.published, rho=0.001, warmup=Epochs(3))
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
