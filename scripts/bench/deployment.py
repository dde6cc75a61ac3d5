"""What leaves jointopt for ONNX Runtime, beside the original there and in torch: speed, file, memory.

    python scripts/assets.py assets minilm movies smollm2 text
    python scripts/bench/deployment.py --assets assets --json deployment.json

minilm: a super-network fine-tuned on movie snippets, searched for accuracy, latency by the look-up of this machine, and
size, where no more than a point of the whole one's accuracy is lost; the fastest sub-network found there. Against INT8,
as SimQ-NAS (arXiv 2312.13301) states its gains: the fastest and the smallest found that are no less accurate than the
whole architecture with all layers in W8A8, beside that. vit_b and resnet50 (random weights, which take the same time)
and smollm2: the original with all layers in one format, a language model's 512 tokens at once and one more token. All
on one thread (--threads), in turns, medians; memory is what a fresh process has at most.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import networks
import numpy as np
import torch
from loading import Loaded, padded, tune
from measures import Measures, command_line
from networks import all_in
from rich.console import Console
from torch import nn

import jointopt
from jointopt import Lookup, SearchSpace, Supernet
from jointopt.checkpoint.onnx.session import OnnxModel
from jointopt.timing.timers import in_turns

SCHEMES = ("none", "W8A8", "W8A8_STATIC", "W4A16")
UNIFORM = ("W8A8", "W8A8_STATIC_ASYM")
STEPS, EVALUATIONS, TOKENS = 1000, 200, 64


def vit_b() -> tuple[nn.Module, dict]:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig()).eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}


def resnet50() -> tuple[nn.Module, dict]:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig()).eval(), {"pixel_values": torch.randn(1, 3, 224, 224)}


def in_one_format(model: nn.Module, inputs: dict, name: str, work: Path) -> dict[str, Path]:
    """The original in float32, and with every layer that takes it in one format."""
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", *UNIFORM], preset="fixed"))
    supernet.calibrate([inputs])
    paths = {}
    for label, scheme in (("float32", "none"), *zip(UNIFORM, UNIFORM, strict=True)):
        paths[label] = work / f"{name}-{label}"
        if not paths[label].is_dir():
            jointopt.export(supernet, all_in(supernet.space, scheme), paths[label], target="onnxruntime")
    return paths


def searched(arguments: argparse.Namespace) -> tuple[nn.Module, dict, dict[str, Path], dict[str, float]]:
    """MiniLM: the whole super-network's largest in float32 and in INT8, the choices, and their accuracies."""
    network = networks.networks(arguments.assets)["minilm"]
    loaded = Loaded(arguments.assets / "minilm", network.task)
    inputs = loaded.inputs(replace(network.calibrate, length=TOKENS), 64)
    supernet = Supernet(
        loaded.model, SearchSpace.for_model(loaded.model, schemes=SCHEMES, **network.space), repair=True
    )
    tuned, train = arguments.work / "minilm.safetensors", loaded.samples(network.train)
    tune(supernet, tuned, inputs, lambda epoch: train.epoch(epoch, 16, 0), STEPS, learning_rate=1e-4)
    one = padded({key: value[:1] for key, value in inputs[0].items()}, TOKENS)
    lookup = Lookup.of(supernet, 1, context=TOKENS, threads=arguments.threads, path=arguments.work / "operators.json")
    supernet.use_latency(lookup)
    scored = replace(network.evaluate, samples=None, length=32)
    test = replace(scored, path=str(arguments.assets / "movies" / "test.csv"))
    quality, unseen = (loaded.quality(loaded.batches(source, 64)) for source in (scored, test))
    with supernet.active(all_in(supernet.space, "none")) as view:
        least = quality(view)["accuracy"] - 0.01
    study = jointopt.search(
        supernet,
        quality,
        ["accuracy", "latency", "size"],
        evaluations=EVALUATIONS,
        seed=0,
        storage=arguments.work / "minilm.db",
        constraints={"accuracy": f">= {least}"},
    )
    genomes = {"float32": all_in(supernet.space, "none"), "INT8": all_in(supernet.space, "W8A8")}
    whole, frame = genomes["float32"], study.evaluations()
    scores = {}
    for label, genome in genomes.items():
        with supernet.active(genome) as view:
            scores[label] = quality(view)["accuracy"]
    near = frame[frame["accuracy"] >= least].sort_values("latency")
    like = frame[frame["accuracy"] >= scores["INT8"]]
    genomes["chosen"] = np.array(near["genome"].iloc[0])
    if len(like):
        genomes["fastest like INT8"] = np.array(like.sort_values("latency")["genome"].iloc[0])
        sizes = supernet.cost_columns(np.array(list(like["genome"])))["size"]
        genomes["smallest like INT8"] = np.array(like["genome"].iloc[int(sizes.argmin())])
    paths, found = {}, {}
    for label, genome in genomes.items():
        paths[label] = arguments.work / f"minilm-{label.replace(' ', '-')}"
        jointopt.export(supernet, genome, paths[label], target="onnxruntime", overwrite=True)
        with supernet.active(genome) as view:
            found |= {label: quality(view)["accuracy"], f"{label}, unseen": unseen(view)["accuracy"]}
    study.close()
    return supernet.extract(whole), one, paths, found


def timed(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each, all in turns."""
    return dict(zip(calls, in_turns(list(calls.values()), rounds), strict=True))


def peak(folder: Path, threads: int) -> float:
    """Bytes that a process has at most which loads a model and does nothing else with it."""
    script = (
        "import sys, onnxruntime; "
        "onnxruntime.InferenceSession(sys.argv[1] + '/model.onnx', providers=['CPUExecutionProvider']); "
        "print(1024 * int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]))"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def measured(name: str, model: nn.Module, inputs: dict, paths: dict[str, Path], arguments: Any, tell: Callable) -> None:
    """One case: everything beside ONNX Runtime in float32."""
    sessions = {label: OnnxModel(path / "model.onnx", arguments.threads) for label, path in paths.items()}

    @torch.no_grad()
    def in_torch() -> Any:
        return model(**inputs)

    calls: dict[str, Callable[[], Any]] = {"torch float32": in_torch}
    calls |= {label: (lambda each=each: each(**inputs)) for label, each in sessions.items()}
    seconds = timed(calls, arguments.rounds)
    for label, value in seconds.items():
        aim = 3.0 if (name, label) == ("minilm", "chosen") else None
        tell(name, f"{label}: times as fast as ONNX Runtime float32", seconds["float32"] / value, aim, "higher")
    if "INT8" in seconds:
        for label, measure in (("fastest like INT8", "speed"), ("smallest like INT8", "size")):
            if label in seconds:
                sizes = [(paths[each] / "model.onnx").stat().st_size for each in ("INT8", label)]
                gain = seconds["INT8"] / seconds[label] if measure == "speed" else sizes[0] / sizes[1]
                aim = 4.80 if measure == "speed" else 3.44
                tell(name, f"{label}: {measure} against INT8", gain, aim, "higher")
    tell(name, "float32: ms", seconds["float32"] * 1e3, None, "lower")
    for label, path in paths.items():
        tell(name, f"{label}: file, MB", (path / "model.onnx").stat().st_size / 1e6, None, "lower")
        tell(name, f"{label}: process, MB", peak(path, arguments.threads) / 1e6, None, "lower")
    if "input_ids" in inputs and any(each.startswith("past") for each in sessions["float32"].wanted):
        decoded(name, inputs, sessions, arguments, tell)


def decoded(name: str, inputs: dict, sessions: dict[str, OnnxModel], arguments: Any, tell: Callable) -> None:
    """One more token after the whole context."""
    calls = {}
    for label, session in sessions.items():
        output = session(**inputs)
        past = {key.replace("present", "past_key_values"): each for key, each in output.items() if "present" in key}
        feed = {"input_ids": inputs["input_ids"][:, -1:], **past}
        calls[label] = lambda session=session, feed=feed: session(**feed)
    seconds = timed(calls, arguments.rounds)
    for label, value in seconds.items():
        tell(name, f"{label}: one token, times as fast", seconds["float32"] / value, None, "higher")
    tell(name, "float32: one token, ms", seconds["float32"] * 1e3, None, "lower")


def main() -> None:
    parser = command_line(__doc__, assets=True, work="runs/deployment")
    parser.add_argument("--cases", nargs="+", default=["minilm", "vit_b", "resnet50", "smollm2"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    measures = Measures(arguments.json)
    for name in arguments.cases:
        if name == "minilm":
            model, inputs, paths, accuracies = searched(arguments)
            for label, value in accuracies.items():
                measures.tell(name, f"accuracy, {label}", value, None, "higher")
        elif name == "smollm2":
            model = Loaded(arguments.assets / "smollm2", "causal-lm").model
            inputs = {"input_ids": torch.randint(3, 1000, (1, 512))}
            paths = in_one_format(model, inputs, name, arguments.work)
        else:
            model, inputs = {"vit_b": vit_b, "resnet50": resnet50}[name]()
            paths = in_one_format(model, inputs, name, arguments.work)
        measured(name, model, inputs, paths, arguments, measures.tell)
    Console().print(measures.table())


if __name__ == "__main__":
    main()
