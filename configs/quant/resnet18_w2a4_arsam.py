"""As resnet18_w4a4_arsam.py, with weights of 2 bits.

    python tools/quantize.py configs/quant/resnet18_w2a4_arsam.py --checkpoint resnet18.pth

Expected: not yet measured (90 epochs of ImageNet are a job for GPUs).
"""

from dataclasses import replace

from configs.quant import resnet18_w4a4_arsam as w4a4
from configs.quant.resnet18_w4a4_sgd import digits, task

config = replace(w4a4.config, task=replace(task, weight_bits=2))
sample = replace(w4a4.sample, task=replace(digits, weight_bits=2))
