"""As cifar10_resnet18_sgd.py, with SAM: two passes on every step.

    python tools/train.py configs/quant/cifar10_resnet18_sam.py

Expected: not yet measured (200 epochs are a job for a GPU).
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from arsam.reuse import Nothing
from arsam.sampling import Always
from configs.quant import cifar10_resnet18_sgd as baseline

sharpness = partial(ARSAM, rho=0.05, sampling=partial(Always), reuse=partial(Nothing))
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
