"""An exported model.onnx as a module: named tensors in, logits out, computed by ONNX Runtime.

Needs torch, NumPy and ONNX Runtime alone, so that a process without jointopt can load it.
"""

import json
import os

import numpy as np
import torch
from torch import nn


def saturates():
    """Whether ONNX Runtime's sums of two products of 8 bits saturate at 16 bits on this processor: with AVX2 or AVX-512
    and no VNNI, where it must be told to be exact (at some speed; with VNNI that would cost half of it)."""
    return torch.cpu._is_avx2_supported() and not torch.cpu._is_vnni_supported()


def session_of(model, threads):
    """A session of ONNX Runtime on the CPU, whose sums are exact.

    Args:
        model: the path of a file, or its bytes.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, threads
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class OnnxModel(nn.Module):
    """A session of ONNX Runtime behind the call of a torch model.

    What the file takes and the call leaves out is filled in: masks of ones, positions by the mask, an empty cache.
    Returns {"logits": ..., "present.0.key": ..., ...}, or a tensor where the model that was exported did.
    """

    def __init__(self, path, threads=None):
        super().__init__()
        self.session = session_of(os.fspath(path), threads or torch.get_num_threads())
        self.wanted = {each.name: each for each in self.session.get_inputs()}
        self.names = [each.name for each in self.session.get_outputs()]
        told = self.session.get_modelmeta().custom_metadata_map
        self.bare = told.get("returns") == "tensor"
        self.arguments = json.loads(told["arguments"]) if "arguments" in told else None
        self.fixed = json.loads(told.get("fixed", "{}"))
        self.placeholder = nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)

    def forward(self, *arguments, **inputs):
        inputs.update(zip(self.arguments or self.wanted, arguments, strict=False))
        for name, value in inputs.items() if self.arguments is not None else ():
            if name in self.wanted or value is None:
                continue
            tensor = isinstance(value, torch.Tensor)
            if tensor or name not in self.fixed or self.fixed[name] != value:
                found = f"a tensor of shape {tuple(value.shape)}" if tensor else repr(value)
                there = f"has it fixed as {self.fixed[name]!r}" if name in self.fixed else "has no such input"
                raise ValueError(f"{name}: found {found}; this export {there}")
        feed = {name: each.detach().numpy() for name, each in inputs.items() if name in self.wanted}
        outputs = [torch.from_numpy(each) for each in self.session.run(None, self.completed(feed))]
        return outputs[0] if self.bare else dict(zip(self.names, outputs, strict=True))

    def completed(self, feed):
        """The inputs, with what can be told from the others."""
        if "input_ids" not in feed:
            return feed
        batch, length = feed["input_ids"].shape
        caches = [each for name, each in self.wanted.items() if name.startswith("past_key_values")]
        for each in caches:
            feed.setdefault(each.name, np.zeros((batch, each.shape[1], 0, each.shape[3]), np.float32))
        past = feed[caches[0].name].shape[2] if caches else 0
        mask = feed.setdefault("attention_mask", np.ones((batch, past + length), np.int64))
        if "position_ids" in self.wanted:
            counted = np.maximum(mask.cumsum(-1) - 1, 0)[:, -length:]
            feed.setdefault("position_ids", counted)
        if "token_type_ids" in self.wanted:
            feed.setdefault("token_type_ids", np.zeros_like(feed["input_ids"]))
        return {name: value for name, value in feed.items() if name in self.wanted}
