"""As cifar10_resnet18_sgd.py, with ARSAM as recommended: 1.2 passes per step.

    python tools/train.py configs/quant/cifar10_resnet18_arsam.py

Expected: not yet measured (200 epochs are a job for a GPU).
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.quant import cifar10_resnet18_sgd as baseline

sharpness = partial(ARSAM, rho=0.05)
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
