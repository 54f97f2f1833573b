"""As simcc_resnet18_adamw.py, with ARSAM by the published rule after the authors' warm-up of 3 epochs of full SAM.

    python tools/train.py configs/pose/simcc_resnet18_published.py task.root=data/lspet

Expected: AP 0.029, AP50 0.125 on lspet at 1.20 passes per step (one seed, bf16, no spread known).
On the sample: AP 0.540 at 1.31 passes per step (one seed; 725 s on a third of a core of an EPYC).
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.pose import simcc_resnet18_adamw as baseline
from tasks.config import Epochs

sharpness = partial(ARSAM.published, rho=0.01, warmup=Epochs(3))
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
