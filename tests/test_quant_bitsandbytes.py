"""bitsandbytes' formats: native arithmetic, tested against its kernels bit for bit, and exports that it loads."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import jointopt
from jointopt import Gene, JointoptError, SearchSpace, Supernet, installed, load_config
from jointopt.rebuilding.structure import by_bitsandbytes
from quant.formats import SCHEMES
from quant.kernels import fake_quantize_activation, quantize
from quant.layers import llm_int8_linear
from quant.packing import packed_tensors, storage_bytes
from tests.zoo import batches, logits, make, mean_square

FOUR_BIT = {"BNB_NF4": "nf4", "BNB_FP4": "fp4"}
NAMES = ("BNB_INT8", *FOUR_BIT)
DTYPES = [torch.float32, torch.bfloat16]


def weight_of(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Of several magnitudes, with zeros and one block of nothing else."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 2, rows)[:, None]
    weight[0, :64] = 0
    weight[torch.rand(weight.shape, generator=generator) < 0.1] *= 1e-3
    return weight.to(dtype)


@pytest.mark.parametrize("name", FOUR_BIT)
@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 8), blocks=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_four_bit_weights_are_bitsandbytes_own_to_the_bit(name, dtype, seed, rows, blocks):
    weight = weight_of(rows, 64 * blocks, seed, dtype)
    packed, state = functional.quantize_4bit(weight, quant_type=FOUR_BIT[name])
    ours = quantize(weight, SCHEMES[name].weights)
    tensors = packed_tensors(ours, SCHEMES[name], dtype=dtype)
    expected = {"weight": packed, **{f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}}
    assert set(tensors) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(tensors[key], tensor), key
    assert torch.equal(ours.dequantize(dtype), functional.dequantize_4bit(packed, state))


@pytest.mark.parametrize("name", FOUR_BIT)
def test_halfway_points_and_zeros_take_the_codes_of_bitsandbytes(name):
    code = functional.get_4bit_type(FOUR_BIT[name], "cpu")
    held = code.sort().values
    points = torch.cat((held, (held[1:] + held[:-1]) / 2, torch.tensor([-0.0, 1e-6, -1e-6, 1e-30])))
    points = torch.cat((points, torch.ones(64 - len(points))))[None]
    around = torch.cat((points, points.nextafter(torch.tensor(2.0)), points.nextafter(torch.tensor(-2.0)))).clamp(-1, 1)
    packed, _ = functional.quantize_4bit(around, quant_type=FOUR_BIT[name])
    ours = packed_tensors(quantize(around, SCHEMES[name].weights), SCHEMES[name])
    assert torch.equal(ours["weight"], packed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_llm_int8_weights_are_bitsandbytes_own_to_the_bit(dtype):
    weight = weight_of(12, 48, dtype=dtype)
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    ours = packed_tensors(quantize(weight, SCHEMES["BNB_INT8"].weights), SCHEMES["BNB_INT8"])
    assert torch.equal(ours["weight"], codes) and torch.equal(ours["SCB"], largest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outliers", [False, True])
@pytest.mark.parametrize("shape", [(1, 96), (7, 96), (2, 5, 96)])
def test_llm_int8_layers_compute_as_bitsandbytes_own_to_the_bit(dtype, outliers, shape):
    torch.manual_seed(0)
    x = torch.randn(shape).to(dtype)
    x[..., 3] = 0
    if outliers:
        x[..., 17], x[..., 40] = 6.0, -11.5
    linear = torch.nn.Linear(96, 40).to(dtype)
    theirs = bitsandbytes.nn.Linear8bitLt(96, 40, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(linear.state_dict())
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        expected = theirs.to("cpu").eval()(x)
        ours = llm_int8_linear(x, quantize(linear.weight, SCHEMES["BNB_INT8"].weights), linear.bias)
    assert torch.equal(ours, expected.reshape(ours.shape))


def test_the_input_that_llm_int8_holds_is_what_its_layer_multiplies():
    torch.manual_seed(0)
    x, weight = torch.randn(6, 128), quantize(torch.randn(20, 128), SCHEMES["BNB_INT8"].weights)
    x[2, 5] = 30.0
    held = fake_quantize_activation(x, SCHEMES["BNB_INT8"].activations)
    assert torch.equal(held[:, 5], x[:, 5])
    apart = held @ weight.dequantize().T - llm_int8_linear(x, weight, None)
    assert apart.abs().max() < 1e-4 * (held @ weight.dequantize().T).abs().max()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_size_is_that_of_the_packed_tensors(name, dtype):
    weight = weight_of(12, 128, dtype=dtype)
    ours = quantize(weight, SCHEMES[name].weights)
    tensors = packed_tensors(ours, SCHEMES[name], dtype=dtype)
    assert storage_bytes(SCHEMES[name], (12, 128), weight.element_size()) == sum(t.nbytes for t in tensors.values())


RELOAD = """
import json, sys, warnings, torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
kind, folders, batch = getattr(transformers, sys.argv[1]), json.loads(sys.argv[2]), load_file(sys.argv[3])
outputs = {}
for folder in folders:
    model = kind.from_pretrained(folder, trust_remote_code=True).eval()
    names = {type(module).__name__ for module in model.modules()}
    assert "Linear4bit" in names or "Linear8bitLt" in names
    for module in model.modules():  # else a CPU with AVX512-BF16 computes 4-bit layers in bfloat16
        module.support_avx512bf16_for_cpu = False
    with torch.no_grad():
        outputs[folder] = model(**batch).logits.contiguous()
assert not {"jointopt", "search_spaces", "quant"} & set(sys.modules)
save_file(outputs, sys.argv[4])
"""
AUTO = {"llama_tied": "AutoModelForCausalLM", "distilbert": "AutoModelForSequenceClassification"}


@pytest.mark.slow
@pytest.mark.parametrize("model", AUTO)
def test_view_extracted_and_reloaded_by_bitsandbytes_are_one(model, tmp_path):
    batch, expected = batches(model, seed=1)[0], {}
    for name in NAMES:
        supernet = Supernet(make(model), SearchSpace.for_model(make(model), schemes=["none", name], depth=[2, 3]))
        supernet.calibrate(batches(model))
        smallest = supernet.space.smallest
        for at, genome in enumerate((smallest, supernet.space.sample(1, seed=0)[0])):
            with supernet.active(genome) as view:
                seen = logits(view, batch)
            assert torch.equal(logits(supernet.extract(genome), batch), seen)
            folder = jointopt.export(supernet, genome, tmp_path / f"{name}-{at}")
            assert not (folder / "modeling_jointopt.py").exists()
            tensors = load_file(folder / "model.safetensors").values()
            assert supernet.costs(genome)["size"] == sum(t.numel() * t.element_size() for t in tensors)
            expected[str(folder)] = seen
    save_file(batch, tmp_path / "batch.safetensors")
    paths = [AUTO[model], json.dumps(list(expected)), str(tmp_path / "batch.safetensors"), str(tmp_path / "outputs")]
    subprocess.run([sys.executable, "-I", "-c", RELOAD, *paths], check=True, capture_output=True, cwd=tmp_path)
    for folder, output in load_file(tmp_path / "outputs").items():
        torch.testing.assert_close(output, expected[folder], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_what_a_processor_computes_in_bfloat16_is_verified_by_its_metrics_too(tmp_path):
    model, quality = make("bert"), mean_square("bert", seed=2)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["BNB_NF4"], preset="fixed"))
    supernet.calibrate(batches("bert"))
    study = jointopt.search(supernet, quality, evaluations=1)
    folder = jointopt.export(supernet, supernet.space.largest, tmp_path / "small", study=study)
    found = jointopt.verify(folder, quality=quality)
    assert found.ok and found.metrics, found.differences
    assert not jointopt.verify(folder, quality=lambda model: 1.1 * quality(model)).ok


@pytest.mark.slow
def test_blocks_of_unequal_size_load_too_and_are_verified(tmp_path):
    space = SearchSpace.for_model(make("llama_untied"), schemes=["none", "BNB_NF4"], mlp=[128, 256])
    supernet = Supernet(make("llama_untied"), space)
    supernet.calibrate(batches("llama_untied"))
    chosen = {**space.decode(space.smallest), "block1.mlp": 256}
    genome = supernet.space.encode(chosen)
    folder = jointopt.export(supernet, genome, tmp_path / "small")
    assert (folder / "modeling_jointopt.py").exists()
    result = jointopt.verify(folder)
    assert result.ok, result.differences
    assert result.size == supernet.costs(genome)["size"]


def test_a_space_that_mixes_bitsandbytes_with_other_formats_is_refused():
    for schemes in (["W8A8", "BNB_NF4"], ["none", "BNB_NF4", "BNB_FP4"]):
        with pytest.raises(JointoptError, match="space.schemes: found .*whole models; allowed beside BNB_.*: none"):
            SearchSpace.for_model(make("bert"), schemes=schemes)
    genes = [Gene("block0.up.precision", ("none", "BNB_NF4")), Gene("block1.up.precision", ("none", "W8A8"))]
    with pytest.raises(JointoptError, match="block1.up.precision: found W8A8, and BNB_NF4 in block0.up.precision"):
        Supernet(make("bert"), SearchSpace(genes))


def test_a_sub_network_that_mixes_them_is_refused_with_the_layers_name(tmp_path):
    supernet = Supernet(make("bert"), SearchSpace.for_model(make("bert"), schemes=["none", "BNB_NF4"], preset="fixed"))
    model = supernet.extract(supernet.space.smallest)
    odd = next(m for path, m in model.named_modules() if path.endswith("layer.1.intermediate.dense"))
    odd.scheme = SCHEMES["W8A8"]
    with pytest.raises(JointoptError, match=r"export: bert.encoder.layer.1.intermediate.dense is W8A8 and .* BNB_NF4"):
        by_bitsandbytes(model)


def test_a_weight_that_float16_cannot_hold_is_refused():
    with pytest.raises(JointoptError, match="beyond 65504, the largest of LLM.int8's float16"):
        quantize(torch.tensor([[1.0, 7e4]]), SCHEMES["BNB_INT8"].weights)


def test_what_bitsandbytes_cannot_hold_is_refused_by_layer():
    with pytest.raises(JointoptError, match="no layer of the model can take BNB_INT8"):
        SearchSpace.for_model(make("resnet"), schemes=["BNB_INT8"])
    space = SearchSpace.for_model(make("llama_tied"), schemes=["none", "BNB_NF4"])
    assert not [name for name in space.names if "embed" in name and name.endswith("precision")]
    embedding = SearchSpace([Gene("embedding.precision", ("none", "BNB_NF4"))])
    with pytest.raises(JointoptError, match="model.embed_tokens: BNB_NF4 is bitsandbytes', .* found Embedding"):
        Supernet(make("llama_tied"), embedding)


def test_a_model_that_transformers_does_not_load_is_offered_none_of_its_formats():
    said = "BNB_NF4, which bitsandbytes has for models of transformers, and the model is a timm VisionTransformer"
    with pytest.raises(JointoptError, match=f"space.schemes: found {said}"):
        SearchSpace.for_model(make("timm_vit"), schemes=["none", "BNB_NF4"])
    own = SearchSpace([Gene("block0.up.precision", ("none", "BNB_NF4"))])
    with pytest.raises(JointoptError, match=f"block0.up.precision: found {said}"):
        Supernet(make("timm_vit"), own)


def test_without_bitsandbytes_verifying_and_configs_say_what_to_install(tmp_path, monkeypatch):
    supernet = Supernet(make("bert"), SearchSpace.for_model(make("bert"), schemes=["none", "BNB_NF4"], preset="fixed"))
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small")
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    with pytest.raises(JointoptError, match=r"holds BNB_NF4; found no .* install 'jointopt\[bitsandbytes\]'"):
        jointopt.verify(folder)
    text = "model: m\ntask: causal-lm\ndata: {calibrate: a, evaluate: b}\noutput: x\nspace: {schemes: [BNB_NF4]}\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(JointoptError, match=r"space.schemes: found BNB_NF4, .*jointopt\[bitsandbytes\]"):
        load_config(tmp_path / "config.yaml")
