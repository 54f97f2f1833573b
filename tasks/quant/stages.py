"""From a float model to a low-bit file, stage by stage, each measured on the same images.

float -> "ptq" (calibrated) -> "ptq_bn" (BatchNorm re-estimated) -> "qat" (trained, re-estimated) -> "onnx" (in ONNX Runtime)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

from tasks import checkpoint, engine
from tasks.config import Config
from tasks.errors import UserError
from tasks.loading import Seeded
from tasks.pictures import normalised
from tasks.quant import export
from tasks.quant.calibrate import calibrate, reestimate_batch_norm
from tasks.quant.lowbit import LowBit
from tasks.quant.prepare import QuantLayer
from tasks.quant.report import METRICS
from tasks.quant.runtime import BATCH, InRuntime, best, in_openvino, kernels, latency
from tasks.quant.sharpness import effect
from tasks.quant.work import bit_operations, not_quantized

CALIBRATION = 256  # images that set the step sizes, and the ranges of 8-bit edges
STATISTICS = 4096  # images that re-estimate BatchNorm: with 1024, the noise of its statistics cost half a point of top-1


def run(
    config: Config,
    out: Path,
    *,
    device: torch.device,
    float_checkpoint: Path | None,
    name: str,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Take a config through all stages, and write float.onnx, model.onnx and the runs' folders.

    Args:
        config: of the quantization-aware training; its task gives the bits.
        out: folder.
        device: of training.
        float_checkpoint: of ours, or a plain timm state_dict.
        name: of the config, for the records.
        say: called with a line of progress.

    Returns:
        What report.json holds, but for machine and command.

    Raises:
        UserError: something the user can put right.
    """
    task = config.task
    if not isinstance(task, LowBit) or not task.quantized:
        raise UserError(f"{name}: not a config with task.weight_bits and task.act_bits")
    float_task, metric = task.in_float(), task.metric
    title = METRICS.get(metric, metric)
    stages: dict[str, dict[str, float]] = {}
    out.mkdir(parents=True, exist_ok=True)

    say("[1/3] float model")
    if float_checkpoint is None:
        if config.pretraining is None:
            raise UserError(f"{name}: has no float training of its own; give --checkpoint FLOAT.pt")
        engine.train(replace(config.pretraining, task=float_task, seed=config.seed), out / "float", device=device, name=name)
        float_checkpoint = out / "float" / "last.pt"
    model = float_task.build()
    checkpoint.load_weights(model, float_checkpoint)
    model.to(device)
    stages["float"] = _measured(config, model, device)
    say(f"      {title} {stages['float'][metric]:.4f}")

    say(f"[2/3] W{task.weight_bits}A{task.act_bits}: calibration, then training")
    quantized = task.quantize(model.cpu()).to(device)
    calibration = _batches(task.crops(CALIBRATION, augment=False), device)
    # Of the plain images, which the network knows by heart, the statistics fit new ones worse than training's own do.
    statistics = task.crops(STATISTICS, augment=True).to(device).split(4 * BATCH)
    calibrate(quantized, calibration)
    stages["ptq"] = _measured(config, quantized, device)
    reestimate_batch_norm(quantized, statistics)
    stages["ptq_bn"] = _measured(config, quantized, device)
    say(f"      {title} {stages['ptq'][metric]:.4f} calibrated, {stages['ptq_bn'][metric]:.4f} with BatchNorm re-estimated")
    result = _trained(config, quantized, out, float_checkpoint, device, name)
    reestimate_batch_norm(quantized, statistics)
    stages["qat"] = _measured(config, quantized, device)
    say(f"      {title} {stages['qat'][metric]:.4f} trained, at {result['passes_per_step']:.2f} passes per step")

    say("[3/3] ONNX file, in ONNX Runtime")
    val = DataLoader(task.dataset("val"), batch_size=BATCH)
    images = torch.cat([normalised(batch["image"]) for batch in val])
    ranges = [batch.cpu().numpy() for batch in calibration]
    export.export(model, out / "float.onnx", ranges[:1])
    export.export(quantized, out / "model.onnx", ranges)
    file = InRuntime(out / "model.onnx")
    figures = engine.evaluate(replace(config, precision="fp32"), file, torch.device("cpu"))
    stages["onnx"] = {metric: figures[metric], "size_mb": (out / "model.onnx").stat().st_size / 1e6}
    stages["float"]["size_mb"] = (out / "float.onnx").stat().st_size / 1e6
    with torch.no_grad():
        alike = [best(file(x)) == best(quantized.eval()(x.to(device)).cpu()) for x in images.split(BATCH)]
    agreement = float(torch.cat(alike).float().mean())
    say(f"      {title} {stages['onnx'][metric]:.4f}, agreement with the fake-quantized model {agreement:.4f}")
    second = in_openvino(out / "model.onnx", file, images)
    return {
        "metric": metric,
        "stages": stages,
        "agreement": agreement,
        "openvino": second,
        "latency_ms": latency({"float": out / "float.onnx", "low_bit": out / "model.onnx"}, images[:1].numpy()),
        "bits": {"weight": task.weight_bits, "act": task.act_bits},
        "bops": {
            "float": bit_operations(quantized, images[:1].to(device), False),
            "low_bit": bit_operations(quantized, images[:1].to(device), True),
        },
        "kernels": dict(kernels(out / "model.onnx")),
        "not_quantized": not_quantized(quantized.cpu(), images[:1]),
        "perturb": task.perturb,
        "sharpness": _ascent(config, quantized.to(device), device),
        "passes_per_step": result["passes_per_step"],
        "seed": config.seed,
        "config": name,
    }


def _trained(
    config: Config, quantized: nn.Module, out: Path, float_checkpoint: Path, device: torch.device, name: str
) -> dict[str, Any]:
    """Train a calibrated model, in place, and what the run says of it."""
    task: Any = config.task
    start = out / "ptq.pt"
    checkpoint.save(start, {"model": quantized.state_dict()})
    result = engine.train(replace(config, task=task.starting(start, float_checkpoint)), out / "qat", device=device, name=name)
    checkpoint.load_weights(quantized, out / "qat" / "last.pt")
    return result


def _ascent(config: Config, quantized: nn.Module, device: torch.device) -> dict[str, float]:
    """What an ascent of the config's rho does to the model on a batch of the training split."""
    task: Any = config.task
    rho = float(getattr(config.sharpness, "keywords", {}).get("rho", 0.05))  # the usual one where the config has none
    data = task.dataset("train")
    train = Seeded(data, config.seed)
    batch = {key: x.to(device) for key, x in default_collate([train[0, i] for i in range(min(BATCH, len(data)))]).items()}
    return {"rho": rho, **effect(quantized, lambda model: task.in_float().loss(model, batch), rho)}


def _measured(config: Config, model: nn.Module, device: torch.device) -> dict[str, float]:
    """The metric on the validation split, and the size of the weights stored in their bits."""
    bits = sum(
        (layer.weight_quantizer.bits - 32) * layer.layer.weight.numel()  # type: ignore[union-attr, operator]
        for layer in model.modules()
        if isinstance(layer, QuantLayer)
    ) + 32 * sum(p.numel() for p in model.parameters())
    return {config.task.metric: engine.evaluate(config, model, device)[config.task.metric], "size_mb": bits / 8e6}


def _batches(images: Tensor, device: torch.device) -> list[Tensor]:
    return [batch.to(device) for batch in images.split(BATCH)]
