"""Exports that are fine-tuned further: what is not packed gets the gradients it had in the sub-network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import jointopt
from jointopt.checkpoint.reload import load_model
from tests.zoo import batches, logits, supernet_of


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.requires_grad_(True)
    output = model(**batch)
    (output if torch.is_tensor(output) else output.logits).pow(2).mean().backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def check_gradients(place: Path, name: str, **options: object) -> None:
    supernet = supernet_of(name, **options)
    genome = supernet.space.sample(1, seed=3)[0]
    model, batch = load_model(str(jointopt.export(supernet, genome, place / "export"))), batches(name)[0]
    expected, found = gradients(supernet.extract(genome), batch), gradients(model, batch)
    assert set(found) == {name for name, each in model.named_parameters() if each.is_floating_point()}
    for path, gradient in found.items():
        torch.testing.assert_close(gradient, expected[path], rtol=1e-4, atol=1e-6 * float(expected[path].abs().max()))


@pytest.mark.parametrize("name", ["bert", "vit", "llama_untied", "resnet_basic", "timm_vit"])
@pytest.mark.parametrize("scheme", ["W8A8", "W8A8_STATIC"])
def test_gradients_pass_where_inputs_are_rounded(tmp_path, name, scheme):
    check_gradients(tmp_path, name, schemes=["W4A16_ASYM", scheme])


@pytest.mark.parametrize("cache", ["INT8", "FP4", "X_INT4"])
def test_gradients_pass_through_a_quantized_cache(tmp_path, cache):
    check_gradients(tmp_path, "llama_untied", schemes=["none"], caches=[cache])


@pytest.mark.parametrize("cache", ["INT8", "FP8"])
def test_tokens_after_others_in_a_quantized_cache_get_gradients(tmp_path, cache):
    supernet = supernet_of("llama_untied", schemes=["none"], caches=[cache])
    model = load_model(str(jointopt.export(supernet, supernet.space.largest, tmp_path / "export")))
    tokens = batches("llama_untied")[0]["input_ids"]
    with torch.no_grad():
        past = model(tokens[:, :4], use_cache=True).past_key_values
    output = model(tokens[:, 4:], past_key_values=past).logits
    with torch.no_grad():
        torch.testing.assert_close(output, logits(model, {"input_ids": tokens})[:, 4:], rtol=1e-4, atol=1e-4)
    output.pow(2).mean().backward()
    for layer in model.model.layers:
        assert all(float(each.weight.grad.abs().max()) > 0 for each in (layer.self_attn.k_proj, layer.self_attn.v_proj))


def test_the_trainer_knows_a_language_model_and_shifts_its_labels(tmp_path):
    supernet = supernet_of("llama_untied", schemes=["W4A16_ASYM"])
    model = load_model(str(jointopt.export(supernet, supernet.space.smallest, tmp_path / "export")))
    tokens = batches("llama_untied")[0]["input_ids"]
    with torch.no_grad():
        expected = float(model(input_ids=tokens, labels=tokens).loss)
    args = TrainingArguments(
        str(tmp_path / "runs"), label_smoothing_factor=1e-9, report_to=[], use_cpu=True, per_device_eval_batch_size=99
    )
    trainer = Trainer(model, args, eval_dataset=[{"input_ids": row, "labels": row} for row in tokens])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-4)
