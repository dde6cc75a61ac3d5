"""A commented config for a model, read off its architecture alone: what `jointopt init` writes."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from jointopt import tasks
from jointopt.names import MODELS, TASK_NAMES
from jointopt.outputs import MULTI_LABEL, REGRESSION, problem_of
from search_spaces.space import SearchSpace

_DATA = {
    "text-classification": (
        "train.csv",
        "valid.csv",
        "csv, tsv, json, jsonl or parquet with columns text and label (others: {{path: ..., text: NAME, label: NAME}})",
    ),
    "image-classification": (
        "images/train",
        "images/valid",
        "a folder of images by class, or a csv, json or parquet with columns image and label",
    ),
    "causal-lm": ("train.txt", "valid.txt", "a text file, or a csv, json or parquet with a column text"),
}
_LABELLED = {
    MULTI_LABEL: (
        "train.jsonl",
        "valid.jsonl",
        "json, jsonl or parquet with columns {} and label, a list of classes; or, csv too, with 0 or 1 in a column for "
        "each class: {{path: ..., label: [NAME, NAME]}}",
    ),
    REGRESSION: (
        "train.csv",
        "valid.csv",
        "csv, tsv, json, jsonl or parquet with columns {} and label, a number (others: {{path: ..., label: NAME}}; of "
        "several outputs {{path: ..., label: [NAME, NAME]}})",
    ),
}
"""Of a classifier whose outputs are not one class of several, in place of these."""
_ABOUT = {
    "depth": "blocks that stay; they leave in order of least importance",
    "heads": "attention heads of each block",
    "mlp": "width of each block's MLP",
    "bottleneck": "width between a block's convolutions",
    "stage": "width of each stage",
}


def starter_config(name: str) -> str:
    """The text of a config for the model at `name`, which `load_config` reads once the data's names are right.

    Nothing is downloaded but the config of a hub id.

    Raises:
        JointoptError: no such model, a model of an unknown family, of an unknown task, or one that is
            called causal and is not.
    """
    from jointopt.models import empty_model, find_source, model_task
    from jointopt.report.quantities import counted

    source = find_source(name)
    if source.local:
        os.environ["HF_HUB_OFFLINE"] = "1"
    task = model_task(source)
    model = empty_model(source, task)
    if task == "causal-lm":
        tasks.TASKS[task].check_scored(model)
    problem = None if task == "causal-lm" else problem_of(model)
    from jointopt.supernet.transforms import possible
    from search_spaces.defaults import DEFAULT_SCHEMES, default_architecture, presets, space_for_model
    from search_spaces.families import declare

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        space = space_for_model(model)
        family = declare(model)[1]
    train, evaluate, kinds = _DATA[task] if problem is None else _LABELLED[problem]
    metric, *others = tasks.TASKS[task].problem(model).metrics
    own = family.name.removeprefix("timm_")
    preset = f"{own}  # or fixed, which" if own in presets() else "fixed  # which"
    lines = [
        f"# A search over {_quoted(name)}: family {family.name}, {len(space)} genes, {counted(space.count())} genomes.",
        "# Paths are relative to the directory that the command is started in.",
        f"model: {_quoted(name)}  # {MODELS}",
        f"task: {task}  # {', '.join(TASK_NAMES)}; or quality: my_package.my_function",
        "",
        f"# {kinds.format(task.partition('-')[0])}; or a hub id with its split",
        "data:",
        f"  train: {train}",
        f"  calibrate: {train}  # some samples of it, for ranges and importance",
        f"  evaluate: {evaluate}  # what every sub-network is scored on",
        "",
        "space:",
        *_widths(space, default_architecture(family)),
        f"  # preset: {preset} searches number formats only; in place of the lines above",
        f"  schemes: [{', '.join(DEFAULT_SCHEMES)}]  # also: W4A16_ASYM, W8A16, W4A8, FP8, NVFP4, MXFP4, ...",
        "  precision_per: projection  # layer; projection (q, k, v share; gate, up share); block",
        "",
        "# Changes of the weights that keep the model's function and make it easier to quantize.",
        f"# transforms: [smooth]  # {', '.join(possible(family))}",
        "",
        "# Fits layers whose inputs are narrowed to what they computed before: much nearer to the original, untrained.",
        "repair: true",
        "",
        "# Fine-tunes the super-network before the search, so that smaller sub-networks keep more. Worth its time.",
        "# train: {epochs: 1, batch_size: 32, learning_rate: 5.0e-5}",
        "",
        f"objectives: [{metric}, size]  # also {', '.join(others)}, macs, bops, parameters",
        "search: {strategy: guided, evaluations: 200, seed: 0}  # guided, evolutionary, random",
        "choose: knee  # or {size_mb: 20}: the best at or under 20 * 10^6 bytes; or {drop: 0.01}: the smallest",
        "# finish: {rounding: gptq}  # the choice rounded anew; or {steps: 500}: trained alone on data.train",
        "target: transformers  # or onnxruntime (model.onnx); gguf (llama.cpp; blocks of one size), vllm",
        "# hardware: {device: h100, batch: 8}  # then latency, energy and peak_memory are objectives, too",
        "device: auto  # cpu, cuda",
        "dtype: auto  # float32, bfloat16",
        f"output: {_quoted('runs/' + Path(name).resolve().name)}",
    ]
    return "\n".join(lines) + "\n"


def _widths(space: SearchSpace, fractions: Mapping[str, Sequence[float]]) -> list[str]:
    """One line for each kind of width: its choices as counts, or as the fractions that these come from where they
    differ from block to block."""
    lines = []
    for kind, shares in fractions.items():
        found = {gene.choices for gene in space.genes if gene.name == kind or gene.name.endswith(f".{kind}")}
        alike = len(found) == 1 and "stage" not in fractions
        choices, unit = (found.pop(), "") if alike else (shares, ", as fractions of the whole")
        lines.append(f"  {kind}: [{', '.join(map(str, choices))}]  # {_ABOUT[kind]}{unit}")
    return lines


def _quoted(text: str) -> str:
    """The text as a YAML scalar, whatever it would be taken for without quotes: null, 1e5."""
    return yaml.safe_dump(text, default_style='"', allow_unicode=True, width=sys.maxsize).strip()
