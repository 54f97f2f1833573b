"""As resnet18_w4a4_sgd.py, with ARSAM as recommended: 1.2 passes per step.

    python tools/quantize.py configs/quant/resnet18_w4a4_arsam.py --checkpoint resnet18.pth

Expected: not yet measured (90 epochs of ImageNet are a job for GPUs).
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.quant import resnet18_w4a4_sgd as baseline

sharpness = partial(ARSAM, rho=0.05)
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
