"""Which packages each extra brings, of those that jointopt can do without."""

from __future__ import annotations

from importlib.util import find_spec

EXTRAS = {
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "gguf": ("gguf",),
    "bitsandbytes": ("bitsandbytes",),
    "lora": ("peft",),
    "ray": ("ray",),
}


def lacking(extra: str) -> str | None:
    """The packages of an extra that are not there, and how to install them, for an error's line; None for none."""
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    return f"no {', '.join(missing)}; pip install 'jointopt[{extra}]'" if missing else None
