"""On how many of 1,000 inputs an ONNX export and the Hugging Face export of the same sub-network choose the same class.

    python scripts/assets.py assets digits minilm movies smollm2 text
    python scripts/bench/agreement.py --assets assets --json agreement.json

For each family the whole network with all layers in one integer format, exported for both targets, each run in a fresh
process of its own: images of digits, movie snippets, and pieces of 16 tokens, where the class is the token that comes
next. Where they differ, it is said how far apart the two classes are for the Hugging Face export, of its largest logit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import networks
import torch
from loading import Loaded
from measures import Measures, command_line
from networks import all_in
from rich.console import Console
from rich.table import Table
from torch import Tensor

import jointopt
from jointopt import SearchSpace, Supernet
from jointopt.batches import without_labels
from jointopt.checkpoint.verification import reloaded
from jointopt.rows import DataSource

SCHEMES = ("W8A8", "W8A8_STATIC", "W8A8_STATIC_ASYM", "W8A16_CHANNEL", "W4A16")
INPUTS = 1000
SHORT, BATCH = 16, 50


def inputs_of(name: str, loaded: Loaded, assets: Path) -> list[dict[str, Tensor]]:
    """1,000 inputs in batches: of images all that there are, evaluation's first."""
    network = networks.networks(assets)[name]
    if name == "smollm2":
        text = (assets / "text" / "test.txt").read_text() + (assets / "text" / "evaluate.txt").read_text()
        ids = loaded.processor(text)["input_ids"]
        pieces = torch.tensor((ids * (1 + INPUTS * SHORT // len(ids)))[: INPUTS * SHORT]).view(INPUTS, SHORT)
        return [{"input_ids": each} for each in pieces.split(BATCH)]
    places = [network.evaluate, network.train]
    if name.startswith("digits"):
        places.insert(1, DataSource(str(assets / "digits" / "test")))
    batches, missing = [], INPUTS
    for place in places:
        for batch in loaded.batches(replace(place, samples=None), BATCH):
            part = {key: value[:missing] for key, value in without_labels(batch).items()}
            missing -= len(next(iter(part.values())))
            batches.append(part)
            if not missing:
                return batches
    raise SystemExit(f"{name}: found {INPUTS - missing} inputs; needed are {INPUTS}")


def chosen(folder: Path, batches: list[dict[str, Tensor]]) -> Tensor:
    """Logits of each input (of a text the last token's), by the export in a process of its own."""
    found = []
    with reloaded(folder) as model:
        for batch in batches:
            output = model(**batch)
            logits = output if isinstance(output, Tensor) else output["logits"]
            found.append(logits[:, -1] if logits.dim() == 3 else logits)
    return torch.cat(found)


def compared(supernet: Supernet, scheme: str, batches: list, work: Path) -> tuple[int, float]:
    """How many of the inputs agree; where others do, the largest distance of the two classes."""
    logits = {}
    for target in ("transformers", "onnxruntime"):
        folder = jointopt.export(supernet, all_in(supernet.space, scheme), work / target, target=target, overwrite=True)
        logits[target] = chosen(folder, batches)
    expected, found = logits.values()
    picked = expected.gather(-1, found.argmax(-1, keepdim=True))[:, 0]
    apart = (expected.amax(-1) - picked) / expected.abs().amax()
    return int((found.argmax(-1) == expected.argmax(-1)).sum()), float(apart.max())


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/agreement")
    parser.add_argument("--cases", nargs="+", default=["digits_vit", "digits_resnet", "minilm", "smollm2"])
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    measures = Measures(arguments.json)
    table = Table("case", "scheme", f"same class, of {INPUTS}", "apart at most")
    for name in arguments.cases:
        ready = networks.prepare(name, arguments.assets, arguments.work)
        model = ready.supernet.extract(all_in(ready.supernet.space, "none"))
        supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", *arguments.schemes], preset="fixed"))
        supernet.calibrate(ready.inputs)
        loaded = networks.start(networks.networks(arguments.assets)[name], arguments.assets, arguments.work)
        batches = inputs_of(name, loaded, arguments.assets)
        for scheme in arguments.schemes:
            same, apart = compared(supernet, scheme, batches, arguments.work)
            table.add_row(name, scheme, str(same), f"{apart:.1e}")
            print(f"{name}: {scheme} {same} of {INPUTS}, {apart:.1e} apart", flush=True)
            measures.keep(name, f"{scheme}, same class", same, INPUTS, "higher")
    Console().print(table)


if __name__ == "__main__":
    main()
