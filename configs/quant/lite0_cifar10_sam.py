"""As lite0_cifar10_sgd.py, with SAM: two passes on every step.

    python tools/quantize.py configs/quant/lite0_cifar10_sam.py

Expected: not yet measured; rho is not scanned for this network.
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from arsam.reuse import Nothing
from arsam.sampling import Always
from configs.quant import lite0_cifar10_sgd as baseline

sharpness = partial(ARSAM, rho=0.05, sampling=partial(Always), reuse=partial(Nothing))
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
