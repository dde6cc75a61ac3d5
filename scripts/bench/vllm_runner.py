"""Logits of folders in vLLM on a CPU.

    python -P scripts/bench/vllm_runner.py TOKENS.json DTYPE FOLDER ...

Run by `in_vllm.py` in an environment of vLLM's own; nothing of jointopt is imported here. Beside each folder it writes
FOLDER.npy, float32 [tokens - 1, vocabulary], of each token but the last.

On a CPU without VNNI oneDNN adds products of 8-bit numbers in 16 bits, where they saturate, and vLLM's kernel for 4-bit
weights needs AVX-512 and takes no float32. There the product alone is done by torch; weights, scales, zero points and
rounded inputs are as vLLM reads, fuses and makes them.
"""

import json
import os
import sys
from pathlib import Path

# The engine runs in this process, so that what is replaced here is replaced there.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm import _custom_ops as ops
from vllm.model_executor.kernels.linear.mixed_precision.cpu import CPUWNA16LinearKernel
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.scalar_type import scalar_types


class Product:
    """What oneDNN would be given once: codes [inputs, outputs] and a scale for each output, or one."""

    def __init__(self, codes, scales, *_):
        self.codes, self.scales, self.n = codes.double(), scales.double().flatten(), codes.shape[1]


def multiply(product, inputs, out, scales, zeros, adjustment, bias):
    """Codes of inputs times codes of weights, exact in float64, and both scales; zero points are taken off before."""
    codes = inputs.double() if zeros is None else inputs.double() - zeros.double()
    out.copy_(codes @ product.codes * scales.double() * product.scales + (0 if bias is None else bias.double()))


def multiply_4_bit(*, input, q_weight, scales, bias, **_):
    """Inputs times weights that are packed eight in a number along inputs; scales are [groups, outputs]."""
    codes = unpack_quantized_values_into_int32(q_weight, scalar_types.uint4b8, 0) - 8
    weight = codes.to(input.dtype) * scales.repeat_interleave(len(codes) // len(scales), 0)
    return torch.nn.functional.linear(input, weight.t(), bias)


def replace_products(dtype):
    flags = Path("/proc/cpuinfo").read_text()
    if " avx512_vnni" not in flags:
        ops.create_onednn_scaled_mm, ops.onednn_scaled_mm = Product, multiply
    if " avx512f" not in flags or dtype == "float32":
        ops.cpu_gemm_wna16 = multiply_4_bit
        CPUWNA16LinearKernel._process_gptq_weights_w4a16 = lambda kernel, layer: setattr(layer, "isa_hint", "")


def logits_of(folder, tokens, dtype):
    """Logits of each token but the last, float32 [tokens - 1, vocabulary], which vLLM computes where it is asked for
    the prompt's own probabilities."""
    seen, forward = [], LogitsProcessor.forward

    def recorded(*given, **named):
        seen.append(forward(*given, **named))
        return seen[-1]

    LogitsProcessor.forward = recorded
    try:
        engine = LLM(
            folder,
            dtype=dtype,
            enforce_eager=True,
            max_model_len=len(tokens) + 1,
            trust_remote_code=True,
            skip_tokenizer_init=True,
        )
        seen.clear()
        wanted = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
        engine.generate([{"prompt_token_ids": tokens}], wanted)
    finally:
        LogitsProcessor.forward = forward
    return next(each.float().numpy() for each in seen if len(each) == len(tokens) - 1)


def main():
    tokens, dtype = json.loads(Path(sys.argv[1]).read_text()), sys.argv[2]
    replace_products(dtype)
    for folder in sys.argv[3:]:
        np.save(f"{folder}.npy", logits_of(folder, tokens, dtype))


if __name__ == "__main__":
    main()
