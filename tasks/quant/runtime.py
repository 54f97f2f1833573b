"""A file in ONNX Runtime: its answers, its kernels, its latency, and a second run time's opinion of it."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import Fail as _Fail
from torch import Tensor, nn

from tasks.errors import UserError

INPUT, OUTPUT = "image", "output"
_TRIM, _MMAP = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of glibc's mallopt
RETURN = 1 << 17  # bytes of a block from which on glibc gives freed memory back to the system, until it learns better


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
    with _freed_memory_returned():
        try:
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except _Fail:  # signed codes of inputs, which it would make unsigned, and forgets some (1.32)
            options.add_session_config_entry("session.qdqisint8allowed", "1")
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


@contextmanager
def _freed_memory_returned() -> Generator[None]:
    """What is freed inside goes back to the system, where the C library is glibc.

    Loading unpacks weights step by step. By the first large block that is freed glibc learns to keep such blocks, and a
    ResNet-18 of 4 bits would hold 30 to 60 MB that nobody uses, beside 16 that it needs.
    """
    if sys.platform != "linux":
        yield
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        yield
        return
    library.mallopt(_MMAP, RETURN)
    try:
        yield
    finally:  # what it learns to do in the end, for the sake of training in the same process
        library.mallopt(_MMAP, 1 << 25)
        library.mallopt(_TRIM, 1 << 26)


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
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1:
            raise ValueError(f"expected one input, found {len(inputs)}")
        if isinstance(inputs[0].shape[0], int):
            raise ValueError(f"its batch size is fixed, {inputs[0].shape[0]}; export it with a free one")
        self._input = inputs[0].name
        self.output_shape: list[Any] = outputs[0].shape

    def forward(self, images: Tensor) -> Tensor:
        """The file's output."""
        answer: Any = self._session.run(None, {self._input: images.numpy()})[0]
        return torch.from_numpy(answer)

    def about(self) -> dict[str, Any]:
        """The file's metadata.

        Raises:
            ValueError: it is not JSON.
        """
        held = self._session.get_modelmeta().custom_metadata_map
        return {key: json.loads(value) for key, value in held.items()}


def opened(file: Path, task: str) -> tuple[InRuntime, dict[str, Any]]:
    """A file that a user names, and its metadata, {} where it has none: then it is as the config says.

    Args:
        file: *.onnx.
        task: the name of the task that it must have been made for.

    Raises:
        UserError: it cannot be run, or is another task's.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        network = InRuntime(file)
    except Exception as error:  # the readers of a damaged file raise anything
        raise UserError(f"{file}: not an ONNX file that can be run ({' '.join(str(error).split())[:150]})") from error
    try:
        about = network.about()
    except ValueError as error:
        raise UserError(f"{file}: its metadata is not of this project: {error}") from error
    if about and about.get("task") != task:
        raise UserError(f"{file}: made for the task {about.get('task')!r} by its metadata, expected {task!r}")
    return network, about


def best(outputs: Tensor) -> Tensor:
    """The best class of an image [B, C], or the best cell of a heatmap [B, K, H, W]."""
    return outputs.flatten(min(outputs.dim() - 1, 2)).argmax(-1)


class Compared(nn.Module):
    """A file that answers, while others are asked the same: one pass over the data, nothing of which is kept.

    Args:
        file: whose answers count, on the CPU.
        model: that it was made of.
        device: of the model.
        path: of the file, for OpenVINO's opinion; None: it is not asked.
    """

    def __init__(self, file: nn.Module, model: nn.Module, device: torch.device, path: Path | None = None) -> None:
        super().__init__()
        self._file, self._model, self._device = file, model, device
        self._second, self._openvino, self._error = _openvino(path)
        self._answers = self._alike = self._alike_second = 0

    def forward(self, images: Tensor) -> Tensor:
        """The file's output."""
        answer = self._file(images)
        found = best(answer)
        with torch.no_grad():
            self._alike += int((best(self._model.eval()(images.to(self._device)).cpu()) == found).sum())
        self._answers += found.numel()
        if self._second is not None:
            try:
                self._alike_second += int((best(torch.from_numpy(self._second(images.numpy())[0])) == found).sum())
            except RuntimeError as error:
                self._second, self._error = None, " ".join(str(error).split())
        return answer

    @property
    def agreement(self) -> float:
        """Share of the answers that are the model's."""
        return self._alike / max(self._answers, 1)

    @property
    def second_opinion(self) -> dict[str, Any] | None:
        """How often OpenVINO agrees with the file in ONNX Runtime, or why it cannot; None: it is not installed."""
        if self._openvino is None:
            return None
        if self._error is not None:
            return {"version": self._openvino, "error": self._error}
        return {"version": self._openvino, "agreement": self._alike_second / max(self._answers, 1)}


def _openvino(path: Path | None) -> tuple[Any, str | None, str | None]:
    """A compiled file, OpenVINO's version, and what is in the way."""
    try:
        import openvino  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None, None, None
    if path is None:
        return None, None, None
    try:
        return openvino.Core().compile_model(str(path), "CPU"), openvino.__version__, None
    except RuntimeError as error:  # of 2-bit weights, say
        return None, openvino.__version__, " ".join(str(error).split())


def costs(files: dict[str, Path], image: NDArray[np.float32], rounds: int = 200) -> dict[str, dict[str, float]]:
    """What files cost on one thread, measured in turn.

    Args:
        files: by name.
        image: [1, c, h, w].
        rounds: at batch 1; a fifth of it at batch 8. No more are begun after 20 seconds.

    Returns:
        Per name: median "latency_ms" and "latency_ms_batch_8" of a call, and what `footprint` tells.
    """
    runs = {name: session(path) for name, path in files.items()}
    answer: dict[str, dict[str, float]] = {name: {} for name in files}
    for size, key in ((1, "latency_ms"), (8, "latency_ms_batch_8")):
        batch = image.repeat(size, axis=0)
        seconds: dict[str, list[float]] = {name: [] for name in files}
        begin = time.perf_counter()
        for _ in range(max(3, rounds if size == 1 else rounds // 5)):
            for name, run in runs.items():
                start = time.perf_counter()
                run.run(None, {INPUT: batch})
                seconds[name].append(time.perf_counter() - start)
            if time.perf_counter() - begin > 20:
                break
        for name, times in seconds.items():
            answer[name][key] = 1e3 * float(np.median(times))
    for name, path in files.items():
        answer[name] |= footprint(path, image.shape[1:])
    return answer


def footprint(path: Path, shape: tuple[int, ...]) -> dict[str, float]:
    """What a file costs a process of its own that loads it and runs it once.

    Returns:
        "load_seconds"; "resident_mb", memory that it then holds; "needed_mb", the same where glibc is told by the environment
        variable MALLOC_MMAP_THRESHOLD_ to give back what loading has freed.
    """
    command = [sys.executable, str(Path(__file__).with_name("footprint.py")), str(path), *map(str, shape)]

    def measured(**environment: str) -> dict[str, float]:
        run = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **environment})
        return json.loads(run.stdout)

    return {**measured(), "needed_mb": measured(MALLOC_MMAP_THRESHOLD_=str(RETURN))["resident_mb"]}
