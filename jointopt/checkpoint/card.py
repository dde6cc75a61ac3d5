"""The model card of an export: what it is, what it scored, how it loads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jointopt.finishing.finishing import Finishing
from jointopt.names import NEAREST
from jointopt.report.quantities import label, scale, time_source
from jointopt.rows import looks_like_hub_id

ROUNDED_BY = {
    NEAREST: "the nearest value",
    "gptq": "GPTQ (arXiv 2210.17323), layer after layer",
    "descent": "GPTQ and coordinate descent from there (QuantEase, arXiv 2309.01885), layer after layer",
    "learned": "GPTQ and learned rounding from there (AutoRound, arXiv 2309.05516), block after block",
}


def model_card(record: Mapping[str, Any], loading: str) -> str:
    """README.md of the folder."""
    costs, original = record["costs"], record["original"]
    base = record["base_model"]
    schemes = Counter(layer["scheme"] for layer in record["layers"])
    quantized = any(name != "none" for name in schemes)
    pruned = costs["parameters"] < original.get("parameters", 0)
    front = ["---", f"tags: [{', '.join(['jointopt', *['quantized'] * quantized, *['pruned'] * pruned])}]"]
    if base and "/" in base and looks_like_hub_id(base) and not Path(base).exists():
        front.append(f"base_model: {base}")
    front.append("---")
    values = {"size": costs["size"], **costs, **record["metrics"]}
    table = _rows(values, original)
    unseen = record.get("unseen", {"metrics": {}, "original": {}})
    table += _rows(unseen["metrics"], unseen["original"], ", unseen data")
    choices = [f"| {name} | {choice} |" for name, choice in record["choices"].items()]
    return "\n".join(
        [
            *front,
            "",
            f"# A searched sub-network{f' of {base}' if base else ''}",
            "",
            "Its architecture and the number format of each layer were searched together by jointopt.",
            "",
            "| | this model | the original |",
            "| --- | --- | --- |",
            *table,
            "",
            *_scored(record),
            *_weighed(record),
            *([f"Times are by the {time_source(record['latency'])}."] if record.get("latency") else []),
            "",
            "Layers by number format: " + ", ".join(f"{count} {name}" for name, count in schemes.most_common()) + ".",
            *([_weights_made(record["rounding"])] if quantized or record["rounding"] != NEAREST else []),
            "",
            "## Loading",
            "",
            loading,
            "",
            "## Genome",
            "",
            "| gene | choice |",
            "| --- | --- |",
            *choices,
            "",
        ]
    )


def model_name(found: str) -> str | None:
    """What a model is called where it is published: of a folder its name, and of one that the hub's library keeps its
    hub id. None where nothing is known."""
    if not found:
        return None
    path = Path(found)
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    return path.resolve().name if path.is_absolute() or path.exists() else found


def _number(name: str, value: Any) -> str:
    """A quantity in the unit of its label; nothing where nothing is known."""
    if value is None or not math.isfinite(value):
        return ""
    value = value / scale(name)
    return f"{value:,.0f}" if value == int(value) else f"{value:,.6g}"


UNPACKED = (
    "compressed-tensors unpacks the weights in the first call of the whole model, and not safely in several threads:\n"
    "where these share the model, call it once before."
)


def transformers_snippet(auto: str, folder: str, modeling_file: bool) -> str:
    option = ", trust_remote_code=True" if modeling_file else ""
    why = (
        "Layers differ in size or format in a way that the stock class does not know, so the folder brings a short\n"
        "modelling file (`modeling_jointopt.py`; read it before you trust it). Without it transformers may build the\n"
        "stock class, whose weights are then other ones.\n\n"
        if modeling_file
        else ""
    )
    return f'{why}```python\nfrom transformers import {auto}\n\nmodel = {auto}.from_pretrained("{folder}"{option})\n```'


def timm_snippet(folder: str) -> str:
    return (
        "Needs timm and safetensors. The transform prepares images by the model's own mean, deviation, size.\n\n"
        "```python\nimport sys\n\nfrom timm.data import create_transform, resolve_model_data_config\n\n"
        f'sys.path.insert(0, "{folder}")\nfrom modeling_jointopt import load\n\nmodel = load("{folder}")\n'
        "transform = create_transform(**resolve_model_data_config(model), is_training=False)\n```"
    )


def _weights_made(how: str) -> str:
    """How the weights came about, by the name that `Finishing` gives it."""
    if how in ROUNDED_BY:
        return f"Weights were rounded by {ROUNDED_BY[how]}."
    steps, learned_ranges = Finishing.training(how)
    ranges = " and the ranges of their scales (LSQ, arXiv 1902.08153)" if learned_ranges else ""
    return (
        f"Weights{ranges} were trained for {steps} steps in their number formats, distilled from the whole model, then "
        "rounded to nearest."
    )


def _rows(values: Mapping[str, Any], original: Mapping[str, Any], where: str = "") -> list[str]:
    return [
        f"| {label(name)}{where} | {_number(name, value)} | {_number(name, original.get(name))} |"
        for name, value in values.items()
    ]


def _scored(record: Mapping[str, Any]) -> list[str]:
    """What flatters a metric must not be taken for what a user will see."""
    if not record["metrics"]:
        return []
    told = "Metrics are of the data by which the search chose this model, which flatters them"
    return [f"{told}; unseen data it never saw." if "unseen" in record else f"{told}."]


def _weighed(record: Mapping[str, Any]) -> list[str]:
    if "stored" not in record:
        return ["Sizes are the bytes of all tensors in the safetensors file, scales included; MB are 10^6 bytes."]
    return [
        "Sizes are the bytes of all tensors as safetensors would hold them, scales included; those of the model's file "
        f"have {record['stored']:,} bytes."
    ]
