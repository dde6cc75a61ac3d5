"""What rotations and scalings of a model's weights do for its quality in low precision.

    python scripts/assets.py assets smollm2 text minilm movies digits
    python scripts/bench/transforms.py --assets assets --json transforms.json
    python scripts/bench/transforms.py --assets assets --case smollm2 --tokens 2048 --smollm2 FINE-TUNED

Each case is one model; all layers inside its blocks are in one scheme, rounded to nearest, and
what is around the blocks is left alone. SmolLM2's perplexity on texts that it was not calibrated on (its weights were
4 bits once, in groups of 32: formats with such groups look better than they are, and a rotation leaves that grid;
so the inputs are also quantized alone, the weights as they are); the accuracy of the quantizers' bench's MiniLM, ViT
and ResNet; and for all the KL divergence from the original's outputs. `kurtosis` is that of the
inputs of a block's layers: the mean over layers, and over those that read a normalization (3: a normal distribution).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loading import Loaded
from measures import Measures, command_line
from networks import all_in
from originals import cases, original
from rich.console import Console
from torch import Tensor, nn

from jointopt import SearchSpace, Supernet
from jointopt.batches import Batch
from jointopt.evaluation.evaluation import Quality
from jointopt.rows import DataSource
from jointopt.supernet.importance import CalibrationPass
from quant.formats import SCHEMES, Format
from quant.reference import fake_quantize_activation

LLM = ("none", "W8A8", "W8A8_STATIC", "W4A4", "NVFP4", "MXFP4", "W4A16")
INPUTS = ("W4A4", "MXFP4")
IMAGES = ("none", "W8A8", "W8A8_STATIC", "FP8", "NVFP4", "MXFP4", "W4A16")
CONVOLUTIONS = ("none", "W8A8", "W8A8_STATIC", "FP8", "W4A16_CHANNEL")


@dataclass(frozen=True)
class Case:
    """A model with what it is calibrated and scored on, the schemes and the sets of transforms that are tried.

    Attributes:
        metric: beside "kl", which is always shown.
        fold: whether BatchNorm's scales in the weights before it are tried too.
    """

    model: nn.Module
    inputs: list[Batch]
    quality: Quality
    metric: str
    schemes: tuple[str, ...]
    transforms: tuple[tuple[str, ...], ...]
    fold: bool = False


def smollm2(options: argparse.Namespace) -> Case:
    text = options.assets / "text"
    loaded = Loaded(options.smollm2 or options.assets / "smollm2", "causal-lm")
    calibrate = DataSource(str(text / "calibrate.txt"), samples=8, length=256)
    evaluate = DataSource(str(text / "evaluate.txt"), samples=options.tokens // 256, length=256)
    sets = ((), ("smooth",), ("awq",), ("rotate_heads",), ("rotate",), BOTH, (*BOTH, "smooth"), (*BOTH, "awq"))
    return Case(
        loaded.model,
        loaded.inputs(calibrate, 2),
        loaded.quality(loaded.batches(evaluate, 2), loaded.model),
        "perplexity",
        LLM,
        sets,
    )


def tuned(name: str, schemes: tuple[str, ...], sets: tuple[tuple[str, ...], ...], fold: bool = False) -> Callable:
    """Options -> the case of one of the quantizers' bench's originals."""

    def case(options: argparse.Namespace) -> Case:
        made = original(name, cases(options.assets)[name], options.assets, options.work)
        return Case(made.model, made.calibrate, made.quality, "accuracy", schemes, sets, fold)

    return case


BOTH = ("rotate", "rotate_heads")
CASES: dict[str, Callable[[argparse.Namespace], Case]] = {
    "smollm2": smollm2,
    "minilm": tuned(
        "minilm",
        LLM,
        ((), ("smooth",), ("awq",), ("rotate_heads",), ("rotate_heads", "smooth"), ("rotate_heads", "awq")),
    ),
    "vit": tuned("vit", IMAGES, ((), ("smooth",), ("awq",), ("rotate",), BOTH, (*BOTH, "smooth"))),
    "resnet": tuned("resnet", CONVOLUTIONS, ((), ("smooth",), ("awq",)), fold=True),
}


class Moments:
    """Kurtosis of a layer's inputs, over all tokens and channels."""

    def __init__(self) -> None:
        self.count, self.second, self.fourth = 0, 0.0, 0.0

    def observe(self, hidden: Tensor) -> None:
        squares = hidden.double().square()
        self.count += squares.numel()
        self.second += float(squares.sum())
        self.fourth += float(squares.square().sum())

    @property
    def kurtosis(self) -> float:
        return self.fourth * self.count / self.second**2


def kurtosis(supernet: Supernet, inputs: Iterable[Batch]) -> tuple[float, float]:
    """Means over the layers of the blocks, and over those that read a normalization (about zero, where a quantizer's
    range is centred)."""
    moments = {layer.path: Moments() for layer in supernet.family.layers if layer.block}
    listeners = [(path, each.observe) for path, each in moments.items()]
    CalibrationPass(supernet.model, supernet.family, listeners).run(inputs)
    links = supernet.family.links
    normal = {path for link in links for path in link.consumers if "norm" in link.producer.rpartition(".")[2]}
    means = []
    for paths in (set(moments), normal & set(moments)):
        means.append(sum(moments[path].kurtosis for path in paths) / max(1, len(paths)))
    return means[0], means[1]


def with_inputs_in(view: nn.Module, paths: Iterable[str], form: Format) -> nn.Module:
    """The view with the inputs of these layers rounded, and their weights as they are."""

    def hook(module: nn.Module, args: tuple) -> tuple:
        return (fake_quantize_activation(args[0], form), *args[1:])

    for path in paths:
        view.get_submodule(path).register_forward_pre_hook(hook)
    return view


@torch.no_grad()
def fold_batch_norm(model: nn.Module) -> None:
    """BatchNorm's scale into the rows of the convolution before it, in place; its statistics follow, the function
    stays. It is what folding does to the weights that are quantized."""
    modules: dict[str, Any] = dict(model.named_modules())
    for path, convolution in modules.items():
        norm = modules.get(path.replace("convolution", "normalization"))
        if isinstance(convolution, nn.Conv2d) and norm is not None:
            assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            convolution.weight.mul_(scale[:, None, None, None])
            norm.running_mean.mul_(scale)
            norm.running_var.copy_(norm.weight.square() - norm.eps)
            norm.weight.abs_()


def uniform(supernet: Supernet, scheme: str) -> np.ndarray:
    """The whole model, all layers of its blocks in one scheme where they can take it, those around them as they are."""
    return all_in(supernet.space, scheme, [block.name for block in supernet.family.blocks])


def measure(name: str, case: Case, options: argparse.Namespace, measures: Measures) -> None:
    def tell(measure: str, value: float, better: str = "lower") -> None:
        measures.tell(name, measure, float(value), None, better)

    only = [tuple(each.split()) for each in options.transforms or ()]
    space = SearchSpace.for_model(case.model, schemes=case.schemes, preset="fixed")
    tried = [(each, False) for each in only or case.transforms] + ([((), True)] if case.fold else [])
    for transforms, fold in tried:
        supernet = Supernet(case.model, space, transforms=transforms, bank_bytes=10**6)
        if fold:
            fold_batch_norm(supernet.model)
        supernet.calibrate(case.inputs)
        said = "BatchNorm folded" if fold else " ".join(transforms) or "as it is"
        tell(f"{said}: MB", supernet.costs(space.largest)["size"] / 1e6)
        every_layer, behind_norms = kurtosis(supernet, case.inputs)
        tell(f"{said}: kurtosis", every_layer)
        tell(f"{said}: kurtosis behind normalizations", behind_norms)
        for scheme in INPUTS if "W4A4" in case.schemes else ():
            form, paths = SCHEMES[scheme].activations, [layer.path for layer in supernet.family.layers if layer.block]
            assert form is not None
            with supernet.active(uniform(supernet, "none")) as view, torch.no_grad():
                metrics = case.quality(with_inputs_in(view, paths, form))
            tell(f"{said}: inputs alone as in {scheme}: kl", metrics["kl"])
        for scheme in options.schemes or case.schemes:
            with supernet.active(uniform(supernet, scheme)) as view, torch.no_grad():
                metrics = case.quality(view)
            better = "higher" if case.metric == "accuracy" else "lower"
            tell(f"{said}: {scheme}: {case.metric}", metrics[case.metric], better)
            tell(f"{said}: {scheme}: kl", metrics["kl"])


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/originals")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--tokens", type=int, default=1024, help="of SmolLM2's evaluation")
    parser.add_argument("--transforms", action="append", help="as in 'rotate smooth'; default: a case's own sets")
    parser.add_argument("--schemes", nargs="+", help="default: a case's own")
    parser.add_argument("--smollm2", type=Path, help="folder of a fine-tuned one in place of the asset")
    options = parser.parse_args()
    measures = Measures(options.json)
    for name in options.case or CASES:
        measure(name, CASES[name](options), options, measures)
    Console().print(measures.table())


if __name__ == "__main__":
    main()
