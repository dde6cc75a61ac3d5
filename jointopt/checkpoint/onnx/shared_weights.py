"""Weights that several integer products of a traced graph read: of a block that runs twice, of tied layers.

Where a processor's sums of int8 weights saturate, ONNX Runtime turns them into uint8 around 128 when it loads a model
(`session.x64quantprecision`): for every product anew, but always under the weight's one name, so that it takes none in
which two products read the same. These are written the way that it would turn them, which it leaves alone.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import onnx_ir as ir

WEIGHTS = {"MatMulInteger": (1, 3), "QLinearConv": (3, 5)}
"""Operators whose weights it turns -> at which inputs these and their zero point are."""


def write_shared_weights(model: ir.Model) -> None:
    """Has every product of a weight that others read too multiply it as uint8, in place; what is stored stays int8."""
    products: dict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in model.graph:
        if node.op_type in WEIGHTS:
            products[_stored(node.inputs[WEIGHTS[node.op_type][0]])].append(node)
    shared = [node for readers in products.values() if len(readers) > 1 for node in readers]
    middle = _middle(model.graph) if shared else None
    for node in shared:
        weight, zero_point = WEIGHTS[node.op_type]
        codes = ir.node("Cast", [node.inputs[weight]], {"to": ir.DataType.UINT8})
        shifted = ir.node("BitwiseXor", [codes.outputs[0], middle])
        model.graph.insert_before(node, [codes, shifted])
        node.replace_input_with(weight, shifted.outputs[0])
        node.replace_input_with(zero_point, middle)


def _stored(weight: ir.Value | None) -> ir.Value:
    """What a weight is made of, before it is transposed."""
    assert weight is not None
    node = weight.producer()
    return weight if node is None else _stored(node.inputs[0])


def _middle(graph: ir.Graph) -> ir.Value:
    tensor = ir.tensor(np.array(128, dtype=np.uint8), name="shared_weights.zero_point")
    value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(()), const_value=tensor)
    graph.register_initializer(value)
    return value
