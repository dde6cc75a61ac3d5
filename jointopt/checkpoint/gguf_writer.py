"""Writes a sub-network of the LLaMA family as a GGUF file, whose blocks hold the search's own codes and scales.

INT8 in groups of 32 is a Q8_0 block, INT4 in groups of 32 a Q4_0 block; their scales are float16, in which a bfloat16
scale is the same number (of what is no smaller than 2^-17). The file is written by the `gguf` package, llama.cpp's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jointopt.rebuilding.block_sizes import is_uniform, save_configs, sizes_of_blocks
from jointopt.rebuilding.structure import check_formats, check_language_model, quantized_layers
from jointopt.tokenizer_settings import settings_kept
from quant.errors import JointoptError
from quant.tensors import QuantizedTensor

MODEL = "model.gguf"
KINDS = ("llama", "mistral")
GROUP = 32
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    ("ByteLevel", True): "gpt-2",
    ("Digits", True, "ByteLevel", True): "smollm",
    ("Split", _WORDS % r"\p{N}{1,3}", "ByteLevel", False): "llama-bpe",
    ("Split", _WORDS % r"\p{N}", "ByteLevel", False): "qwen2",
}
"""How a tokenizer parts a text before its merges (of Digits whether each is alone, of ByteLevel whether it uses GPT-2's
expression): llama.cpp's name for it, without which it would make other tokens of the same text."""

SNIPPET = """For llama.cpp: `llama-cli -m {folder}/model.gguf`. It also rounds a layer's inputs to
blocks of INT8 while it runs, which is not scored here. transformers reads it into float32:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{folder}", gguf_file="model.gguf")
```"""


def write(place: Path, model: Any, processor: Any, example: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """model.gguf and config.json in a folder, see `writers.Writer`.

    Raises:
        JointoptError: a model of another family, blocks of unequal size, a number format or a tokenizer that GGUF has
            no place for, a scale that float16 cannot hold.
    """
    check(model, processor)
    import gguf

    writer = gguf.GGUFWriter(place / MODEL, "llama")
    _add_sizes(writer, model)
    _add_tokenizer(writer, processor, model.config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    stored = 0
    for name, values, kind in _tensors(model):
        path, _, last = name.rpartition(".")
        target = names.get_name(path)
        if target is None:
            raise JointoptError(f"target gguf: {name} has no name there")
        writer.add_tensor(
            f"{target}.{last}", values, raw_dtype=None if kind is None else gguf.GGMLQuantizationType[kind]
        )
        stored += values.nbytes
    try:
        with closing(writer):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    except OSError as error:
        if error.errno is not None:
            raise
        # numpy's, which counts what it wrote and keeps the system's reason to itself.
        raise OSError(f"of a tensor {error}, as on a full disk") from None
    save_configs(model, place)
    return {"target": "gguf", "stored": stored}, SNIPPET.format(folder=place.name)


def check(model: Any, processor: Any = None) -> None:
    """Raises JointoptError for a model that a GGUF file of the LLaMA architecture cannot describe, and for a tokenizer
    that llama.cpp has no word for."""
    check_language_model(model, "gguf", KINDS)
    if not is_uniform(model):
        raise JointoptError("target gguf: blocks differ in size; allowed: all alike (a space of depth and schemes)")
    config = model.config
    if getattr(config, "sliding_window", None) is not None:
        raise JointoptError("target gguf: found a sliding window of attention; allowed: none")
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default":
        raise JointoptError(f"target gguf: found rope_type {rope}; allowed: default")
    if config.hidden_act != "silu":
        raise JointoptError(f"target gguf: found hidden_act {config.hidden_act}; allowed: silu")
    biased = next((name for name, _ in model.model.layers.named_parameters() if name.endswith(".bias")), None)
    if biased is not None:
        raise JointoptError(f"target gguf: found layers.{biased}; allowed: layers without biases")
    check_formats(model, "gguf")
    if processor is not None:
        _parted(processor)


def _add_sizes(writer: Any, model: Any) -> None:
    config = model.config
    sizes = sizes_of_blocks(model, config)[0]
    head_dim = model.get_submodule("model.layers.0.self_attn").head_dim
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_block_count(len(model.get_submodule("model.layers")))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)


def _parted(processor: Any) -> tuple[dict[str, Any], str]:
    """A tokenizer's content, and llama.cpp's name for how it parts texts."""
    backend = getattr(processor, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else {"model": {}}
    if content["model"].get("type") != "BPE" or "ByteLevel" not in json.dumps(content.get("pre_tokenizer")):
        found = content["model"].get("type", type(processor).__name__)
        raise JointoptError(f"target gguf: found a {found} tokenizer; allowed: byte-level BPE, as GPT-2's")
    parted = PRE_TOKENIZERS.get(_parting(content["pre_tokenizer"]))
    if parted is None or (parted == "llama-bpe") != bool(content["model"].get("ignore_merges")):
        allowed = ", ".join(PRE_TOKENIZERS.values())
        raise JointoptError(f"target gguf: found a tokenizer that parts texts in a way of its own; allowed: {allowed}")
    return content, parted


def _add_tokenizer(writer: Any, processor: Any, rows: int) -> None:
    """Of byte-level BPE, with its merges; none where there is no processor. The file's list of tokens is as long as the
    embedding has rows: llama.cpp refuses another. Rows without a token are unused ones."""
    if processor is None:
        writer.add_tokenizer_model("no_vocab")
        return
    content, parted = _parted(processor)
    words = {**content["model"]["vocab"], **{each["content"]: each["id"] for each in content["added_tokens"]}}
    special = {each["id"]: each["special"] for each in content["added_tokens"]}
    import gguf

    named = {number: word for word, number in words.items()}
    last = max(named)
    if last >= rows:
        raise JointoptError(f"target gguf: token {named[last]!r} is number {last}; the embedding has {rows} rows")
    ordered = [named.get(number, f"[PAD{number}]") for number in range(rows)]
    kinds = {True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED, None: gguf.TokenType.NORMAL}
    types = [kinds[special.get(n)] if n in named else gguf.TokenType.UNUSED for n in range(rows)]
    merges = [each if isinstance(each, str) else " ".join(each) for each in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(parted)
    writer.add_token_list(ordered)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name in ("bos", "eos", "pad"):
        number = getattr(processor, f"{name}_token_id", None)
        if number is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if chat := getattr(processor, "chat_template", None):
        several = isinstance(chat, dict)
        writer.add_chat_template([{"name": k, "template": v} for k, v in chat.items()] if several else chat)
    with settings_kept(processor):
        ends = processor("a")["input_ids"]
    writer.add_add_bos_token(ends[0] == processor.bos_token_id)
    writer.add_add_eos_token(ends[-1] == processor.eos_token_id)


def _parting(pre_tokenizer: dict[str, Any]) -> tuple[Any, ...]:
    """A pre-tokenizer as a key of PRE_TOKENIZERS."""
    found: list[Any] = []
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        found.append(step["type"])
        if step["type"] == "ByteLevel":
            found.append(step["use_regex"] if not step["add_prefix_space"] else "prefix")
        elif step["type"] == "Digits":
            found.append(step["individual_digits"])
        elif step["type"] == "Split":
            found.append(step["pattern"].get("Regex"))
    return tuple(found)


def _tensors(model: Any) -> Iterator[tuple[str, np.ndarray, str | None]]:
    """(name in transformers, values or blocks, kind of block), tied ones once."""
    layers = quantized_layers(model)
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    for name, tensor in model.state_dict().items():
        path, _, last = name.rpartition(".")
        if tied and path == "lm_head":
            continue
        if last == "weight" and path in layers:
            blocks, kind = _blocks(layers[path].quantized, path)
            yield name, _reordered(model, path, blocks), kind
        elif tensor.dtype == torch.bfloat16:
            yield name, _reordered(model, path, tensor.cpu().view(torch.uint8).numpy()), "BF16"
        else:
            yield name, _reordered(model, path, tensor.cpu().float().numpy()), None


def _blocks(quantized: QuantizedTensor, path: str) -> tuple[np.ndarray, str]:
    """[rows, bytes]: of each group its scale, float16, then its codes."""
    rows, groups = quantized.scale.shape[0], quantized.scale.shape[-1]
    scale = quantized.scale.float().cpu().reshape(rows, groups, 1)
    stored = scale.to(torch.float16)
    if (lost := scale[stored.float() != scale]).numel():
        raise JointoptError(
            f"target gguf: {path}: a scale of {float(lost[0]):.3g} is none of float16; allowed: none or fewer bits"
        )
    codes = quantized.codes.cpu().reshape(rows, groups, GROUP)
    if quantized.format.bits == 4:
        low, high = (codes[..., :16] + 8).to(torch.uint8), (codes[..., 16:] + 8).to(torch.uint8)
        body, kind = low | (high << 4), "Q4_0"
    else:
        body, kind = codes.to(torch.int8).view(torch.uint8), "Q8_0"
    head = stored.view(torch.uint8).reshape(rows, groups, 2)
    return torch.cat((head, body), -1).reshape(rows, -1).contiguous().numpy(), kind


def _reordered(model: Any, path: str, rows: np.ndarray) -> np.ndarray:
    """Rows of queries and keys in llama.cpp's order: the two numbers that are rotated together are neighbours."""
    if not path.endswith(("q_proj", "k_proj")):
        return rows
    head_dim = model.get_submodule(path.rpartition(".")[0]).head_dim
    parted = rows.reshape(-1, 2, head_dim // 2, *rows.shape[1:])
    return np.ascontiguousarray(parted.swapaxes(1, 2).reshape(rows.shape))


def gguf_bytes(path: Path) -> int:
    """Bytes of all tensors in a GGUF file."""
    import gguf

    return sum(int(each.n_bytes) for each in gguf.GGUFReader(path).tensors)
