"""From a float model to a low-bit file, stage by stage, each measured on the same images.

float -> "ptq" (calibrated) -> "ptq_bn" (BatchNorm re-estimated) -> "qat" (trained, re-estimated) -> "onnx" (in ONNX Runtime)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
from tasks.quant.prepare import QuantLayer, not_quantized
from tasks.quant.report import METRICS
from tasks.quant.sharpness import effect

CALIBRATION = 256  # images that set the step sizes, and the ranges of 8-bit edges
STATISTICS = 4096  # images that re-estimate BatchNorm: with 1024, the noise of its statistics cost half a point of top-1
_BATCH = 64


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
    statistics = task.crops(STATISTICS, augment=True).to(device).split(4 * _BATCH)
    calibrate(quantized, calibration)
    stages["ptq"] = _measured(config, quantized, device)
    reestimate_batch_norm(quantized, statistics)
    stages["ptq_bn"] = _measured(config, quantized, device)
    say(f"      {title} {stages['ptq'][metric]:.4f} calibrated, {stages['ptq_bn'][metric]:.4f} with BatchNorm re-estimated")
    start = out / "ptq.pt"
    checkpoint.save(start, {"model": quantized.state_dict()})
    trained = replace(config, task=task.starting(start, float_checkpoint))
    result = engine.train(trained, out / "qat", device=device, name=name)
    checkpoint.load_weights(quantized, out / "qat" / "last.pt")
    reestimate_batch_norm(quantized, statistics)
    stages["qat"] = _measured(config, quantized, device)
    say(f"      {title} {stages['qat'][metric]:.4f} trained, at {result['passes_per_step']:.2f} passes per step")

    say("[3/3] ONNX file, in ONNX Runtime")
    val = DataLoader(task.dataset("val"), batch_size=_BATCH)
    images = torch.cat([normalised(batch["image"]) for batch in val])
    ranges = [batch.cpu().numpy() for batch in calibration]
    export.export(model, out / "float.onnx", ranges[:1])
    export.export(quantized, out / "model.onnx", ranges)
    file = InRuntime(out / "model.onnx")
    figures = engine.evaluate(replace(config, precision="fp32"), file, torch.device("cpu"))
    stages["onnx"] = {metric: figures[metric], "size_mb": (out / "model.onnx").stat().st_size / 1e6}
    stages["float"]["size_mb"] = (out / "float.onnx").stat().st_size / 1e6
    with torch.no_grad():
        alike = [_best(file(x)) == _best(quantized.eval()(x.to(device)).cpu()) for x in images.split(_BATCH)]
    agreement = float(torch.cat(alike).float().mean())
    say(f"      {title} {stages['onnx'][metric]:.4f}, agreement with the fake-quantized model {agreement:.4f}")
    second = _in_openvino(out / "model.onnx", file, images)
    rho = float(getattr(config.sharpness, "keywords", {}).get("rho", 0.05))  # the usual one where the config has none
    train = Seeded(task.dataset("train"), config.seed)
    items = min(_BATCH, len(task.dataset("train")))  # type: ignore[arg-type]
    batch = {key: x.to(device) for key, x in default_collate([train[0, i] for i in range(items)]).items()}
    return {
        "metric": metric,
        "stages": stages,
        "agreement": agreement,
        "openvino": second,
        "latency_ms": _latency({"float": out / "float.onnx", "low_bit": out / "model.onnx"}, images[:1].numpy()),
        "bits": {"weight": task.weight_bits, "act": task.act_bits},
        "bops": {
            "float": _bops(quantized, images[:1].to(device), False),
            "low_bit": _bops(quantized, images[:1].to(device), True),
        },
        "kernels": dict(export.kernels(out / "model.onnx")),
        "not_quantized": not_quantized(quantized.cpu(), images[:1]),
        "perturb": task.perturb,
        "sharpness": {"rho": rho, **effect(quantized.to(device), lambda m: float_task.loss(m, batch), rho)},
        "passes_per_step": result["passes_per_step"],
        "seed": config.seed,
        "config": name,
    }


def _measured(config: Config, model: nn.Module, device: torch.device) -> dict[str, float]:
    """The metric on the validation split, and the size of the weights stored in their bits."""
    bits = sum(
        (layer.weight_quantizer.bits - 32) * layer.layer.weight.numel()  # type: ignore[union-attr, operator]
        for layer in model.modules()
        if isinstance(layer, QuantLayer)
    ) + 32 * sum(p.numel() for p in model.parameters())
    return {config.task.metric: engine.evaluate(config, model, device)[config.task.metric], "size_mb": bits / 8e6}


def _batches(images: Tensor, device: torch.device) -> list[Tensor]:
    return [batch.to(device) for batch in images.split(_BATCH)]


class InRuntime(nn.Module):
    """A file in ONNX Runtime, for whom it is a model like any other."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._session = export.session(path, threads=torch.get_num_threads())

    def forward(self, images: Tensor) -> Tensor:
        """The file's output."""
        answer: Any = self._session.run(None, {export.INPUT: images.numpy()})[0]
        return torch.from_numpy(answer)


def _in_openvino(path: Path, file: nn.Module, images: Tensor) -> dict[str, Any] | None:
    """A second run time's opinion of a file: how often it agrees with ONNX Runtime, or why it cannot; None: not installed."""
    try:
        import openvino  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU")
        alike = [_best(torch.from_numpy(compiled(x.numpy())[0])) == _best(file(x)) for x in images.split(_BATCH)]
    except RuntimeError as error:  # of 2-bit weights, say
        return {"version": openvino.__version__, "error": " ".join(str(error).split())}
    return {"version": openvino.__version__, "agreement": float(torch.cat(alike).float().mean())}


def _best(outputs: Tensor) -> Tensor:
    """The best class of an image [B, C], or the best cell of a heatmap [B, K, H, W]."""
    return outputs.flatten(min(outputs.dim() - 1, 2)).argmax(-1)


def _latency(files: dict[str, Path], image: Any, rounds: int = 200) -> dict[str, float]:
    """Median milliseconds per image at batch 1 on one thread, the files in turn."""
    runs = {name: export.session(path) for name, path in files.items()}
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, session in runs.items():
            start = time.perf_counter()
            session.run(None, {export.INPUT: image})
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(times)) for name, times in seconds.items()}


@torch.no_grad()
def _bops(model: nn.Module, image: Tensor, low_bit: bool) -> float:
    """Bit operations of the quantizable layers, sum over layers of multiplications x weight bits x input bits."""
    total = 0.0

    def count(layer: QuantLayer, _: Any, output: Tensor) -> None:
        nonlocal total
        weight: Any = layer.layer.weight
        channels = weight.shape[0]
        bits = layer.weight_quantizer.bits * layer.input_quantizer.bits if low_bit else 32 * 32
        total += output.numel() / channels * weight.numel() * bits

    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, QuantLayer)]  # type: ignore[arg-type]
    try:
        model.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
    return total
