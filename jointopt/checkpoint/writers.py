"""Target -> the module that writes exports for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from jointopt.checkpoint import gguf_writer, transformers_writer, vllm_writer
from jointopt.checkpoint.onnx import writer as onnx_writer


class Writer(Protocol):
    """What such a module has."""

    def check(self, model: Any, processor: Any = None) -> None:
        """Raises JointoptError for a model, whole or a sub-network, or a processor that it cannot write."""

    def write(self, place: Path, model: Any, processor: Any, example: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """Writes the model and its config into a folder.

        Args:
            processor: as `export` has it.
            example: a batch of the model's inputs.

        Returns:
            What the record keeps: "target", but for transformers; "stored", the bytes of all tensors, where these are
            not in safetensors. And how to load the folder.

        Raises:
            JointoptError: what `check` refuses, and what only the weights tell.
        """
        ...


WRITERS: dict[str, Writer] = {
    "transformers": transformers_writer,
    "onnxruntime": onnx_writer,
    "gguf": gguf_writer,
    "vllm": vllm_writer,
}
