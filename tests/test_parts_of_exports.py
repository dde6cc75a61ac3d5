"""An export loaded as another class than it was scored as: its base model alone, or with a head for other labels."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertModel

import jointopt
from tests.zoo import batches, logits, make, supernet_of

PLAIN = ["embedding", "head"]
EXPORTS = {
    "bert": {"schemes": ["W4A16", "W8A8"], "preset": "fixed", "unquantized": ["embedding"]},
    "vit": {"schemes": ["W8A8", "FP8_DYNAMIC"], "preset": "fixed", "unquantized": ["embedding"]},
    "llama_untied": {"schemes": ["W4A16", "W8A8_STATIC"], "preset": "fixed", "unquantized": PLAIN},
    "electra": {"schemes": ["none", "W8A8", "W4A16_ASYM"]},
    "roberta": {"schemes": ["none"]},
    "llama_tied": {"schemes": ["none", "W8A8", "W4A16"], "caches": ["INT4"]},
    "qwen3": {"schemes": ["BNB_INT8"], "mlp": [128, 256], "unquantized": PLAIN},
    "distilbert": {"schemes": ["BNB_INT8"], "preset": "fixed", "unquantized": ["embedding", "head", "block0.qkv"]},
    "resnet": {"schemes": ["none", "W8A8", "W4A16"]},
}
STOCK = ("bert", "vit", "llama_untied", "distilbert")

BASE_MODELS = """
import json, sys, tempfile
import torch, transformers
from safetensors.torch import load_file, save_file

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
found = {}

def states(place, kind=transformers.AutoModel):
    model = kind.from_pretrained(place, trust_remote_code=TRUSTED).eval()
    with torch.no_grad():
        model(**batch)  # compressed-tensors unpacks where the whole model runs
        return model, model.base_model(**batch)[0].contiguous()

for name, (folder, head, TRUSTED) in json.loads(sys.argv[1]).items():
    batch = load_file(f"{folder}.batch")
    model, found[name] = states(folder)
    if hasattr(model, "hf_quantizer") and "bitsandbytes" in str(model.config.quantization_config):
        continue  # it cannot be saved
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        found[f"{name} saved"] = states(place)[1]
        found[f"{name} under a new head"] = states(place, getattr(transformers, head))[1]
        states(folder, getattr(transformers, head))[0].save_pretrained(place)
        found[f"{name} of a saved one with its head"] = states(place)[1]
assert not {"jointopt", "search_spaces", "quant"} & set(sys.modules)
save_file(found, sys.argv[2])
"""


def auto_of(name: str) -> str:
    if name in ("vit", "resnet"):
        return "AutoModelForImageClassification"
    return "AutoModelForCausalLM" if name.startswith(("llama", "qwen")) else "AutoModelForSequenceClassification"


def states(model, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.base_model(**batch)[0].contiguous()


def test_automodel_has_the_hidden_states_of_what_was_scored(tmp_path):
    folders, expected = {}, {}
    for name, options in EXPORTS.items():
        supernet = supernet_of(name, **options)
        genome = supernet.space.sample(1, seed=1)[0]
        folder = jointopt.export(supernet, genome, tmp_path / name)
        assert (folder / "modeling_jointopt.py").exists() != (name in STOCK)
        save_file(batch := batches(name, seed=2)[0], tmp_path / f"{name}.batch")
        folders[name] = (str(folder), auto_of(name), name not in STOCK)
        expected[name] = states(supernet.extract(genome), batch)
    command = [sys.executable, "-I", "-c", BASE_MODELS, json.dumps(folders), str(tmp_path / "found")]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    for key, found in load_file(tmp_path / "found").items():
        torch.testing.assert_close(found, expected[key.split()[0]], atol=1e-4, rtol=1e-4, msg=key)


def test_a_base_model_that_was_exported_loads_under_a_head(tmp_path):
    supernet = supernet_of(
        "bert", ["W4A16"], BertModel(make("bert").config).eval(), preset="fixed", unquantized=["embedding"]
    )
    folder = jointopt.export(supernet, supernet.space.largest, tmp_path / "out")
    batch = batches("bert", seed=2)[0]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    logits(model, batch)
    torch.testing.assert_close(states(model, batch), states(supernet.extract(supernet.space.largest), batch))


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_other_labels_get_a_new_head_in_place_of_a_quantized_one(name, tmp_path):
    supernet = supernet_of(name, ["none", "W8A16"])
    genome = supernet.space.encode({**supernet.space.decode(supernet.space.smallest), "head.precision": "W8A16"})
    folder = jointopt.export(supernet, genome, tmp_path / "out")
    spec = json.loads((folder / "config.json").read_text())["jointopt"]
    head = next(path for path in spec["quantized"] if path.startswith("classifier"))
    assert (head in spec["shapes"]) == (name == "resnet")  # whose last stage is narrower than its config says
    auto, batch = getattr(transformers, auto_of(name)), batches(name, seed=2)[0]
    options = {"num_labels": 9, "trust_remote_code": True}
    model, told = auto.from_pretrained(folder, ignore_mismatched_sizes=True, output_loading_info=True, **options)
    assert f"{head}.weight" in told["missing_keys"]
    assert f"{head}.bias" in {key for key, *_ in told["mismatched_keys"]}
    found = logits(model.eval(), batch)
    assert found.shape == (6, 9) and found.isfinite().all()
    torch.testing.assert_close(states(model, batch), states(supernet.extract(genome), batch))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        auto.from_pretrained(folder, **options)
