"""How far rounding to nearest may stand in for GPTQ while searching: rank correlation of their scores over genomes.

    python scripts/assets.py assets minilm movies smollm2 text digits vit-digits
    python scripts/bench/standin.py --assets assets --case digits_vit [--genomes 40] [--json FILE]

Each genome is scored as the search scores it, and finished and scored again: KL divergence to the whole, unquantized
model, on batches that neither saw. "formats" draws number formats alone, at the full architecture; "all" all genes.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import unshadowed  # noqa: F401
from networks import Ready, networks, prepare
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import spearmanr
from torch import nn

import jointopt
from jointopt import SearchSpace, Supernet
from jointopt.evaluation import Batch, logits_of, measured

SCHEMES = ("W8A8", "W4A16", "NVFP4", "MXFP4", "W4A8", "FP8_DYNAMIC")


def digits_resnet(work: Path) -> Ready:
    """A ResNet of scikit-learn's digits at 16 x 16, trained now or by an earlier call with the same `work`."""
    from sklearn.datasets import load_digits
    from transformers import ResNetConfig, ResNetForImageClassification

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].div(8).sub(1)
    images = nn.functional.interpolate(images, size=16, mode="bilinear")
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)
    sizes = {"embedding_size": 32, "hidden_sizes": [32, 64], "depths": [3, 3], "layer_type": "basic"}
    model = ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **sizes))
    space = SearchSpace.for_model(model, schemes=SCHEMES)
    supernet = Supernet(model, space)
    inputs = [{"pixel_values": part} for part in images[:128].split(32)]
    train = [
        {"pixel_values": x, "labels": y} for x, y in zip(images[:1400].split(50), labels[:1400].split(50), strict=True)
    ]
    tuned = work / "digits_resnet.safetensors"
    supernet.calibrate(inputs)
    if not tuned.is_file():
        work.mkdir(parents=True, exist_ok=True)
        jointopt.train_sandwich(supernet, train, 150, learning_rate=3e-3)
        supernet.save(tuned)
    supernet.load(tuned)
    supernet.calibrate(inputs)
    scored = [{"pixel_values": images[1400:], "labels": labels[1400:]}]
    return Ready(supernet, inputs, scored, lambda model: 0.0)


def ready(name: str, assets: Path, work: Path) -> Ready:
    """A super-network over the schemes whose rounding matters."""
    if name == "digits_resnet":
        return digits_resnet(work)
    found = prepare(name, assets, work)
    space = SearchSpace.for_model(found.supernet.model, schemes=SCHEMES, **networks(assets)[name].space)
    supernet = Supernet(found.supernet.model, space)
    supernet.trained = True  # its channels are sorted already
    supernet.calibrate(found.inputs)
    return Ready(supernet, found.inputs, found.batches, found.quality)


def divergence(supernet: Supernet, batches: list[Batch]) -> Any:
    """Model -> mean KL divergence of its outputs from those of the whole, unquantized model."""
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in batches]

    def outputs(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            parts = [logits_of(model, batch).flatten(0, -2).log_softmax(-1) for batch in inputs]
        return torch.cat(parts)

    plan = supernet.plan(supernet.space.largest)
    expected = outputs(supernet.view(replace(plan, schemes={})))
    return lambda model: {
        "kl": float(nn.functional.kl_div(outputs(model), expected, log_target=True, reduction="batchmean"))
    }


def genomes(space: SearchSpace, count: int, formats_only: bool) -> list[np.ndarray]:
    found = []
    for genome in space.sample(count, seed=0):
        if formats_only:
            drawn, whole = space.decode(genome), space.decode(space.largest)
            drawn = {k: (drawn[k] if k.endswith(".precision") else v) for k, v in whole.items()}
            genome = space.encode(drawn)
        found.append(space.canonical(genome))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=("digits_vit", "digits_resnet", "minilm", "smollm2"), action="append")
    parser.add_argument("--genomes", type=int, default=40)
    parser.add_argument("--assets", type=Path, default=Path("assets"))
    parser.add_argument("--work", type=Path, default=Path("runs/networks"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, table = [], Table(title=f"KL to the original, rounded to nearest and by GPTQ, {options.genomes} genomes")
    for text in ("case", "genes", "rank correlation", "median nearest", "median GPTQ", "better by GPTQ"):
        table.add_column(text, justify="right")
    for name in options.case or ("digits_vit", "digits_resnet", "minilm"):
        given = ready(name, options.assets, options.work)
        quality = divergence(given.supernet, list(given.batches))
        for kind in ("formats", "all"):
            near, fine = [], []
            for genome in track(genomes(given.supernet.space, options.genomes, kind == "formats"), f"{name} {kind}"):
                with given.supernet.active(genome) as view:
                    near.append(measured(quality, view)["kl"])
                finished = jointopt.finish(given.supernet, genome, given.inputs, quality=quality)
                assert finished.metrics is not None
                fine.append(finished.metrics["kl"])
            rank = float(spearmanr(near, fine).statistic)
            better = float(np.mean(np.array(fine) < near))
            table.add_row(
                name, kind, f"{rank:.3f}", f"{np.median(near):.4g}", f"{np.median(fine):.4g}", f"{better:.0%}"
            )
            case = f"{name}, {kind}, {options.genomes} genomes"
            rows += [
                {"case": case, "measure": "rank correlation", "value": rank, "aim": None, "better": "higher"},
                {"case": case, "measure": "better by GPTQ", "value": better, "aim": None, "better": "higher"},
            ]
            if options.json:
                options.json.write_text(json.dumps(rows, indent=1))
    Console().print(table)


if __name__ == "__main__":
    main()
