"""The suites: a workload, its base optimizer and schedule, and its rows."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from benchmarks.compare import workloads
from benchmarks.compare.memory_task import configured
from benchmarks.compare.rows import MAIN, ROWS
from benchmarks.compare.schema import Large, Row, Suite
from configs.pose import hrnet_adamw, lite0_adamw
from configs.quant import cifar10_resnet18_sgd, lite0_w4a4_sgd, resnet18_w4a4_sgd
from tasks import engine
from tasks.pose.codec import Heatmap
from tasks.quant.calibrate import calibrate
from tasks.quant.canonicalise import canonicalise
from tasks.quant.prepare import parameter_groups, prepare


def ladder(first: float, count: int = 5) -> tuple[float, ...]:
    """Candidates of rho, each sqrt(2) times the one before."""
    return tuple(first * 2 ** (place / 2) for place in range(count))


def _network(channels: int, seed: int) -> nn.Module:
    return workloads.network(channels, 16)


def _dropout(seed: int) -> nn.Module:
    return workloads.dropout_network(64, 256, 0.3)


def _pose(seed: int) -> nn.Module:
    return workloads.pose_network()


@cache
def _float_state(seed: int) -> dict[str, Tensor]:
    """A float network trained on the clean images of the seed with the base optimizer."""
    suite = _CLEAN
    found: list[nn.Module] = []

    def network(own: int) -> nn.Module:
        found.append(suite.network(own))
        return found[-1]

    config = configured(replace(suite, network=network), suite.row("base"), suite.data(seed), seed, {})
    engine.train(config, None, device=torch.device("cpu"), name="float")
    return found[-1].state_dict()


def quantized(seed: int) -> nn.Module:
    """The float network of the seed at 4 bits, calibrated."""
    x, _ = workloads.cifar16(seed, noise=0.0)["train"]
    model = workloads.network(3, 16)
    model.load_state_dict(_float_state(seed))
    prepared = prepare(canonicalise(model.eval(), x[:1]), weight_bits=4, act_bits=4)
    calibrate(prepared, [x[:256]])
    return prepared


_QUICK = ("base", "sam", "published", "budget-1.2", "periodic-1.2", "late-1.2")
_DIGITS = Suite(
    "digits", workloads.digits, partial(_network, 1), ROWS, seeds=5, epochs=40, rhos=ladder(0.5**1.5),
    about="scikit-learn's digits, 8x8, 600 images, 40 % of their labels wrong, a ResNet of width 16, SGD, 40 epochs",
)  # fmt: skip
_CIFAR = Suite(
    "cifar16", workloads.cifar16, partial(_network, 3), ROWS, seeds=5, epochs=120, rhos=ladder(0.5**1.5),
    about="CIFAR-10 averaged down to 16x16, 2,000 images, 30 % of their labels wrong, a ResNet of width 16, SGD, 120 epochs",
)  # fmt: skip
_CLEAN = replace(
    _CIFAR, name="cifar16-clean", data=partial(workloads.cifar16, noise=0.0), epochs=60,
    about="the same with right labels, 60 epochs",
)  # fmt: skip
# What a row needs of the task beyond a loss, such as BatchNorm taken anew, the tasks of the pipelines do not offer.
_PLAIN = tuple(row for row in MAIN if not row.reestimate and row.part == 1.0 and not row.early)
_PUBLISHED = tuple(row for row in ROWS if row.ascents == "published")
_CIFAR10 = cifar10_resnet18_sgd.config
_WRN = replace(
    cifar10_resnet18_sgd.task,
    model="resnetv2_18",
    model_args={"layers": (4, 4, 4), "channels": (160, 320, 640), "stem_chs": 16},
)
_LARGE = tuple(
    Large(name, replace(config, precision=precision), (*_PLAIN, *_PUBLISHED), ladder(first), about=about)
    for name, config, precision, first, about in (
        ("cifar10-resnet18", _CIFAR10, "bf16", 0.05, "CIFAR-10, ResNet-18, SGD, 200 epochs, cutout, label smoothing"),
        ("cifar10-wrn28", replace(_CIFAR10, task=_WRN), "bf16", 0.05, "CIFAR-10, WRN-28-10, otherwise the same"),
        ("coco-hrnet-w32", hrnet_adamw.config, "bf16", 0.001, "COCO's keypoints, HRNet-W32 at 256x192, AdamW, 210 epochs"),
        ("imagenet-w4a4", resnet18_w4a4_sgd.config, "fp32", 0.05, "ImageNet, ResNet-18 at 4 bits, SGD, 90 epochs"),
    )
)
# A network that starts from ImageNet's weights, at a size that two cores can train: fewer epochs and pixels than its config.
_SHORT = ("base", "sam", "budget-1.2", "budget-1.05", "sam-warmup", "budget-1.2-warmup", "budget-1.05-warmup", "published")
_LITE0 = Large(
    "lspet-lite0",
    replace(
        lite0_adamw.config,
        task=replace(lite0_adamw.task, root="data/lspet", codec=Heatmap((128, 128), (32, 32), sigma=2.0, unbiased=True)),
        epochs=5,
    ),
    tuple(row for row in MAIN if row.name in _SHORT), ladder(0.01, 4), seeds=2, held_out=0.2, tune_epochs=2,
    about="poses of Leeds Sports Pose at 128x128, 2,400 people, a pretrained EfficientNet-Lite0, AdamW, 5 epochs; AP",
)  # fmt: skip
# Points to win back: 4 bits, calibrated by `tools/quantize.py configs/quant/lite0_w4a4_sgd.py epochs=0 task.side=128 --out
# runs/lite0-128` before, and then trained towards the float network's answers on photographs without labels.
_BITS = Large(
    "lite0-w4a4",
    replace(
        lite0_w4a4_sgd.config,
        task=replace(lite0_w4a4_sgd.task, side=128, weights="runs/lite0-128/ptq.pt", teacher="efficientnet_lite0"),
    ),
    tuple(row for row in MAIN if row.name in ("base", "sam", "budget-1.2", "published")), ladder(0.05, 3), seeds=3,
    held_out=0.2, tune_epochs=4,
    about="EfficientNet-Lite0 at 4 bits and 128x128, 800 photographs without labels, SGD, 10 epochs; top-1 on 200 others",
)  # fmt: skip
SUITES: dict[str, Suite | Large] = {
    "quick": replace(
        _DIGITS, name="quick", rows=tuple(row for row in ROWS if row.name in _QUICK), seeds=3, tune_seeds=1, rhos=ladder(0.5, 3)
    ),
    "digits": _DIGITS,
    "digits-dropout": replace(
        _DIGITS, name="digits-dropout", network=_dropout, lr=0.05, rows=MAIN, rhos=ladder(0.125),
        about="the same digits, a network of three linear layers of width 256 with dropout 0.3 between them, SGD, 40 epochs",
    ),
    "cifar16": _CIFAR,
    "cifar16-clean": _CLEAN,
    "cifar16-w4a4": replace(
        _CIFAR, name="cifar16-w4a4", data=partial(workloads.cifar16, noise=0.0), network=quantized, groups=parameter_groups,
        rows=(Row("calibrated", "calibrated, not trained", "base", settings={"lr": 0.0}), *ROWS), epochs=30, lr=0.01,
        rhos=ladder(1.0), about="the network that SGD trained on those, trained further at 4 bits, 30 epochs",
    ),
    "lspet": replace(
        _CIFAR, name="lspet", data=workloads.lspet, network=_pose, loss=workloads.pose_loss, score=workloads.pck,
        base=AdamW, lr=3e-3, weight_decay=1e-2, epochs=25, rhos=ladder(0.1),
        about="poses of Leeds Sports Pose at 48x64, 2,000 people, SimCC, AdamW, 25 epochs; the share of joints found within a"
        " tenth of the crop's height",
    ),
    **{suite.name: suite for suite in (_LITE0, _BITS, *_LARGE)},
}  # fmt: skip
