"""As lite0_cifar10_sgd.py, with ARSAM by the published rule after a warm-up of one epoch of full SAM.

    python tools/quantize.py configs/quant/lite0_cifar10_published.py

Expected: not yet measured; rho is not scanned for this network.
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.quant import lite0_cifar10_sgd as baseline
from tasks.config import Epochs

sharpness = partial(ARSAM.published, rho=0.05, warmup=Epochs(1))
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
