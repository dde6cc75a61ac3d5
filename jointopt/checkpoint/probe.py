"""Inputs that an export is compared by: those of a record, with the sub-network's outputs for them, and made again."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from jointopt.batches import on_device, sample_count, without_labels
from jointopt.outputs import first_output, logits_or_states
from jointopt.rebuilding.timm_recipe import by_library
from quant.errors import DOES_NOT_RUN, JointoptError, in_one_line
from quant.formats import dtype_name

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

PROBED = 8
"""Samples of a probe from a seed: a classifier's outputs for one may all be near 0, by chance."""


def example_of(supernet: Supernet) -> dict[str, Any]:
    """The first batch that the super-network was calibrated with; before that what its family declares."""
    if not supernet.samples and supernet.family.example is not None:
        return dict(supernet.family.example(supernet.model))
    return without_labels(supernet.samples[0])


def probe_of(supernet: Supernet, model: Any) -> dict[str, Any] | None:
    """Inputs from a fixed seed, and the outputs of the sub-network for them: what any reload must give again.

    Without an example in the family, and of a model of no library, the inputs are a calibration sample; None where that
    has other things than tensors, numbers and text.
    """
    if supernet.family.example is None or not by_library(model):
        return _sample_probe(supernet, model)
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for name, tensor in supernet.family.example(supernet.model).items():
        if tensor.is_floating_point():
            inputs[name] = torch.randn(PROBED, *tensor.shape[1:], generator=generator, dtype=torch.float32)
        else:
            # Without padding a decoder that classifies takes one text at a time.
            shape = 1 if model.config.pad_token_id is None else PROBED, min(16, tensor.shape[1])
            inputs[name] = torch.randint(3, model.config.vocab_size, shape, generator=generator)
    first = next(model.parameters())
    with torch.no_grad():
        moved = {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
        outputs = probed(model(**moved))
    described = {
        k: {"normal": list(v.shape)} if v.is_floating_point() else {"integers": v.tolist()} for k, v in inputs.items()
    }
    return {"inputs": described, "outputs": outputs.tolist()}


def _sample_probe(supernet: Supernet, model: Any) -> dict[str, Any] | None:
    """A probe with one calibration sample, since a batch may be large. "largest" is the largest probed output of the
    sample's whole batch, since one sample's outputs may all be near 0."""
    together = example_of(supernet)
    example, count, described = dict(together), sample_count(together), dict[str, dict[str, Any]]()
    for name, value in together.items():
        if isinstance(value, Tensor):
            cut = value[:1] if value.dim() and len(value) == count else value
            example[name] = cut = cut.cpu().contiguous()
            raw = base64.b64encode(cut.reshape(-1).view(torch.uint8).numpy().tobytes()).decode()
            described[name] = {"bytes": raw, "dtype": dtype_name(cut.dtype), "shape": list(cut.shape)}
        elif isinstance(value, bool | int | float | str | None):
            described[name] = {"value": value}
        else:
            return None
    found = []
    for inputs, told in ((example, "one calibration sample"), (together, "a calibration batch")):
        try:
            with torch.no_grad():
                output = model(**on_device(inputs, next(model.parameters()).device))
        except DOES_NOT_RUN as error:
            raise JointoptError(
                f"export: {type(model).__name__} does not run on {told}: {in_one_line(error)}"
            ) from error
        found.append(probed(output))
    return {"inputs": described, "outputs": found[0].tolist(), "largest": float(found[1].abs().max())}


def probe_inputs(probe: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The inputs that a record's probe describes, those from a seed as the model's own numbers."""
    generator = torch.Generator().manual_seed(0)

    def made(each: Mapping[str, Any]) -> Any:
        if "normal" in each:
            return torch.randn(each["normal"], generator=generator, dtype=torch.float32).to(dtype)
        if "integers" in each:
            return torch.tensor(each["integers"])
        if "bytes" in each:
            raw = torch.frombuffer(bytearray(base64.b64decode(each["bytes"])), dtype=getattr(torch, each["dtype"]))
            return raw.reshape(each["shape"])
        return each["value"]

    return {name: made(each) for name, each in probe["inputs"].items()}


def probed(output: Any) -> Tensor:
    """Up to 64 of a model's outputs for the probe, float32, on the CPU."""
    first = first_output(output)
    tensor = logits_or_states(first)
    if tensor is None and isinstance(first, Mapping):
        tensor = next(iter(first.values()), None)
    if not isinstance(tensor, Tensor):
        raise JointoptError(
            f"export: the model returns {type(output).__name__}; allowed: a tensor, or a tuple or mapping that begins "
            "with one"
        )
    return tensor.detach().float().cpu().flatten()[-64:]
