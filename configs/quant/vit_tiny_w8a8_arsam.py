"""ViT-Tiny with 8-bit weights and activations on ImageNet-style folders, with ARSAM on AdamW.

    python tools/quantize.py configs/quant/vit_tiny_w8a8_arsam.py --checkpoint vit_tiny.pth

Attention's own matrix products stay float: they are no layers, and the report says so.
Expected: not yet measured (30 epochs of ImageNet are a job for GPUs).
"""

from dataclasses import replace
from functools import partial

from torch.optim import AdamW

from configs.quant import resnet18_w4a4_arsam as resnet
from configs.quant.resnet18_w4a4_sgd import digits, small, task
from tasks.config import Config
from tasks.schedule import cosine

adamw = partial(AdamW, lr=1e-5, weight_decay=0.05)
vit = replace(task, model="vit_tiny_patch16_224", weight_bits=8, act_bits=8)
config = replace(resnet.config, task=vit, optimizer=adamw, epochs=30, clip_norm=1.0, pretraining=None)

# A vision transformer of timm's own tests: the tiny one at 224 pixels would take hours on two cores.
tiny = replace(digits, model="test_vit", side=160, weight_bits=8, act_bits=8)
sample = replace(
    resnet.sample,
    task=tiny,
    optimizer=partial(AdamW, lr=1e-4, weight_decay=0.05),
    pretraining=Config(
        tiny, partial(AdamW, lr=1e-3, weight_decay=0.05), schedule=partial(cosine, warmup=45), epochs=12, **small
    ),
)
