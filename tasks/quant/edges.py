"""8-bit pairs on the edges between integer kernels, which would hand each other floats without them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray

from tasks.quant.graph import constant, numbers
from tasks.quant.runtime import INPUT, session

_FUSED = ("Relu", "Clip")  # what an integer kernel does on the way out
_PASSING = ("MaxPool",)  # values go through unchanged
_LEADING = (
    "Add",
    *_PASSING,
    *_FUSED,
    "Concat",
    "GlobalAveragePool",
    "ReduceMean",
    "Reshape",
    "Flatten",
    "Squeeze",
)  # stay integers


def quantize_edges(model: ir.Model, batches: Iterable[NDArray[np.float32]], *, signed: bool = False) -> None:
    """An 8-bit pair behind every convolution, and addition or pooling on the way to one, whose value has other users too.

    Without it the integer kernels would hand each other floats, which costs more than the kernels save. Additions whose sum
    only goes on in float (a transformer's residuals) are left alone: there is no kernel to win and accuracy to lose.

    Args:
        model: whose graph is changed in place.
        batches: inputs, from which ranges are measured.
        signed: codes are int8 with zero point 0; else uint8.
    """
    graph = model.graph
    _quantize_before_pooling(graph)
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
    # From the last: what a pooling hands on decides on the codes in front of it.
    edges = [value for value in reversed(edges) if not _share_codes(value)][::-1]
    ranges = _ranges(model, [str(value.name) for value in edges], batches)
    for value in edges:
        name, node = str(value.name), value.producer()
        assert node is not None
        pair = _pair(graph, name, ranges[name], signed)
        source = node.inputs[0].producer() if node.op_type in _PASSING else None  # type: ignore[union-attr]
        if source is not None and source.op_type == "DequantizeLinear":
            pair = source.inputs[1], source.inputs[2]  # pooling keeps its input's codes
        _insert_pair(graph, value, pair, [(use.node, use.idx) for use in value.uses()])


def _quantize_before_pooling(graph: ir.Graph) -> None:
    """The codes of a pooling's only user in front of the pooling too: the largest code is the largest value's."""
    for node in [node for node in graph if node.op_type in _PASSING]:
        value, users = node.inputs[0], [use.node for use in node.outputs[0].uses()]
        if value is not None and value.producer() is not None and [user.op_type for user in users] == ["QuantizeLinear"]:
            _insert_pair(graph, value, users[0].inputs[1:3], [(node, 0)])


def _pair(graph: ir.Graph, name: str, ends: tuple[float, float], signed: bool) -> tuple[ir.Value | None, ir.Value | None]:
    """Step size and zero point for values in a range, int8 around 0 or uint8."""
    low, high = min(ends[0], 0.0), max(ends[1], 1e-6)
    if signed:
        step, zero = np.float32(max(-low, high) / 127), np.array(0, np.int8)
    else:
        step = np.float32((high - low) / 255)
        zero = np.array(np.clip(round(-low / float(step)), 0, 255), np.uint8)
    return constant(graph, f"{name}.step", np.array(step)), constant(graph, f"{name}.zero", zero)


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
    if producer.op_type in _PASSING:
        _insert_pair(graph, producer.inputs[0], quantize.inputs[1:3], [(producer, 0)])
    return True


def _insert_pair(graph: Any, value: Any, pair: Sequence[Any], users: Iterable[Any]) -> None:
    """Quantize a value and back, for users (node, place)."""
    name = str(value.name)
    quantize = ir.Node("", "QuantizeLinear", [value, *pair], name=f"{name}.quantize")
    dequantize = ir.Node("", "DequantizeLinear", [quantize.outputs[0], *pair], name=f"{name}.dequantize")
    quantize.outputs[0].name, dequantize.outputs[0].name = f"{name}.codes", f"{name}.values"
    dequantize.outputs[0].shape, dequantize.outputs[0].type = value.shape, value.type
    graph.insert_after(value.producer(), [quantize, dequantize])
    for user, place in list(users):
        user.replace_input_with(place, dequantize.outputs[0])


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
