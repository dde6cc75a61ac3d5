"""What learned ranges of weights and static inputs (LSQ) are worth in finishing, where ranges matter most.

    python scripts/assets.py assets digits minilm movies smollm2 text
    python scripts/bench/learned_ranges.py --assets assets --json learned_ranges.json
    python scripts/bench/learned_ranges.py --assets assets --cases smollm2 --steps 40

Each original (originals.py) with all of its blocks' layers in one format whose inputs have one calibrated range: as a
search scores it, finished by GPTQ, and trained for so many steps (distilled from the original, in the format) with its
ranges as they were calibrated, and with learned ones. The aim of the last is the one before.
"""

from __future__ import annotations

from loading import Loaded
from measures import Measures, command_line
from originals import Case, Original, cases, original
from quantizers import subject
from rich.console import Console
from rich.table import Table

from jointopt import finish
from jointopt.evaluation.evaluation import measured

SCHEMES = ("W8A8_STATIC", "W8A8_STATIC_ASYM", "FP8")
LEARNING_RATE = 2e-5


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/originals")
    parser.add_argument("--cases", nargs="+", default=["vit", "resnet", "minilm", "smollm2"])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    measures = Measures(arguments.json)
    table = Table("model, format", "ranges", "quality", "KL to the original", "seconds")
    for name in arguments.cases:
        case = cases(arguments.assets)[name]
        made = original(name, case, arguments.assets, arguments.work)
        for scheme in arguments.schemes:
            found = ways(made, case, scheme, arguments.steps)
            for way, (metrics, seconds) in found.items():
                quality = f"{case.metric} {metrics[case.metric]:.4g}"
                table.add_row(f"{name}, {scheme}", way, quality, f"{metrics['kl']:.3g}", f"{seconds:.0f}")
                aim = found["trained, calibrated"][0]["kl"] if way == "trained, learned" else None
                measures.keep(f"{name}/{scheme}/{way}", "kl", metrics["kl"], aim, "lower")
            Console().print(table)


def ways(made: Original, case: Case, scheme: str, steps: int) -> dict[str, tuple[dict[str, float], float]]:
    """What is done -> the metrics of what it leaves, and how long it took."""
    uniform = subject(made, scheme)
    supernet, genome = uniform.supernet, uniform.genome
    with supernet.active(genome) as view:
        found = {"calibrated": (dict(measured(made.quality, view)), 0.0)}
    rounded = finish(supernet, genome, made.calibrate, quality=made.quality)
    found["GPTQ, calibrated"] = rounded.metrics or {}, rounded.seconds
    samples = Loaded(made.folder, case.task).samples(case.train)
    for learned in (False, True):
        trained = finish(
            supernet,
            genome,
            lambda epoch: samples.epoch(epoch, case.batch_size, 0),
            quality=made.quality,
            steps=steps,
            learning_rate=LEARNING_RATE,
            learned_ranges=learned,
        )
        found[f"trained, {'learned' if learned else 'calibrated'}"] = trained.metrics or {}, trained.seconds
    return found


if __name__ == "__main__":
    main()
