"""hrnet_small_arsam.py's network with 8-bit weights and activations: from float to a file that runs on integers.

    python tools/quantize.py configs/pose/hrnet_small_w8a8_arsam.py --checkpoint best.pt task.root=data/lspet

Expected: not yet measured. On the sample, from a float AP of 0.468: 0.466 trained, 0.466 in ONNX Runtime (one seed).
"""

from dataclasses import replace
from functools import partial

from torch.optim import AdamW

from configs.pose import hrnet_small_arsam as baseline

low_bit = {"weight_bits": 8, "act_bits": 8}
config = replace(
    baseline.config,
    task=replace(baseline.config.task, **low_bit),
    optimizer=partial(AdamW, lr=3e-4, weight_decay=1e-2),
    epochs=4,
    pretraining=baseline.config,
)
sample = replace(
    config, task=replace(baseline.sample.task, **low_bit), epochs=2, batch_size=16, eval_every=2, pretraining=baseline.sample
)
