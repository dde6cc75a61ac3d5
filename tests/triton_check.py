"""Compares the Triton kernels with the reference on a CPU: `python -m tests.triton_check cuda`, or with
TRITON_INTERPRET=1 and no GPU, `python -m tests.triton_check cpu`. Exits with 1 where a bit differs."""

from __future__ import annotations

import sys
from functools import partial
from itertools import product

import torch
from torch import Tensor

from quant import packing, reference
from quant.formats import Format
from quant.kernels import cuda, grouped
from tests.same import same, same_codes
from tests.test_quant_kernels import DTYPES, DYNAMIC, STATIC, WEIGHTS, constants, divides, named, numbers, odd

HERE = sys.argv[1] if __name__ == "__main__" else "cpu"


def there(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(HERE)


def activation(x: Tensor, format: Format) -> bool:
    given = constants(x, format)
    expected = reference.fake_quantize_activation(x, format, **given)
    names = ("scale", "zero_point", "global_scale")
    found = grouped.activation(cuda, there(x), format, *(there(given.get(name)) for name in names))
    return same(found.cpu(), expected) and found.stride() == expected.stride()


def weight(x: Tensor, format: Format, narrowed: bool) -> bool:
    groups = reference.weight_groups(x, format)
    clip = (groups.amin(-1) * 0.7, groups.amax(-1) * 0.6) if narrowed else None
    expected = reference.quantize(x, format, clip)
    moved = None if clip is None else tuple(map(there, clip))
    found, values = grouped.weight(cuda, there(x), format, moved, codes=True, values=True)
    return same_codes(found.to("cpu"), expected) and same(values.cpu(), expected.dequantize(x.dtype))


def packs(bits: int, columns: int) -> bool:
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (3, columns), dtype=torch.int8)
    words = cuda.pack(there(codes), bits, 1 << (bits - 1), torch.int32)
    nibbles = (codes & 15).view(torch.uint8)[:, : columns // 2 * 2]
    halves = cuda.pack(there(nibbles), 4, 0, torch.uint8)
    return same(words.cpu(), packing.pack_int32(codes, bits)) and same(halves.cpu(), packing.pack_nibbles(nibbles))


def tensors(dtype: torch.dtype) -> list[Tensor]:
    """All of `odd` on a GPU; few and small ones for the interpreter, which is slow, all shapes in float32 alone."""
    halves, ends, magnitudes, *_, images, _, _, _, _ = every = odd(dtype)
    small = torch.cat([halves, ends, magnitudes[::8]])
    if HERE == "cuda":
        return every[:-1]
    return [small, numbers(1, 9600), images[:, :, :, :3]] if dtype == torch.float32 else [small]


def main() -> int:
    failed, count = [], 0
    checks = []
    formats = [each for each in DYNAMIC + STATIC if HERE == "cuda" or each.granularity != "channel"]
    for format, dtype in product(formats, DTYPES):
        for x in tensors(dtype):
            checks.append((named(format), x, partial(activation, x, format)))
            if format in WEIGHTS and x.dim() == 2 and divides(x.shape[1], format):
                finite = x.nan_to_num(1.0, posinf=2.0, neginf=-3.0)
                checks.append((f"weight {named(format)}", x, partial(weight, finite, format, len(x) > 1)))
    checks += [
        (f"pack {bits}", numbers(1), partial(packs, bits, columns)) for bits in (4, 8) for columns in (1, 37, 96)
    ]
    for name, x, check in checks:
        count += 1
        if not check():
            failed.append(f"{name} {x.dtype} {tuple(x.shape)}")
    print(f"{count} checked, {len(failed)} differ", *failed, sep="\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
