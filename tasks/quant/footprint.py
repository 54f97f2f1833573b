"""How long a file takes to load in ONNX Runtime, and what it then holds in memory: run in a process of its own.

python tasks/quant/footprint.py FILE c h w prints JSON. Nothing but ONNX Runtime is imported, so that the memory is the file's.
"""

import json
import sys
import time

import numpy as np
import onnxruntime

PAGE = 4096  # bytes
INPUT = "image"


def resident() -> float:
    """Megabytes that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE / 1e6


def main() -> None:
    """Load, run once, print."""
    path, *shape = sys.argv[1:]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    onnxruntime.get_available_providers()
    before, start = resident(), time.perf_counter()
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:  # as `runtime.session` does
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    seconds = time.perf_counter() - start
    session.run(None, {INPUT: np.zeros((1, *map(int, shape)), np.float32)})
    print(json.dumps({"load_seconds": seconds, "resident_mb": resident() - before}))


if __name__ == "__main__":
    main()
