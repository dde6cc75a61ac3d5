"""Whether llama.cpp itself computes what was exported for it: logits and tokens beside the sub-network's own.

    pip install -e '.[gguf]' llama-cpp-python
    python scripts/assets.py assets smollm2 text
    python scripts/bench/in_llama_cpp.py --assets assets --json llama_cpp.json

SmolLM2-135M, whole and unquantized, all in W8A16_G32 (Q8_0), all in W4A16_G32 (Q4_0), and a random genome of depth and
formats, each written by `target: gguf` and loaded by llama.cpp. The KL divergence is that of llama.cpp's distributions
from the sub-network's, over the tokens of one text; llama.cpp rounds inputs of quantized layers, which is its part.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from llama_cpp import Llama
from loading import Loaded
from measures import Measures, command_line, divergence
from networks import all_in
from rich.console import Console

import jointopt
from jointopt import SearchSpace, Supernet
from jointopt.rows import DataSource

SCHEMES = ["none", "W8A16_G32", "W4A16_G32"]
TOKENS = 256


def genomes(space: SearchSpace) -> dict[str, np.ndarray]:
    return {**{name: all_in(space, name) for name in SCHEMES}, "random": space.sample(1, seed=3)[0]}


def compared(file: Path, text: str, ids: list[int], logits: torch.Tensor) -> dict[str, float]:
    """What llama.cpp makes of a text, beside its tokens and logits [tokens, vocabulary] in the sub-network."""
    model = Llama(str(file), n_ctx=TOKENS, logits_all=True, verbose=False)
    tokens = model.tokenize(text.encode(), add_bos=False, special=False)[: len(ids)]
    model.eval(ids)
    found = torch.tensor(np.array(model.scores[: len(ids)]))
    return {
        "same tokens": float(np.mean(np.array(tokens) == np.array(ids))),
        "same next token": float((found.argmax(-1) == logits.argmax(-1)).float().mean()),
        "KL": divergence(found, logits),
    }


def main() -> None:
    parser = command_line(__doc__, assets=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    loaded = Loaded(arguments.assets / "smollm2", "causal-lm")
    source = DataSource(str(arguments.assets / "text" / "calibrate.txt"), samples=4, length=128)
    supernet = Supernet(loaded.model, SearchSpace.for_model(loaded.model, schemes=SCHEMES, depth=[26, 28, 30]))
    supernet.calibrate(loaded.inputs(source, 2))
    text = (arguments.assets / "text" / "evaluate.txt").read_text()[: 8 * TOKENS]
    ids = loaded.processor(text)["input_ids"][:TOKENS]
    measures = Measures(arguments.json)
    for name, genome in genomes(supernet.space).items():
        with tempfile.TemporaryDirectory() as place:
            folder = jointopt.export(
                supernet, genome, Path(place) / "out", target="gguf", processor=loaded.processor, base_model="SmolLM2"
            )
            with supernet.active(genome) as model, torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0]
            found = compared(folder / "model.gguf", text, ids, logits)
        for measure, value in found.items():
            measures.tell(name, measure, value, None, "lower" if measure == "KL" else "higher")
    Console().print(measures.table())


if __name__ == "__main__":
    main()
