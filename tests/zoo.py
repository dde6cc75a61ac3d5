"""Small models of every family, randomly initialized: real architectures, sized so that a test takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import timm
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    ElectraConfig,
    ElectraForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from jointopt import SearchSpace, Supernet

SCHEMES = ("none", "W8A8", "W4A16", "FP8_DYNAMIC", "NVFP4", "MXFP4", "W8A16", "W4A16_ASYM")

_DECODER = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
}
_ENCODER = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 66,
    "num_labels": 3,
}
_DISTILLED = {
    "vocab_size": 96,
    "dim": 128,
    "hidden_dim": 256,
    "n_layers": 3,
    "n_heads": 4,
    "max_position_embeddings": 66,
    "num_labels": 3,
}
_IMAGE = {
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_labels": 5,
}
_CONVOLUTIONS = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [2, 3], "num_labels": 5}


def _timm_vit() -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=128, depth=3, num_heads=4, num_classes=5
    )


def _timm_resnet(block: str) -> nn.Module:
    kind = {"basic": timm.models.resnet.BasicBlock, "bottleneck": timm.models.resnet.Bottleneck}[block]
    channels = {"basic": (64, 64, 64, 128), "bottleneck": (16, 32, 32, 32)}[block]
    return timm.models.resnet.ResNet(kind, (1, 2, 2, 1), num_classes=5, channels=channels)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**_IMAGE)),
    "timm_vit": _timm_vit,
    "bert": lambda: BertForSequenceClassification(BertConfig(**_ENCODER)),
    "llama_tied": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER, tie_word_embeddings=True)),
    "llama_untied": lambda: LlamaForCausalLM(LlamaConfig(**_DECODER, tie_word_embeddings=False)),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(**{**_CONVOLUTIONS, "hidden_sizes": [64, 128]}, layer_type="bottleneck")
    ),
    "timm_resnet": lambda: _timm_resnet("bottleneck"),
}
"""The seven that every promise is tested on."""

RELATIVES: dict[str, Callable[[], nn.Module]] = {
    "deit": lambda: DeiTForImageClassification(DeiTConfig(**_IMAGE)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**_ENCODER, pad_token_id=1)),
    "electra": lambda: ElectraForSequenceClassification(ElectraConfig(**_ENCODER, embedding_size=64)),
    "distilbert": lambda: DistilBertForSequenceClassification(DistilBertConfig(**_DISTILLED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_DECODER, sliding_window=8)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**{k: v for k, v in _DECODER.items() if k != "head_dim"})),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_DECODER)),
    "resnet_basic": lambda: ResNetForImageClassification(ResNetConfig(**_CONVOLUTIONS, layer_type="basic")),
    "timm_resnet_basic": lambda: _timm_resnet("basic"),
}


def make(name: str, seed: int = 0) -> nn.Module:
    """The model, with weights (normalizations' too) that make its outputs differ visibly from input to input."""
    torch.manual_seed(seed)
    model = {**MODELS, **RELATIVES}[name]().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5)
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def batches(name: str, count: int = 2, size: int = 6, seed: int = 0) -> list[dict[str, Tensor]]:
    """Inputs as the model's forward takes them."""
    generator = torch.Generator().manual_seed(seed)
    if name in ("llama_tied", "llama_untied", "mistral", "qwen2", "qwen3"):
        return [{"input_ids": torch.randint(3, 96, (size, 16), generator=generator)} for _ in range(count)]
    if name in ("bert", "roberta", "electra", "distilbert"):
        return [_padded(size, generator) for _ in range(count)]
    key = "x" if name.startswith("timm") else "pixel_values"
    side = 32 if "resnet" in name else 16
    return [{key: torch.randn(size, 3, side, side, generator=generator)} for _ in range(count)]


def _padded(size: int, generator: torch.Generator) -> dict[str, Tensor]:
    mask = torch.ones(size, 16, dtype=torch.long)
    for row in range(size):
        mask[row, 16 - row :] = 0
    return {"input_ids": torch.randint(3, 96, (size, 16), generator=generator), "attention_mask": mask}


def supernet_of(
    name: str, schemes: Iterable[str] | None = None, model: nn.Module | None = None, latency: Any = None, **space: Any
) -> Supernet:
    """A calibrated super-network of the model, which is made where none is given."""
    model = model or make(name)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=schemes, **space), latency=latency)
    supernet.calibrate(batches(name))
    return supernet


def unquantized(supernet: Supernet, genome: np.ndarray) -> np.ndarray:
    """The same architecture, with every layer as it was given."""
    chosen = supernet.space.decode(genome)
    return supernet.space.encode({k: "none" if k.endswith(".precision") else v for k, v in chosen.items()})


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output = model(**batch)
    return output if isinstance(output, Tensor) else output.logits


def mean_square(name: str, seed: int) -> Callable[[nn.Module], float]:
    """A quality function: the mean square of a model's logits for one batch."""
    batch = batches(name, seed=seed)[0]

    def quality(model: nn.Module) -> float:
        return float(logits(model, batch).square().mean())

    return quality
