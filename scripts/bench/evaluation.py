"""What an evaluation costs beyond its forward passes, for each family.

    python scripts/bench/evaluation.py --json evaluation.json
    python scripts/bench/evaluation.py --case bert --case resnet
    python scripts/bench/evaluation.py --shared digits_vit --assets assets --work work

`evaluate(supernet, genome, quality)`, as a search calls it, is timed against the same quality function on the model
that was extracted before. The two take turns, so that a slow minute of the machine falls on both; a genome's figure
is the median of its pairs' ratios, a case's the median of its genomes'. Quality is read from one batch only, the
hardest case: what an evaluation does once is shared by few samples. By then every weight has been quantized once, as
in the steady state of a search; the first evaluation of a genome, which quantizes, has a row of its own.

A model with BatchNorm has its statistics estimated anew for each sub-network, which is more forward passes, over the
calibration batches (here two). There the extracted model's statistics are estimated too, before its quality is taken;
what such passes cost beside plain ones, and what share of an evaluation they are here, are rows of their own.

`--shared` takes the last batch of 16 genomes of a short search on a real super-network (networks.py), and times it with
shared prefixes (`SharedEvaluator`) against one by one; the results are compared to the bit. How much there was to be
shared is a row: the blocks that differ by what is before them, over all blocks of the batch. The same for a batch made
to agree more: the genomes of that generation with the genes of the first half of the blocks from one of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import timm
import torch
from loading import unlabelled
from measures import Measures, command_line, seconds
from networks import SCHEMES, Ready, prepare
from rich.console import Console
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from jointopt import SearchSpace, Supernet
from jointopt.evaluation.evaluation import evaluate, measured
from jointopt.evaluation.sharing import SharedEvaluator, block_signatures
from jointopt.loop.loop import search
from jointopt.supernet.batch_norm import has_batch_norm, reestimate
from jointopt.tasks.problems import NEXT_TOKEN, ONE_CLASS
from search_spaces.precision import is_precision

AIM = 1.05
SEARCH = 100

Row = tuple[str, float, float | None]
"""(measure, value, aim)"""

_TINY = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_LLAMA = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def images(key: str) -> dict[str, Tensor]:
    return {key: torch.randn(8, 3, 224, 224), "labels": torch.randint(1000, (8,))}


def texts() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(30522, (8, 128)), "labels": torch.randint(2, (8,))}


def tokens() -> dict[str, Tensor]:
    ids = torch.randint(49152, (1, 256))
    return {"input_ids": ids, "labels": ids}


@dataclass(frozen=True)
class Case:
    """A model of a size that people search, randomly initialized, and a batch of what it reads."""

    model: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]


CASES = {
    "vit": Case(lambda: ViTForImageClassification(ViTConfig(**_TINY, num_labels=1000)), lambda: images("pixel_values")),
    "timm_vit": Case(lambda: timm.create_model("vit_tiny_patch16_224"), lambda: images("x")),
    "bert": Case(lambda: BertForSequenceClassification(BertConfig(**_MINILM)), texts),
    "llama_tied": Case(lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True)), tokens),
    "llama_untied": Case(lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=False)), tokens),
    "resnet": Case(lambda: ResNetForImageClassification(ResNetConfig(num_labels=1000)), lambda: images("pixel_values")),
    "timm_resnet": Case(lambda: timm.create_model("resnet18"), lambda: images("x")),
}


def median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


class Bench:
    """One case: its super-network, a quality function, and the batches that BatchNorm is estimated from."""

    def __init__(self, case: Case, genomes: int, repeats: int):
        torch.manual_seed(0)
        model = case.model().eval()
        self.repeats = repeats
        self.supernet = Supernet(model, SearchSpace.for_model(model, schemes=SCHEMES))
        batches = unlabelled([case.batch() for _ in range(2)])
        self.supernet.calibrate(batches)
        self.extra = batches if has_batch_norm(model) else []
        problem = NEXT_TOKEN if isinstance(model, LlamaForCausalLM) else ONE_CLASS
        self.quality = problem.quality([case.batch()])
        self.genomes = self.supernet.space.sample(genomes, seed=0)

    def rows(self) -> list[Row]:
        first = seconds(self.evaluate, self.genomes[0])
        mixed = [self.ratio(genome) for genome in self.genomes]
        plain = [self.ratio(self.unquantized(genome)) for genome in self.genomes]
        forward = median(seconds for _, seconds in mixed)
        shell = median(seconds(self.shell, genome) for genome in self.genomes for _ in range(self.repeats))
        found = [
            ("evaluation / forward, formats mixed", median(ratio for ratio, _ in mixed), AIM),
            ("evaluation / forward, unquantized", median(ratio for ratio, _ in plain), AIM),
            ("forward / forward of a second copy (the noise)", self.noise(), None),
            ("view and costs (ms)", 1000 * shell, None),
            ("forward (ms)", 1000 * forward, None),
            ("first evaluation / forward", first / mixed[0][1], None),
            (f"quantizing in {SEARCH} evaluations / their forwards", self.quantizing() / SEARCH / forward, None),
        ]
        if self.extra:
            passes, share = self.statistics(self.genomes[0])
            found.append(("statistics / plain forward, same samples", passes, None))
            found.append(("statistics / all forward passes", share / forward, None))
        return [(measure, float(value), aim) for measure, value, aim in found]

    def evaluate(self, genome: np.ndarray) -> None:
        failed = evaluate(self.supernet, genome, self.quality).failed
        if failed:
            raise RuntimeError(failed)

    def unquantized(self, genome: np.ndarray) -> np.ndarray:
        """The same architecture with no layer quantized."""
        space = self.supernet.space
        return space.encode({k: "none" if is_precision(k) else v for k, v in space.decode(genome).items()})

    def forward(self, model: nn.Module) -> None:
        """The forward passes of one evaluation."""
        if self.extra:
            reestimate(model, self.extra)
        measured(self.quality, model)

    @torch.no_grad()
    def read(self, model: nn.Module) -> None:
        for batch in self.extra:
            model(**batch)

    def shell(self, genome: np.ndarray) -> None:
        """All that an evaluation does but its forward passes."""
        self.supernet.layout(genome)
        self.supernet.costs(genome)

    def ratio(self, genome: np.ndarray) -> tuple[float, float]:
        """(evaluation over forward passes of the extracted model, seconds of the latter): medians over pairs."""
        extracted = self.supernet.extract(genome)
        return self.paired(lambda: self.evaluate(genome), lambda: self.forward(extracted))

    def noise(self) -> float:
        one, other = self.supernet.extract(self.genomes[0]), self.supernet.extract(self.genomes[0])
        return self.paired(lambda: self.forward(one), lambda: self.forward(other))[0]

    def statistics(self, genome: np.ndarray) -> tuple[float, float]:
        """(estimating BatchNorm's statistics over plain forward passes of the same samples, seconds of the former)."""
        extracted, other = self.supernet.extract(genome), self.supernet.extract(genome)
        ratio, plain = self.paired(lambda: reestimate(other, self.extra), lambda: self.read(extracted))
        return ratio, ratio * plain

    def paired(self, one: Callable[[], None], other: Callable[[], None]) -> tuple[float, float]:
        one(), other()
        taken: list[tuple[float, float]] = []
        for turn in range(self.repeats):
            if turn % 2:
                taken.append((seconds(one), seconds(other)))
            else:
                after, before = seconds(other), seconds(one)
                taken.append((before, after))
        return median(a / b for a, b in taken), median(b for _, b in taken)

    def quantizing(self) -> float:
        """Seconds that the weights of a random search take to be quantized, beyond building its views."""
        genomes = self.supernet.space.sample(SEARCH, seed=1)
        self.supernet._bank.clear()  # nothing is quantized now
        cold = sum(seconds(self.shell, genome) for genome in genomes)
        return cold - sum(seconds(self.shell, genome) for genome in genomes)


BATCH = 16
SHARED_AIM = 0.6
SCORES = {"digits_vit": "loss", "minilm": "loss", "smollm2": "perplexity"}
"""The super-networks of networks.py on which sharing is timed, and what their searches go by beside the size."""


def sharing_rows(name: str, arguments: argparse.Namespace) -> list[Row]:
    ready = prepare(name, arguments.assets, arguments.work)
    ready = replace(ready, quality=partial(ready.quality, samples=arguments.samples))
    study = search(
        ready.supernet,
        ready.quality,
        [SCORES[name], "size"],
        arguments.evaluations,
        strategy=arguments.strategy,
        batch=BATCH,
    )
    late = np.array(study.evaluations()["genome"].tolist()[-BATCH:])
    return [
        row
        for kind, genomes, aim in (
            (f"last of {arguments.evaluations}", late, SHARED_AIM),
            ("made to agree", agreeing(ready, late), None),
        )
        for row in shared_rows(ready, kind, genomes, aim, arguments.repeats)
    ]


def agreeing(ready: Ready, genomes: np.ndarray) -> np.ndarray:
    """The genomes with the first one's genes of the first half of the blocks, depth and embedding included."""
    half = len(ready.supernet.family.blocks) // 2
    later = {f"block{index}" for index in range(half, len(ready.supernet.family.blocks))} | {"head", "pooler"}
    same = [at for at, name in enumerate(ready.supernet.space.names) if name.partition(".")[0] not in later]
    changed = genomes.copy()
    changed[:, same] = genomes[0, same]
    return ready.supernet.space.canonical(changed)


def shared_rows(ready: Ready, kind: str, genomes: np.ndarray, aim: float | None, repeats: int) -> list[Row]:
    supernet, evaluator = ready.supernet, SharedEvaluator(ready.supernet, ready.quality)
    prefixes = [block_signatures(supernet.family, supernet.plan(genome)) for genome in genomes]
    distinct = {prefix[: depth + 1] for prefix in prefixes for depth in range(len(prefix))}
    ratios, found = [], []
    for genome in genomes:
        supernet.layout(genome)  # quantizes what was not quantized yet
    for _ in range(repeats):
        started = time.perf_counter()
        one = [evaluate(supernet, genome, ready.quality) for genome in genomes]
        middle = time.perf_counter()
        shared = dict(evaluator.evaluate(genomes))
        ended = time.perf_counter()
        if [each.metrics for each in one] != [shared[index].metrics for index in range(len(genomes))]:
            raise RuntimeError("shared and one by one differ")
        ratios.append((ended - middle) / (middle - started))
        found.append(middle - started)
    return [
        (f"16 genomes ({kind}), shared / one by one", median(ratios), aim),
        (f"16 genomes ({kind}), blocks run / all blocks", len(distinct) / sum(map(len, prefixes)), None),
        (f"16 genomes ({kind}), one by one (s)", median(found), None),
    ]


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/networks")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--genomes", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=7, help="pairs of timings for each genome")
    parser.add_argument("--shared", choices=SCORES, action="append", help="time shared prefixes, and nothing else")
    parser.add_argument("--evaluations", type=int, default=112, help="of the search")
    parser.add_argument("--strategy", default="guided")
    parser.add_argument("--samples", type=int, help="that sub-networks are scored on, with --shared; default: all")
    arguments = parser.parse_args()
    measures = Measures(arguments.json)
    for name in arguments.shared or arguments.case or CASES:
        if arguments.shared:
            found = sharing_rows(name, arguments)
        else:
            found = Bench(CASES[name], arguments.genomes, arguments.repeats).rows()
        for measure, value, aim in found:
            measures.tell(name, measure, value, aim, "lower")
    Console().print(measures.table(f"{torch.get_num_threads()} threads, medians of {arguments.genomes} genomes"))


if __name__ == "__main__":
    main()
