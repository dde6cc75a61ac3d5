"""What a config may name, what it gets where it says nothing, and what several rooms call the same, apart from the code
behind, slow to load."""

from __future__ import annotations

from typing import Literal, get_args

MODELS = "a local folder, a GGUF file, a hub id, or timm/NAME"
DEVICES = "auto, cpu, cuda, cuda:1 and the like"
TaskName = Literal["text-classification", "image-classification", "causal-lm"]
TargetName = Literal["transformers", "onnxruntime", "gguf", "vllm"]
NOISY = ("transformers", "datasets", "timm", "httpx", "huggingface_hub", "torch.utils._pytree")
"""Loggers of libraries whose notices are not for the user of a command."""
TASK_NAMES: tuple[str, ...] = get_args(TaskName)
TARGET_NAMES: tuple[str, ...] = get_args(TargetName)

MOST = {"evaluations": 10**9, "minutes": 10**7, "batch": 10**6, "threads": 1024, "context": 10**8, "parallel": 10**6}
"""Of a search and of hardware. More is a slip of the pen, of which a clock, the memory or the system would make an
error of its own, or a sum beyond all integers."""

BATCH = 5
"""Sub-networks that a search asks for at a time."""
TRAINING_RATE, FINISHING_RATE = 5e-5, 1e-4
"""AdamW's learning rates, of a super-network's training and of a sub-network's alone."""

NEAREST = "nearest"
"""How weights are rounded that no finishing has rounded."""

LEARNED_RANGES = "learned_ranges"
"""Under which factors of ranges are a parameter of the model while they are trained, and stand in files."""
ADAPTERS = ("lora_A", "lora_B")
"""Parameters of a layer that are its LoRA adapter."""
