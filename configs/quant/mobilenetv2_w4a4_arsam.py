"""MobileNetV2 with 4-bit weights and activations on ImageNet-style folders, with ARSAM.

    python tools/quantize.py configs/quant/mobilenetv2_w4a4_arsam.py --checkpoint mobilenetv2_100.pth

Expected: not yet measured (90 epochs of ImageNet are a job for GPUs).
"""

from dataclasses import replace

from configs.quant import resnet18_w4a4_arsam as resnet
from configs.quant.resnet18_w4a4_sgd import digits, task

config = replace(resnet.config, task=replace(task, model="mobilenetv2_100"))
sample = replace(resnet.sample, task=replace(digits, model="mobilenetv2_100", side=64))
