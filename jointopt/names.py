"""What a config may name, apart from the code behind the names, which takes seconds to load."""

from __future__ import annotations

MODELS = "a local folder, a GGUF file, a hub id, or timm/NAME"
