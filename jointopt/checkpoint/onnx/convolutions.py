"""Integer convolutions of a traced graph, written as the operators that ONNX Runtime has fast kernels for.

Where a layer stood, tracing leaves a `MARKER`: whole products of codes, times one scale a channel. What follows it
decides how it is written, with the same result but for the last bits of a float:

- a normalization after it becomes part of its scales and its bias;
- where nothing but a ReLU and a maximum pooling come before its readers round it to one static INT8 format, all of
  that is one QLinearConv, whose output are the readers' codes (rounding and ReLU may change places);
- else, a kernel of 1 x 1 is a MatMulInteger over channels, and a larger one ConvInteger, whose kernel is slow.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

MARKER = "Products"
DOMAIN = "jointopt"
_INT32 = 2**31 - 1


@dataclass
class _Products:
    """What a marker says, and what was found after it.

    Attributes:
        node: the marker.
        inputs: codes, weight codes, the codes' zero point, the weight's scales; the codes' scale and the bias, or None.
        scale: float64 [channels], of a whole product.
        bias: float64 [channels].
        output: the value that it stands for by now.
    """

    node: ir.Node
    inputs: tuple[ir.Value | None, ...]
    scale: np.ndarray
    bias: np.ndarray
    output: ir.Value


def write_convolutions(model: ir.Model) -> None:
    """Replaces every marker of a model, in place."""
    graph = model.graph
    for node in [each for each in graph if each.domain == DOMAIN]:
        products = _normalized(graph, _read(node))
        if not _as_qlinear(graph, products):
            _as_float(graph, products)
    RemoveUnusedNodesPass()(model)
    model.opset_imports.pop(DOMAIN, None)


def _constant(value: ir.Value | None) -> np.ndarray | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _read(node: ir.Node) -> _Products:
    inputs = (*node.inputs, None, None)[:6]  # the exporter leaves out what is None at the end
    weight_scale, scale, bias = (_constant(each) for each in inputs[3:])
    assert weight_scale is not None
    scales = weight_scale.astype(np.float64).reshape(-1)
    if scale is not None:
        scales = scales * scale.astype(np.float64).item()
    bias = np.zeros_like(scales) if bias is None else bias.astype(np.float64)
    return _Products(node, inputs, scales, bias, node.outputs[0])


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _normalized(graph: ir.Graph, products: _Products) -> _Products:
    """With the normalization that alone reads it, if there is one."""
    norm = _only_reader(products.output)
    if norm is None or norm.op_type != "BatchNormalization":
        return products
    constants = [_constant(each) for each in norm.inputs[1:]]
    if any(each is None for each in constants):
        return products
    gamma, beta, mean, variance = (each.astype(np.float64) for each in constants)  # type: ignore[union-attr]
    factor = gamma / np.sqrt(variance + norm.attributes["epsilon"].as_float())
    bias = (products.bias - mean) * factor + beta
    return replace(products, scale=products.scale * factor, bias=bias, output=norm.outputs[0])


def _as_qlinear(graph: ir.Graph, products: _Products) -> bool:
    """Writes it as a QLinearConv, where its readers round it so; returns whether."""
    between: list[ir.Node] = []
    value = products.output
    while (reader := _only_reader(value)) is not None and reader.op_type in ("Relu", "MaxPool"):
        between.append(reader)
        value = reader.outputs[0]
    readers = [use.node for use in value.uses()]
    if not readers or value.is_graph_output() or any(each.op_type != "QuantizeLinear" for each in readers):
        return False
    formats = {tuple(_number(each) for each in reader.inputs[1:]) for reader in readers}
    if len(formats) > 1 or None in next(iter(formats)):
        return False
    scale, zero_point = readers[0].inputs[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        bias = np.rint(products.bias / products.scale)
    # A channel that is multiplied with nothing has no whole bias.
    if _constant(products.inputs[4]) is None or not (np.abs(bias) < _INT32 // 2).all():
        return False
    codes, weight, codes_zero, _, codes_scale = products.inputs[:5]
    write = _Writer(graph, products.node)
    weight_scale = write.constant((products.scale / _number(codes_scale)).astype(np.float32), "scale")
    zero = write.constant(np.int8(0), "zero")
    whole_bias = write.constant(bias.astype(np.int32), "bias")
    inputs = [codes, codes_scale, codes_zero, weight, weight_scale, zero, scale, zero_point, whole_bias]
    found = write("QLinearConv", inputs, products.node.attributes)
    for node in between:
        if node.op_type == "MaxPool":
            found = write("MaxPool", [found], node.attributes)
        elif _number(zero_point):  # else no code stands for a number below 0
            found = write("Clip", [found, zero_point])
    for reader in readers:
        ir.convenience.replace_all_uses_with(reader.outputs[0], found, replace_graph_outputs=True)
    return True


def _number(value: ir.Value | None) -> float | None:
    found = _constant(value)
    return float(found.astype(np.float64).item()) if found is not None and found.size == 1 else None


def _as_float(graph: ir.Graph, products: _Products) -> None:
    """Writes it with an output in float32."""
    write = _Writer(graph, products.node)
    codes, weight, codes_zero = products.inputs[:3]
    stored = _constant(weight)
    assert stored is not None
    zero = write.constant(np.int8(0), "zero")
    area, options = stored[0, 0].size, products.node.attributes
    points = area == 1 and not any(options["pads"].as_ints()) and options["group"].as_int() == 1
    shape = (-1,) if points else (1, -1, 1, 1)
    scale = write.constant(products.scale.astype(np.float32).reshape(shape), "scale")
    bias = write.constant(products.bias.astype(np.float32).reshape(shape), "bias")
    if points:
        steps = options["strides"].as_ints()
        if max(steps) > 1:
            window = [write.constant(np.array(each), "window") for each in ([0, 0], [_INT32] * 2, [2, 3], steps)]
            codes = write("Slice", [codes, *window])
        last = write("Transpose", [codes], {"perm": [0, 2, 3, 1]})
        matrix = write.constant(np.ascontiguousarray(stored[:, :, 0, 0].T), "weight")
        whole = write("MatMulInteger", [last, matrix, codes_zero, zero])
    else:
        whole = write("ConvInteger", [codes, weight, codes_zero, zero], options)
    found = write("Mul", [write("Cast", [whole], {"to": ir.DataType.FLOAT}), scale])
    if products.bias.any():
        found = write("Add", [found, bias])
    if points:
        found = write("Transpose", [found], {"perm": [0, 3, 1, 2]})
    ir.convenience.replace_all_uses_with(products.output, found, replace_graph_outputs=True)


class _Writer:
    """Adds nodes and constants to a graph where a node stands, named after it."""

    def __init__(self, graph: ir.Graph, before: ir.Node):
        self.graph, self.before = graph, before
        self.name = before.outputs[0].name

    def constant(self, array: Any, name: str) -> ir.Value:
        array = np.asarray(array)
        at = sum(each.startswith(f"{self.name}.{name}") for each in self.graph.initializers)
        tensor = ir.tensor(array, name=f"{self.name}.{name}" + (f"{at}" if at else ""))
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape(array.shape)
        value = ir.Value(name=tensor.name, type=kind, shape=shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def __call__(self, kind: str, inputs: list[ir.Value | None], attributes: Any = None) -> ir.Value:
        kept = {
            name: each.value if isinstance(each, ir.Attr) else each for name, each in dict(attributes or {}).items()
        }
        node = ir.node(kind, inputs, kept)
        self.graph.insert_before(self.before, node)
        return node.outputs[0]
