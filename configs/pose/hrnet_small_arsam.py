"""As hrnet_small_adamw.py, with ARSAM."""

from dataclasses import replace
from functools import partial

from arsam import ARSAM
from configs.pose import hrnet_small_adamw as baseline

sharpness = partial(ARSAM, rho=0.005)
config = replace(baseline.config, sharpness=sharpness)
sample = replace(baseline.sample, sharpness=sharpness)
