"""A file in ONNX Runtime: its answers, its kernels, its latency, and a second run time's opinion of it."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn

INPUT, OUTPUT = "image", "output"
BATCH = 64  # images at a time


def session(model: Path | bytes, *, threads: int = 1, optimised: Path | None = None) -> onnxruntime.InferenceSession:
    """ONNX Runtime on the CPU.

    Args:
        model: file or serialised model.
        threads: inside an operator.
        optimised: where to write the graph that really runs.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def kernels(path: Path) -> Counter[str]:
    """How often each operator occurs in the graph that ONNX Runtime makes of a file: QLinearConv is an integer kernel."""
    optimised = path.with_suffix(".optimised")
    try:
        session(path, optimised=optimised)
        return Counter(node.op_type for node in onnx.load(optimised).graph.node)
    finally:
        optimised.unlink(missing_ok=True)


class InRuntime(nn.Module):
    """A file in ONNX Runtime, for whom it is a model like any other."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._session = session(path, threads=torch.get_num_threads())

    def forward(self, images: Tensor) -> Tensor:
        """The file's output."""
        answer: Any = self._session.run(None, {INPUT: images.numpy()})[0]
        return torch.from_numpy(answer)


def in_openvino(path: Path, file: nn.Module, images: Tensor) -> dict[str, Any] | None:
    """A second run time's opinion of a file: how often it agrees with ONNX Runtime, or why it cannot; None: not installed."""
    try:
        import openvino  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    try:
        compiled = openvino.Core().compile_model(str(path), "CPU")
        alike = [best(torch.from_numpy(compiled(x.numpy())[0])) == best(file(x)) for x in images.split(BATCH)]
    except RuntimeError as error:  # of 2-bit weights, say
        return {"version": openvino.__version__, "error": " ".join(str(error).split())}
    return {"version": openvino.__version__, "agreement": float(torch.cat(alike).float().mean())}


def best(outputs: Tensor) -> Tensor:
    """The best class of an image [B, C], or the best cell of a heatmap [B, K, H, W]."""
    return outputs.flatten(min(outputs.dim() - 1, 2)).argmax(-1)


def latency(files: dict[str, Path], image: Any, rounds: int = 200) -> dict[str, float]:
    """Median milliseconds per image at batch 1 on one thread, the files in turn."""
    runs = {name: session(path) for name, path in files.items()}
    seconds: dict[str, list[float]] = {name: [] for name in files}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run.run(None, {INPUT: image})
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(times)) for name, times in seconds.items()}
