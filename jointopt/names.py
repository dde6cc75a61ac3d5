"""What a config may name, apart from the code behind the names, which takes seconds to load."""

from __future__ import annotations

from typing import Literal, get_args

MODELS = "a local folder, a GGUF file, a hub id, or timm/NAME"
TaskName = Literal["text-classification", "image-classification", "causal-lm"]
TargetName = Literal["transformers", "onnxruntime", "gguf", "vllm"]
NOISY = ("transformers", "datasets", "timm", "httpx", "huggingface_hub", "torch.utils._pytree")
"""Loggers of libraries whose notices are not for the user of a command."""
TASK_NAMES: tuple[str, ...] = get_args(TaskName)
TARGET_NAMES: tuple[str, ...] = get_args(TargetName)

MOST = {"evaluations": 10**9, "minutes": 10**7, "batch": 10**6, "threads": 1024}
"""Of a search. More is a slip of the pen, of which a clock, the memory or the system would make an error of its own."""

NEAREST = "nearest"
"""How weights are rounded that no finishing has rounded."""
