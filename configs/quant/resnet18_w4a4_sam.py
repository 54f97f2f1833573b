"""As resnet18_w4a4_sgd.py, with SAM: two passes on every step.

    python tools/quantize.py configs/quant/resnet18_w4a4_sam.py --checkpoint resnet18.pth

Expected: not yet measured (90 epochs of ImageNet are a job for GPUs).
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from arsam.reuse import Nothing
from arsam.sampling import Always
from configs.quant import resnet18_w4a4_sgd as baseline

sharpness = partial(ARSAM, rho=0.05, sampling=partial(Always), reuse=partial(Nothing))
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
