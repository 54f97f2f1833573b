"""As cifar10_resnet18_sgd.py, with ARSAM by the published rule after the authors' warm-up of 3 epochs of full SAM.

    python tools/train.py configs/quant/cifar10_resnet18_published.py

Expected: not yet measured (200 epochs are a job for a GPU).
"""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.quant import cifar10_resnet18_sgd as baseline
from tasks.config import Epochs

sharpness = partial(ARSAM.published, rho=0.05, warmup=Epochs(3))
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
