"""8-bit pairs on the edges between integer kernels, which would hand each other floats without them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tasks.quant.graph import constant, numbers
from tasks.quant.runtime import INPUT, session

_FUSED = ("Relu", "Clip")  # what an integer kernel does on the way out
_PASSING = ("MaxPool",)  # values go through unchanged
_LEADING = ("Add", *_PASSING, *_FUSED, "Concat", "GlobalAveragePool", "ReduceMean", "Reshape", "Flatten")  # stay integers


def quantize_edges(model: ir.Model, batches: Iterable[NDArray[np.float32]]) -> None:
    """An 8-bit pair behind every convolution, and addition or pooling on the way to one, whose value has other users too.

    Without it the integer kernels would hand each other floats, which costs more than the kernels save. Additions whose sum
    only goes on in float (a transformer's residuals) are left alone: there is no kernel to win and accuracy to lose.
    """
    graph = model.graph
    wanted: set[ir.Value] = set()  # values that an integer kernel takes, at once or after what integers can do
    for node in reversed(list(graph)):
        if node.op_type == "QuantizeLinear" or (node.op_type in _LEADING and not wanted.isdisjoint(node.outputs)):
            wanted.update(value for value in node.inputs if value is not None)
    edges: list[ir.Value] = []
    for node in graph:
        if node.op_type not in ("Conv", "Add", *_PASSING) or any(i is None or i.producer() is None for i in node.inputs[:1]):
            continue
        if node.op_type == "Add" and any(numbers(value) is not None for value in node.inputs):
            continue  # a bias
        if node.op_type != "Conv" and node.outputs[0] not in wanted:
            continue
        value = node.outputs[0]
        users = [use.node for use in value.uses()]
        if len(users) == 1 and users[0].op_type in _FUSED:
            value = users[0].outputs[0]
            users = [use.node for use in value.uses()]
        if users and not (len(users) == 1 and users[0].op_type == "QuantizeLinear"):
            edges.append(value)
    edges = [value for value in edges if not _share_codes(value)]
    ranges = _ranges(model, [str(value.name) for value in edges], batches)
    for value in edges:
        name, node = str(value.name), value.producer()
        assert node is not None
        low, high = (min(ranges[name][0], 0.0), max(ranges[name][1], 1e-6))
        step = np.float32((high - low) / 255)
        zero = np.uint8(np.clip(round(-low / float(step)), 0, 255))
        pair = constant(graph, f"{name}.step", np.array(step)), constant(graph, f"{name}.zero", np.array(zero))
        source = node.inputs[0].producer() if node.op_type in _PASSING else None  # type: ignore[union-attr]
        if source is not None and source.op_type == "DequantizeLinear":
            pair = (source.inputs[1], source.inputs[2])  # type: ignore[assignment]  # pooling keeps its input's codes
        users = list(value.uses())
        quantize = ir.Node("", "QuantizeLinear", [value, *pair], name=f"{name}.quantize")
        dequantize = ir.Node("", "DequantizeLinear", [quantize.outputs[0], *pair], name=f"{name}.dequantize")
        quantize.outputs[0].name, dequantize.outputs[0].name = f"{name}.codes", f"{name}.values"
        for user, place in users:
            user.replace_input_with(place, dequantize.outputs[0])
        graph.insert_after(node, [quantize, dequantize])


def _share_codes(value: ir.Value) -> bool:
    """Give all users of a value the codes that one of them makes of it in 8 bits; False: none does.

    A second pair with a step size of its own would be a kernel more, and a rounding more, on each such edge.
    """
    users = list(value.uses())
    pairs = [
        (use.node, after[0].node)
        for use in users
        if use.node.op_type == "QuantizeLinear"
        and len(after := list(use.node.outputs[0].uses())) == 1
        and after[0].node.op_type == "DequantizeLinear"
    ]
    if not pairs:
        return False
    quantize, dequantize = max(pairs, key=lambda pair: float(numbers(pair[0].inputs[1]) or 0))  # the widest range
    producer, graph = value.producer(), quantize.graph
    assert producer is not None
    assert graph is not None
    graph.remove([quantize, dequantize])  # to stand before all users
    graph.insert_after(producer, [quantize, dequantize])
    for user, place in users:
        if user is not quantize:
            user.replace_input_with(place, dequantize.outputs[0])
    return True


def _ranges(model: ir.Model, names: list[str], batches: Iterable[NDArray[np.float32]]) -> dict[str, tuple[float, float]]:
    """Least and largest value of the named values over the batches, picture by picture: the values themselves are not kept."""
    if not names:
        return {}
    proto = ir.to_proto(model)
    ends = []
    for name in names:
        for kind in ("Min", "Max"):
            end = f"{name}.{kind}"
            proto.graph.node.append(onnx.helper.make_node(f"Reduce{kind}", [name], [end], keepdims=0))
            proto.graph.output.append(onnx.helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, []))
            ends.append(end)
    run = session(proto.SerializeToString())
    rows = []
    for batch in batches:
        for picture in batch:
            values: Any = run.run(ends, {INPUT: picture[None]})
            rows.append(np.array(values).reshape(len(names), 2))
    table = np.array(rows)
    return {name: (float(table[:, i, 0].min()), float(table[:, i, 1].max())) for i, name in enumerate(names)}
