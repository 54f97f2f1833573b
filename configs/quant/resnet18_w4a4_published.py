"""As resnet18_w4a4_sgd.py, with ARSAM by the published rule after the authors' warm-up of 3 epochs of full SAM.

    python tools/quantize.py configs/quant/resnet18_w4a4_published.py --checkpoint resnet18.pth

Expected: not yet measured (90 epochs of ImageNet are a job for GPUs).
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.quant import resnet18_w4a4_sgd as baseline
from tasks.config import Epochs

sharpness = partial(ARSAM.published, rho=0.05, warmup=Epochs(3))
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
