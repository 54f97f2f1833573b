"""As lite0_cifar10_sgd.py, with ARSAM as recommended: 1.2 passes per step.

    python tools/quantize.py configs/quant/lite0_cifar10_arsam.py

Expected: not yet measured; rho is not scanned for this network.
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.quant import lite0_cifar10_sgd as baseline

sharpness = partial(ARSAM, rho=0.05)
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
