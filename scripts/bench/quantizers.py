"""Uniform formats with jointopt's rounding beside the tools that do nothing else: quality, KL and seconds.

    python scripts/assets.py assets minilm movies digits smollm2 text
    python scripts/bench/quantizers.py --assets assets --environments environments --json quantizers.json
    python scripts/bench/quantizers.py --assets assets --environments environments --case vit --format INT4

Each original (see originals.py; kept in --work) has the layers of its blocks put into one format. llm-compressor (GPTQ,
AWQ), auto-round, torchao and bitsandbytes run in environments of their own, which are made in --environments with pip
where they are not there, over the packages of this one. All calibrate on the same saved batches, 128 sentences or
images, or 32 pieces of 256 tokens. What a tool's weights stand for comes back as a state dict and is scored here, by
the same code and with the same quantized inputs as jointopt's, so that formats and bytes are equal; bitsandbytes' INT8
and 4-bit formats are its own, and their bytes are stated. Inputs of LLM.int8 are those of its kernels.

jointopt's row is the way (to nearest, GPTQ, descent, GPTQ after scaling channels by SmoothQuant or AWQ, learned
rounding with or without SmoothQuant's scaling) whose KL divergence from the original on the calibration batches is
least. Its seconds are those of that way, calibration included. The row of "jointopt trained" is `finish` by --steps of
training on the same samples and nothing else. The aim of a KL is the best neighbour's; as a mean over what is
evaluated it has a standard error. A neighbour that cannot do a case, or takes longer than --limit seconds, has no row
but a line that says so. Results are kept in --work: a bench that was stopped goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import site
import subprocess
import time
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measures import Measures, command_line
from originals import Case, Original, cases, original
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import nn

import jointopt
from jointopt import Gene, SearchSpace, Supernet
from jointopt.rebuilding.structure import compressed_config, quantized_layers
from quant.errors import JointoptError
from quant.formats import scheme
from search_spaces.families import declare
from search_spaces.precision import fitted_scheme, full_columns

FORMATS = {
    "INT8": "W8A8",
    "INT4": "W4A16",
    "FP8": "FP8_DYNAMIC",
    "NVFP4": "NVFP4",
    "NVFP4A16": "NVFP4A16",
    "MXFP4": "MXFP4",
    "W4A4": "W4A4",
}
OWN_FORMATS = {"INT8": "BNB_INT8", "INT4": "BNB_NF4", "NVFP4A16": "BNB_FP4"}
"""bitsandbytes' nearest to each."""

REQUIREMENTS = {
    "llm-compressor": "llmcompressor>=0.14",
    "auto-round": "auto-round>=0.14",
    "torchao": "torchao>=0.14",
    "bitsandbytes": "bitsandbytes>=0.48",
}
NEIGHBOURS = {
    "llm-compressor GPTQ": tuple(FORMATS),
    "llm-compressor AWQ": ("INT4",),
    "auto-round": tuple(FORMATS),
    "torchao": tuple(FORMATS),
    "bitsandbytes": tuple(OWN_FORMATS),
}
"""Tool -> the formats that it is tried at."""

OWN = ("jointopt", "jointopt trained")

Metrics = dict[str, float]


@dataclass(frozen=True)
class Subject:
    """An original in one scheme.

    Attributes:
        genome: of the super-network, whose only one it is.
    """

    supernet: Supernet
    genome: Any

    @property
    def megabytes(self) -> float:
        return self.supernet.costs(self.genome)["size"] / 1e6


def subject(given: Original, name: str, transforms: tuple[str, ...] = ()) -> Subject:
    """The original with each layer of its blocks that can take the scheme in it: groups of 64, or 32 where 64 does not
    divide. Nothing is sorted, so that weights stay where other tools find them."""
    prepared, family = declare(given.model)
    genes = []
    for layer in family.layers:
        module = prepared.get_submodule(layer.path)
        columns = full_columns(module)
        weights = scheme(name).weights
        assert weights is not None
        open_group = weights.granularity == "group" and weights.group_size is None
        wanted = f"{name}_G{64 if columns % 64 == 0 else 32}" if open_group else name
        try:
            fitted_scheme(wanted, layer, module, [columns])
        except JointoptError:
            continue
        if layer.block is not None:
            genes.append(Gene(f"{layer.name}.precision", (wanted,)))
    if not genes:
        raise JointoptError(f"no layer of the model can be in {name}")
    options: dict[str, Any] = {"transforms": transforms} if transforms else {}
    supernet = Supernet(given.model, SearchSpace(genes), **options)
    supernet.weights_changed()
    supernet.calibrate(given.calibrate)
    return Subject(supernet, supernet.space.smallest)


def scored(given: Original, model: nn.Module) -> Metrics:
    """With the standard error of the KL, which comes from the choice of the samples that are evaluated."""
    found = given.quality(model)
    return {**found, "KL error": found.errors["kl"]}


WAYS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "nearest": ((), None),
    "gptq": ((), "gptq"),
    "descent": ((), "descent"),
    "learned": ((), "learned"),
    "smooth, gptq": (("smooth",), "gptq"),
    "awq, gptq": (("awq",), "gptq"),
    "smooth, learned": (("smooth",), "learned"),
    "rotate, gptq": (("rotate",), "gptq"),
}
"""Name -> transforms of the super-network, and what `finish` rounds by (None: to nearest)."""
USUAL_WAYS = [way for way in WAYS if way != "rotate, gptq"]


def ours(name: str, given: Original, ways: list[str] | None) -> Metrics:
    """The best of jointopt's ways by its KL on the calibration batches; each is printed with what it scores."""
    best: Metrics = {}
    least = float("inf")
    for way in ways or USUAL_WAYS:
        transforms, rounding = WAYS[way]
        started = time.perf_counter()
        try:
            wanted = subject(given, FORMATS[name], transforms)
        except JointoptError as error:
            print(f"  {way}: {error}", flush=True)
            continue
        if rounding is None:
            model = wanted.supernet.extract(wanted.genome)
        else:
            model = jointopt.finish(wanted.supernet, wanted.genome, given.calibrate, rounding).model
        seconds = time.perf_counter() - started
        divergence = given.calibration_quality(model)["kl"]
        metrics = {**scored(given, model), "seconds": seconds, "MB": wanted.megabytes}
        print(
            f"  {way}: KL {divergence:.4g} calibrating, {metrics['kl']:.4g} ± {metrics['KL error']:.2g} evaluating",
            flush=True,
        )
        if divergence < least:
            best, least = metrics, divergence
    return best


def trained(name: str, given: Original, steps: int) -> Metrics:
    """Finished by training on the calibration samples, without their labels."""
    started = time.perf_counter()
    wanted = subject(given, FORMATS[name])
    model = jointopt.finish(wanted.supernet, wanted.genome, given.train, steps=steps).model
    seconds = time.perf_counter() - started
    return {**scored(given, model), "seconds": seconds, "MB": wanted.megabytes}


def theirs(tool: str, name: str, given: Original, arguments: argparse.Namespace) -> Metrics:
    """A neighbour's result, quantized in its own environment and scored here.

    Raises:
        RuntimeError: it failed or took too long; one line that says how.
    """
    wanted = subject(given, OWN_FORMATS[name] if tool == "bitsandbytes" else FORMATS[name])
    model, megabytes, layers = wanted.supernet.extract(wanted.genome), wanted.megabytes, len(wanted.supernet.space)
    del wanted
    out = arguments.work / f"{given.folder.name}-{name}-{tool.replace(' ', '-')}"
    out.mkdir(parents=True, exist_ok=True)
    job = {
        "tool": tool,
        "folder": str(given.folder),
        "calibrate": str(out / "calibrate.safetensors"),
        "out": str(out),
        "causal": "Causal" in type(given.model).__name__,
        "iterations": arguments.iterations,
        **formats_of(model),
    }
    save_file(
        {f"{at}.{key}": value for at, batch in enumerate(given.calibrate) for key, value in batch.items()},
        job["calibrate"],
    )
    (out / "job.json").write_text(json.dumps(job))
    python = environment(tool.split()[0], arguments.environments)
    command = [str(python), "-P", str(Path(__file__).with_name("neighbours.py")), str(out / "job.json")]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=arguments.limit, cwd=out)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"stopped after {arguments.limit} s") from None
    (out / "log.txt").write_text(done.stdout + done.stderr)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "Error" in line.partition(":")[0] or "ERROR" in line]
        raise RuntimeError(lines[-1][:300] if lines else f"ended with exit code {done.returncode}")
    result = json.loads((out / "result.json").read_text())
    if result["layers"] < layers:
        raise RuntimeError(f"quantized {result['layers']} of {layers} layers, and said nothing")
    weights = load_file(out / "weights.safetensors")
    (out / "weights.safetensors").unlink()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(weights[key])
    return {**scored(given, model), "seconds": result["seconds"], "MB": megabytes}


def formats_of(model: nn.Module) -> dict[str, Any]:
    """What the job says of the layers: in compressed-tensors' words, and bitsandbytes' name of its format."""
    layers = quantized_layers(model)
    kinds = {module.scheme.bitsandbytes for module in layers.values()}
    if kinds == {None}:
        return {"config_groups": compressed_config(model, names=True)["config_groups"]}
    group = {"targets": list(layers), "weights": {}, "input_activations": None}
    return {"config_groups": {"group_0": group}, "bitsandbytes": kinds.pop()}


def environment(name: str, folder: Path) -> Path:
    """The Python of a tool's environment, made over the packages of this one where it is not there."""
    place = folder / name
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        packages = next(place.glob("lib/python*/site-packages"))
        (packages / "over.pth").write_text("\n".join(site.getsitepackages()))
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", REQUIREMENTS[name]], check=True)
    return python.absolute()


class Results:
    """case -> its metrics, or what was wrong; kept in a file."""

    def __init__(self, path: Path):
        self.path = path
        self.found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def measured(self, case: str, run: Callable[[], Metrics]) -> Any:
        if case not in self.found:
            print(f"{case} ...", flush=True)
            gc.collect()
            try:
                self.found[case] = run()
            except (RuntimeError, JointoptError) as error:
                self.found[case] = " ".join(str(error).split())
            self.path.write_text(json.dumps(self.found, indent=1))
            print(f"{case}: {self.found[case]}", flush=True)
        return self.found[case]


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/originals")
    parser.add_argument("--case", choices=["minilm", "vit", "resnet", "smollm2"], action="append", help="default: all")
    parser.add_argument("--format", choices=FORMATS, action="append", help="default: all")
    parser.add_argument("--tool", choices=[*OWN, *NEIGHBOURS], action="append", help="default: all")
    parser.add_argument("--way", choices=WAYS, action="append", help="of jointopt's; default: all but rotate")
    parser.add_argument("--steps", type=int, default=64, help="of jointopt trained (default 64)")
    parser.add_argument("--environments", type=Path, default=Path("runs/quantizers/environments"))
    parser.add_argument("--limit", type=int, default=480, help="seconds that a neighbour may take for a case")
    parser.add_argument("--iterations", type=int, default=200, help="auto-round's; 200 is its default")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    results = Results(arguments.work / "results.json")
    tools = arguments.tool or [*OWN, *NEIGHBOURS]
    for model in arguments.case or ["minilm", "vit", "resnet", "smollm2"]:
        case = cases(arguments.assets)[model]
        given = original(model, case, arguments.assets, arguments.work)
        results.measured(f"{model}/original", lambda given=given: scored(given, given.model))
        for name in arguments.format or FORMATS:
            for tool in tools:
                if tool == "jointopt":
                    results.measured(f"{model}/{name}/{tool}", lambda: ours(name, given, arguments.way))  # noqa: B023
                elif tool == "jointopt trained":
                    results.measured(f"{model}/{name}/{tool}", lambda: trained(name, given, arguments.steps))  # noqa: B023
                elif name in NEIGHBOURS[tool]:
                    results.measured(f"{model}/{name}/{tool}", lambda: theirs(tool, name, given, arguments))  # noqa: B023
    show(results.found, cases(arguments.assets))
    keep(results.found, cases(arguments.assets), Measures(arguments.json))


def best_neighbour(found: dict[str, Any], case: str, measure: str, better: Callable) -> float | None:
    """The best value of a measure that another tool reaches in the same model and format."""
    model, name, _ = case.split("/")
    others = [f"{model}/{name}/{tool}" for tool in NEIGHBOURS]
    values = [found[other][measure] for other in others if isinstance(found.get(other), dict)]
    return better(values) if values else None


def show(found: dict[str, Any], known: dict[str, Case]) -> None:
    title = "uniform formats; KL in nats from the original"
    table = Table("model", "format", "tool", "quality", "KL", "seconds", "MB", title=title)
    missing = []
    for case, result in sorted(found.items(), key=lambda item: item[0].split("/")[:2]):
        if not isinstance(result, dict):
            missing.append(f"{case}: {result}")
            continue
        model, name, *tool = case.split("/")
        quality = f"{known[model].metric} {result[known[model].metric]:.4g}"
        cost = (f"{result['seconds']:.1f}", f"{result['MB']:.3f}") if tool else ("", "")
        table.add_row(model, name, *(tool or ("",)), quality, f"{result['kl']:.4g} ± {result['KL error']:.2g}", *cost)
    console = Console()
    console.print(table)
    for line in missing:
        console.print(f"no row: {line}", markup=False)


def keep(found: dict[str, Any], known: dict[str, Case], measures: Measures) -> None:
    for case, result in found.items():
        if not isinstance(result, dict):
            continue
        model, *_, tool = case.split("/")
        metric = known[model].metric
        wanted = {metric: "lower" if metric == "perplexity" else "higher"}
        wanted |= dict.fromkeys(("kl", "KL error", "seconds", "MB"), "lower")
        for measure, better in wanted.items():
            if measure in result:
                aimed = tool in OWN and measure in (metric, "kl")
                aim = best_neighbour(found, case, measure, min if better == "lower" else max) if aimed else None
                measures.keep(case, measure, result[measure], aim, better)


if __name__ == "__main__":
    main()
