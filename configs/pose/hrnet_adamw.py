"""HRNet-W32 at 256x192 on COCO with AdamW: the baseline, on mmpose's schedule.

    python tools/train.py configs/pose/hrnet_adamw.py

Expected: not yet measured (210 epochs of COCO are a job for GPUs).
The learning rate belongs to 512 people per step; scale it with the batch.
"""

from functools import partial

from torch.optim import AdamW

from configs.pose.hrnet_small_adamw import sample as small_sample
from tasks.config import Config, Epochs
from tasks.pose.codec import Heatmap
from tasks.pose.model import HeatmapHRNet
from tasks.pose.task import PoseTask
from tasks.schedule import multistep

config = Config(
    task=PoseTask(codec=Heatmap((192, 256), (48, 64), sigma=2.0), network=partial(HeatmapHRNet, "hrnet_w32")),
    optimizer=partial(AdamW, lr=5e-4, weight_decay=1e-4),
    schedule=partial(multistep, milestones=(Epochs(170), Epochs(200)), warmup=500),
    epochs=210,
    batch_size=64,
    num_workers=4,
    eval_every=10,
)

# On two cores the wide network at full resolution would take days; its sample is the small one.
sample = small_sample
