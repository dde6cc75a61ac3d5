"""Quantizes a model by another tool, as its documentation says, and hands back what the weights then stand for.

    python scripts/bench/neighbours.py JOB.json

Run by `quantizers.py` in an environment of the tool's own; nothing of jointopt is imported here. The job names a
model's folder, the batches to calibrate with, the layers and their format (as compressed-tensors writes it) and where
to put the dequantized state dict, the seconds that quantizing took, and how many layers' weights changed.
"""

import json
import sys
import time
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def load(folder, **options):
    kind = getattr(transformers, json.loads((Path(folder) / "config.json").read_text())["architectures"][0])
    return kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, **options).eval()


def read_batches(path):
    """The list of dicts that was saved under NUMBER.NAME."""
    found = {}
    for name, tensor in load_file(path).items():
        number, _, key = name.partition(".")
        found.setdefault(int(number), {})[key] = tensor
    return [found[number] for number in sorted(found)]


def layer_schemes(job):
    """Path -> (weights, activations or None), dicts in compressed-tensors' words."""
    groups = job["config_groups"].values()
    return {path: (group["weights"], group["input_activations"]) for group in groups for path in group["targets"]}


def gptq(job, batches):
    from llmcompressor.modifiers.gptq import GPTQModifier

    return oneshot(job, batches, [GPTQModifier(config_groups=compressed_groups(job))])


# What a ViT's norms feed, which AWQModifier does not know; BERT has its norms behind the residual, where none can be.
PRE_NORM = [
    {"smooth_layer": "re:.*layernorm_before$", "balance_layers": ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]},
    {"smooth_layer": "re:.*layernorm_after$", "balance_layers": ["re:.*fc1$"]},
]


def awq(job, batches):
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda tensor: tensor  # AWQModifier pins memory without asking for a GPU
    mappings = None if job["causal"] else PRE_NORM
    recipe = [AWQModifier(mappings=mappings), QuantizationModifier(config_groups=compressed_groups(job))]
    return oneshot(job, batches, recipe)


def compressed_groups(job):
    from compressed_tensors.quantization import QuantizationScheme

    return {name: QuantizationScheme(**group) for name, group in job["config_groups"].items()}


def oneshot(job, batches, recipe):
    """llm-compressor's entry point; the layers' weights are then rounded by the scales that it found."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from llmcompressor import oneshot as run
    from torch.utils.data import DataLoader

    model = load(job["folder"])
    pipeline = "sequential" if job["causal"] else "basic"
    started = time.perf_counter()
    run(model=model, dataset=DataLoader(batches, batch_size=None), recipe=recipe, pipeline=pipeline)
    seconds = time.perf_counter() - started
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None and hasattr(module, "weight_scale"):
            scale, zero_point = module.weight_scale, getattr(module, "weight_zero_point", None)
            global_scale = getattr(module, "weight_global_scale", None)
            module.weight.data = fake_quantize(
                module.weight.data, scale, zero_point, scheme.weights, global_scale=global_scale
            )
    return model, seconds


def autoround(job, batches):
    from auto_round import AutoRound
    from auto_round.schemes import QuantizationScheme

    model = load(job["folder"])
    layers = layer_schemes(job)
    named = {path: autoround_scheme(*formats) for path, formats in layers.items()}
    usual = next(iter(named.values()))
    plain = {"bits": 16, "act_bits": 16, "data_type": "float"}
    config = {
        path: named.get(path, plain)
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and named.get(path) != usual
    }
    texts = "input_ids" in batches[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["folder"]) if texts else None
    samples = padded(batches)
    tuned = AutoRound(
        model,
        tokenizer=tokenizer,
        scheme=QuantizationScheme.from_dict(usual),
        layer_config=config,
        dataset=samples,
        nsamples=sum(len(next(iter(batch.values()))) for batch in batches),
        seqlen=samples[0]["input_ids"].shape[1] if texts else 1,
        batch_size=8,
        iters=job["iterations"],
        device_map="cpu",
    )
    started = time.perf_counter()
    model, _ = tuned.quantize()
    seconds = time.perf_counter() - started
    for path in layers:
        around = model.get_submodule(path)
        if hasattr(around, "orig_layer"):  # what rounds the layer's inputs, which who scores it does
            model.set_submodule(path, around.orig_layer)
    return model, seconds


def padded(batches):
    """All of one length, as auto-round wants them, the masks 0 where nothing was."""
    longest = max(next(iter(batch.values())).shape[-1] for batch in batches)
    pad = torch.nn.functional.pad
    return [{k: pad(v, (0, longest - v.shape[-1])) for k, v in batch.items()} for batch in batches]


def autoround_scheme(weights, activations):
    """Of compressed-tensors' words, auto-round's."""
    words = {"bits": weights["num_bits"], "sym": weights["symmetric"], "data_type": autoround_type(weights)}
    words["group_size"] = weights["group_size"] or -1
    if activations is not None:
        words.update(act_bits=activations["num_bits"], act_sym=True, act_data_type=autoround_type(activations))
        words.update(act_group_size=activations["group_size"] or -1, act_dynamic=True)
    return words


def autoround_type(format):
    if format["type"] == "int":
        return "int"
    if format["num_bits"] == 8:
        return "fp"
    return "nv_fp" if format["group_size"] == 16 else "mx_fp"


def torchao(job, batches):
    from torchao.quantization import quantize_

    model = load(job["folder"])
    layers = layer_schemes(job)
    started = time.perf_counter()
    for path, (weights, _) in layers.items():
        module = model.get_submodule(path)
        if not isinstance(module, torch.nn.Linear):
            raise TypeError(f"{path} is a {type(module).__name__}; quantize_ takes Linear")
        quantize_(model, torchao_config(weights), filter_fn=lambda _, name, wanted=path: name == wanted)
    seconds = time.perf_counter() - started
    for path in layers:
        module = model.get_submodule(path)
        module.weight = torch.nn.Parameter(module.weight.dequantize().float(), requires_grad=False)
    return model, seconds


def torchao_config(weights):
    """The configuration for a weight's format. Inputs are quantized by who scores it."""
    from torchao.quantization import Float8WeightOnlyConfig, IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerAxis, PerGroup

    if weights["type"] == "int":
        granularity = PerGroup(weights["group_size"]) if weights["group_size"] else PerAxis(0)
        kind = {8: torch.int8, 4: torch.int4}[weights["num_bits"]]
        return IntxWeightOnlyConfig(weight_dtype=kind, granularity=granularity, scale_dtype=torch.bfloat16)
    if weights["num_bits"] == 8:
        return Float8WeightOnlyConfig()
    if weights["group_size"] == 16:
        from torchao.prototype.mx_formats import NVFP4WeightOnlyConfig

        return NVFP4WeightOnlyConfig()
    raise ValueError("torchao has no weight-only configuration of MXFP4 that runs on a CPU")


def bitsandbytes(job, batches):
    """Weights as its kernels made them while transformers loaded the model."""
    import bitsandbytes.functional as kernels
    from transformers import BitsAndBytesConfig

    layers = layer_schemes(job)
    linear = [path for path, module in load(job["folder"]).named_modules() if isinstance(module, torch.nn.Linear)]
    skipped = [path for path in linear if path not in layers]
    if len(linear) == len(skipped):
        raise TypeError("no Linear layer among those to be quantized; bitsandbytes has it for these only")
    kind = job["bitsandbytes"]
    options = {"load_in_8bit": True} if kind == "llm_int8" else {"load_in_4bit": True, "bnb_4bit_quant_type": kind}
    config = BitsAndBytesConfig(**options, llm_int8_skip_modules=skipped)
    started = time.perf_counter()
    model = load(job["folder"], quantization_config=config)
    seconds = time.perf_counter() - started
    for path in layers:
        weight = model.get_submodule(path).weight
        values = (
            kernels.int8_vectorwise_dequant(weight.CB, weight.SCB)
            if kind == "llm_int8"
            else kernels.dequantize_4bit(weight.data, weight.quant_state)
        )
        linear = torch.nn.Linear(values.shape[1], values.shape[0], bias=model.get_submodule(path).bias is not None)
        linear.weight, linear.bias = torch.nn.Parameter(values.float()), model.get_submodule(path).bias
        model.set_submodule(path, linear)
    return model, seconds


TOOLS = {
    "llm-compressor GPTQ": gptq,
    "llm-compressor AWQ": awq,
    "auto-round": autoround,
    "torchao": torchao,
    "bitsandbytes": bitsandbytes,
}


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.manual_seed(0)
    model, seconds = TOOLS[job["tool"]](job, read_batches(job["calibrate"]))
    before, after = load(job["folder"]).state_dict(), model.state_dict()
    missing = [f"{path}.weight" for path in layer_schemes(job) if f"{path}.weight" not in after]
    if missing:
        raise KeyError(f"the quantized model has no {missing[0]}")
    kept = {name: after[name].detach().float().contiguous().clone() for name in before if name in after}
    changed = [path for path in layer_schemes(job) if not torch.equal(kept[f"{path}.weight"], before[f"{path}.weight"])]
    out = Path(job["out"])
    save_file(kept, out / "weights.safetensors")
    (out / "result.json").write_text(json.dumps({"seconds": seconds, "layers": len(changed)}))


if __name__ == "__main__":
    main()
