"""Checks that a sub-network is one which vLLM loads as it is: a stock LLaMA whose fused layers have one format each.

What is written is the folder for transformers. vLLM puts q, k, v into one layer and gate, up into another, takes no
quantized embedding, and builds all blocks by one config (its `llama.py` and `compressed_tensors.py`, as read in 2026).
"""

from __future__ import annotations

from typing import Any

from jointopt.checkpoint.structure import by_compressed_tensors, check_uniform, quantized_layers
from jointopt.targets import TARGETS, check_schemes
from quant.errors import JointoptError

KINDS = ("llama", "mistral", "qwen2", "qwen3")
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
SNIPPET = """For vLLM: `vllm serve {folder}`, or

```python
from vllm import LLM

model = LLM("{folder}")
```"""


def check(model: Any) -> None:
    """Raises JointoptError for a model of another family, blocks that differ in size, a format that vLLM does not
    compute or that layers which it fuses do not share, a quantized embedding, head or cache; with the layer's name."""
    check_uniform(model, "vllm", KINDS)
    layers: dict[str, Any] = quantized_layers(model)
    for path, layer in layers.items():
        try:
            check_schemes(TARGETS["vllm"], [layer.scheme.name])
        except JointoptError as error:
            raise JointoptError(f"export: {path}: {error}") from None
        if not path.endswith("_proj"):
            raise JointoptError(
                f"export: {path}: target vllm: found it in {layer.scheme.name}; allowed: as it is "
                "(SearchSpace.for_model(..., unquantized=['embedding', 'head']))"
            )
    for path in layers:
        parent, _, name = path.rpartition(".")
        others = next((group for group in FUSED if name in group), (name,))
        found = [_scheme_of(layers.get(f"{parent}.{other}")) for other in others]
        if len(set(found)) > 1:
            told = ", ".join(f"{other} in {each}" for other, each in zip(others, found, strict=True))
            raise JointoptError(f"export: {parent}: target vllm: found {told}; allowed: one format, they are one layer")
    assert by_compressed_tensors(model), "all of the target's formats are compressed-tensors'"


def _scheme_of(layer: Any) -> str:
    return "none" if layer is None else layer.scheme.name
