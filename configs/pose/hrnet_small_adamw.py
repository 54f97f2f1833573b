"""HRNet 8/16/32/64 at 128x96 with AdamW: a pose network for two CPU cores, the baseline.

    python tools/train.py configs/pose/hrnet_small_adamw.py task.root=data/lspet

Expected: AP 0.061, AP50 0.252 on lspet (one seed, bf16, no spread known; some ten minutes on one core of an EPYC).
On the sample: AP above 0.3 in two minutes on two cores.
"""

from dataclasses import replace
from functools import partial

from torch.optim import AdamW

from tasks.config import Config
from tasks.pose.codec import Heatmap
from tasks.pose.model import HeatmapHRNet
from tasks.pose.task import SAMPLE, PoseTask
from tasks.pose.transforms import Augmentation
from tasks.schedule import cosine

task = PoseTask(
    codec=Heatmap((96, 128), (24, 32), sigma=1.5, unbiased=True, blur=9),
    network=partial(HeatmapHRNet, "hrnet_w32", widths=(8, 16, 32, 64), modules=(1, 1, 1), blocks=2),
    augmentation=Augmentation(half_body=0.0, shift=0.1, scale=(0.75, 1.3), rotation=40.0),
)
config = Config(
    task=task,
    optimizer=partial(AdamW, lr=3e-3, weight_decay=1e-2),
    schedule=partial(cosine, warmup=200),
    epochs=16,
    batch_size=32,
    num_workers=1,
)

sample = replace(
    config,
    task=replace(task, root=SAMPLE),
    epochs=10,
    batch_size=16,
    eval_every=5,
)
