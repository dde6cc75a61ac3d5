"""What the README shows is run: its Python for real, its config read, its commands parsed, its tables compared."""

from __future__ import annotations

import ast
import re
import shlex
from inspect import isclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
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

import jointopt
from jointopt import SearchSpace, load_config
from jointopt.cli import _parser
from jointopt.models import empty_model, find_source
from jointopt.targets import TARGETS
from quant.formats import SCHEMES
from search_spaces import family
from search_spaces.families import _TIMM, _TRANSFORMERS
from tests.readme import MEASURED, README, ROOT, Block, blocks, table
from tests.zoo import batches, logits, make

CONFIGS = sorted((ROOT / "scripts" / "configs").glob("*.yaml"))


def by_section(found: list[Block]) -> dict[str, list[Block]]:
    sections: dict[str, list[Block]] = {}
    for block in found:
        sections.setdefault(block.section, []).append(block)
    return sections


def reader() -> dict[str, Any]:
    """What the README takes for granted: a model, batches of its inputs, the same with labels, a function."""
    given = batches("bert")
    labelled = [{**batch, "labels": torch.arange(6) % 3} for batch in given]

    def accuracy(model: nn.Module) -> float:
        return float((logits(model, given[0]).argmax(-1) == labelled[0]["labels"]).float().mean())

    rows = [{name: tensor[at] for name, tensor in labelled[0].items()} for at in range(6)]
    return {"model": make("bert"), "batches": given, "labelled": labelled, "rows": rows, "accuracy": accuracy}


def shortened(text: str) -> str:
    """The same program with fewer repetitions: what 200 evaluations do, 32 do as well."""
    return text.replace("evaluations=200", "evaluations=32").replace("steps=200", "steps=2")


@pytest.fixture
def own_names():
    """Takes away again what a section adds to the known names."""
    known = [SCHEMES, jointopt.strategies.STRATEGIES]
    before = [set(each) for each in known]
    yield
    for each, names in zip(known, before, strict=True):
        for name in each.keys() - names:
            del each[name]


SECTIONS = [
    pytest.param(section, marks=pytest.mark.slow if section == "From Python" else ())
    for section in by_section(blocks("python"))
]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_python_of_a_section_runs(section, tmp_path, monkeypatch, own_names):
    monkeypatch.chdir(tmp_path)
    names = reader()
    for block in by_section(blocks("python"))[section]:
        padded = "\n" * (block.line - 1) + shortened(block.text)
        exec(compile(padded, ROOT / "README.md", "exec"), names)


def test_the_config_is_read_and_shows_every_key(tmp_path):
    (shown,) = blocks("yaml")
    file = tmp_path / "shown.yaml"
    file.write_text(shown.text)
    config = load_config(file)
    for section in (
        config,
        config.data,
        config.data.evaluate,
        config.space,
        config.train,
        config.search,
        config.finish,
    ):
        for key in type(section).model_fields:
            # Commented lines show what excludes something else.
            assert re.search(rf"\b{key}\b", shown.text), f"{key} is not in the README's config"


COMMON = {"--json": "command_line(", "--assets": "assets=True", "--work": "work="}
"""Options that `measures.command_line` declares, and what a benchmark has for each."""
COMMANDS = [line for file in (README, MEASURED) for block in blocks("bash", file) for line in block.text.splitlines()]


@pytest.mark.parametrize("line", dict.fromkeys(COMMANDS))
def test_a_command_is_one_that_there_is(line):
    words = shlex.split(line, comments=True)
    if words[:3] == ["python", "-m", "jointopt"]:
        assert callable(_parser().parse_args(words[3:]).command)
        return
    script = ROOT / words[1]
    assert words[0] in ("bash", "python") and script.is_file()
    for flag in (word for word in words[2:] if word.startswith("--")):
        assert COMMON.get(flag, f'"{flag}"') in script.read_text()


@pytest.mark.parametrize("file", [README, MEASURED])
def test_links_and_pictures_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / file).read_text()):
        assert ((ROOT / file).parent / target).exists(), target


def test_the_picture_of_the_front_is_light():
    assert (ROOT / "scripts/figures/front.png").stat().st_size < 150_000


def test_the_table_of_schemes_is_that_of_the_code():
    rows = table("scheme", "weights")
    assert [name.strip("`") for name, *_ in rows] == list(SCHEMES)
    for name, weights, activations, bits, stored in rows[1:]:
        scheme = SCHEMES[name.strip("`")]
        element = {"int8": "INT8", "int4": "INT4", "fp8_e4m3": "E4M3", "fp8_e5m2": "E5M2", "fp4_e2m1": "E2M1"}
        element |= {"nf4": "NF4", "fp4_bnb": "FP4"}
        assert weights.startswith(element[scheme.weights.element])
        assert bool(activations) == (scheme.activations is not None)
        assert bits == f"{scheme.bits:.4g}"
        by_library = "compressed-tensors" if scheme.compressed is not None and scheme.weights.symmetric else "own file"
        store, _, targets = stored.partition("; ")
        assert store.startswith("bitsandbytes" if scheme.bitsandbytes else by_library)
        names = {scheme.name, f"{scheme.name}_G32"}  # gguf's are of groups of 32 alone
        assert {*targets.split(", ")} - {""} == {t.name for t in TARGETS.values() if names & set(t.schemes or ())}


def test_the_table_of_known_models_is_that_of_the_code():
    transformers, timm = (" ".join(row[at] for row in table("known models")) for at in (1, 2))
    assert set(re.findall(r"`([^`]+)`", transformers)) == set(_TRANSFORMERS)
    assert set(re.findall(r"`([^`]+)`", timm)) == set(_TIMM)


def test_a_declaration_needs_no_import_from_within():
    nouns = {name for name, found in vars(family).items() if isclass(found) and found.__module__ == family.__name__}
    assert nouns <= {*jointopt.__all__}


def test_type_checkers_find_every_public_name_where_it_is():
    checked = next(each for each in ast.parse(Path(jointopt.__file__).read_text()).body if isinstance(each, ast.If))
    imports = [each for each in checked.body if isinstance(each, ast.ImportFrom)]
    found = {name.asname: each.module for each in imports for name in each.names}
    assert found == {"strategies": "jointopt", **jointopt._HOME}


def test_every_public_name_has_a_docstring():
    for name in jointopt.__all__:
        assert len((getattr(jointopt, name).__doc__ or "").split()) > 8, name


def named_by(config: Path) -> nn.Module:
    """The architecture that an example config names, without weights."""
    with torch.device("meta"):
        if config.stem == "bert":
            sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
            return BertForSequenceClassification(BertConfig(**sizes))
        if config.stem == "llama":
            sizes = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
            return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=1536, tie_word_embeddings=True))
        if config.stem == "resnet":
            return ResNetForImageClassification(ResNetConfig(num_labels=3))
        if config.stem == "quickstart":
            sizes = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
            return ViTForImageClassification(ViTConfig(image_size=8, patch_size=2, num_labels=10, **sizes))
    return empty_model(find_source(load_config(config).model), "image-classification")


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_an_example_config_is_read_and_its_space_fits_its_model(path):
    config = load_config(path)
    space = SearchSpace.for_model(named_by(path), **config.space.options())
    assert space.count() > config.search.evaluations
    assert config.output.startswith("runs/")


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_an_example_config_that_runs_on_assets_names_the_command(path):
    text = path.read_text()
    needed = set(re.findall(r"runs/assets/(\w+)", text)) - {"vit"}
    if path.stem == "quickstart":
        assert "scripts/assets.py runs/assets digits" in (ROOT / "scripts/quickstart.sh").read_text()
    elif needed:
        (names,) = re.findall(r"scripts/assets.py runs/assets (.*)", text)
        assert set(names.split()) == needed
