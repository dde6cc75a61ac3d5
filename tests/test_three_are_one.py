"""The promise everything rests on: the view, the extracted model and the reloaded export are one model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import jointopt
from jointopt import SearchSpace, Supernet
from jointopt.checkpoint import reload
from tests.zoo import MODELS, RELATIVES, SCHEMES, batches, logits, make

RELOAD = """
import importlib.util, json, sys
import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("reload", sys.argv[1])
reload = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reload)
batch = load_file(sys.argv[3])
outputs = {}
for folder in json.loads(sys.argv[2]):
    with torch.no_grad():
        output = reload.load_model(folder)(**batch)
    outputs[folder] = (output if torch.is_tensor(output) else output.logits).contiguous()
assert not {"jointopt", "search_spaces", "quant"} & set(sys.modules)
save_file(outputs, sys.argv[4])
"""


def reloaded(folders: list[Path], batch: dict[str, torch.Tensor], place: Path) -> dict[str, torch.Tensor]:
    """Outputs of every folder for the batch, from one process in which jointopt is not imported."""
    save_file(batch, place / "batch.safetensors")
    names = json.dumps([str(folder) for folder in folders])
    paths = [reload.__file__, names, str(place / "batch.safetensors"), str(place / "outputs.safetensors")]
    subprocess.run([sys.executable, "-I", "-c", RELOAD, *paths], check=True, capture_output=True, cwd=place)
    return load_file(place / "outputs.safetensors")


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-4 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=1e-4)
    ordered = expected.sort(-1).values
    clear = ordered[..., -1] - ordered[..., -2] > 2 * tolerance
    assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


def three_are_one(name: str, count: int, place: Path, repair: bool = False, **options) -> None:
    model = make(name)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=SCHEMES, **options), repair=repair)
    supernet.calibrate(batches(name))
    batch = batches(name, seed=1)[0]
    expected, folders = {}, []
    for at, genome in enumerate(supernet.space.sample(count, seed=0)):
        with supernet.active(genome) as view:
            seen = logits(view, batch)
        same(logits(supernet.extract(genome), batch), seen)
        folder = jointopt.export(supernet, genome, place / f"{name}-{at}")
        tensors = load_file(folder / "model.safetensors").values()
        assert supernet.costs(genome)["size"] == sum(t.numel() * t.element_size() for t in tensors)
        expected[str(folder)] = seen
        folders.append(folder)
    for folder, output in reloaded(folders, batch, place).items():
        same(output, expected[folder])


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_view_extracted_and_reloaded_are_one_for_twenty_genomes(name, tmp_path):
    three_are_one(name, 20, tmp_path)


@pytest.mark.parametrize("name", RELATIVES)
def test_relatives_of_the_same_layout_are_one_as_well(name, tmp_path):
    three_are_one(name, 2, tmp_path)


@pytest.mark.parametrize("precision_per", ["layer", "block"])
def test_precision_by_layer_and_by_block(precision_per, tmp_path):
    three_are_one("llama_tied", 2, tmp_path, precision_per=precision_per)
