"""The config that `init` writes: read back, it describes the model's default space."""

from __future__ import annotations

from pathlib import Path

import pytest

from jointopt import SearchSpace, load_config
from jointopt.config.starter import starter_config
from jointopt.models import empty_model, find_source
from tests.saved import save_timm
from tests.zoo import make


def written(name: str, place: Path) -> SearchSpace:
    """The space of the config that is written for the model at `name`."""
    file = place / "starter.yaml"
    file.write_text(starter_config(name))
    config = load_config(file)
    assert config.task is not None and config.model == name
    return SearchSpace.for_model(empty_model(find_source(name), config.task), **config.space.options())


@pytest.mark.parametrize("kind", ["vit", "bert", "llama_tied", "llama_untied", "resnet", "resnet_basic"])
def test_it_describes_the_default_space(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path / kind)
    assert written(str(tmp_path / kind), tmp_path) == SearchSpace.for_model(model)


def test_it_describes_the_default_space_of_a_timm_folder(tmp_path):
    folder = str(save_timm(tmp_path / "timm"))
    assert written(folder, tmp_path) == SearchSpace.for_model(empty_model(find_source(folder), "image-classification"))


@pytest.mark.parametrize("name", ["null", "1e5", "0x1f", "a: b # c", "two\nlines"])
def test_a_name_that_yaml_takes_for_something_else_stays_a_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make("bert").save_pretrained(name)
    assert len(written(name, tmp_path)) > 0


def test_stages_of_unequal_width_are_written_as_fractions():
    text = starter_config("timm/resnet18")
    assert "  bottleneck: [0.5, 0.75, 1.0]" in text and "  stage: [0.75, 1.0]" in text and "  depth: [0.5" in text


def test_the_familys_own_preset_is_offered(tmp_path):
    make("bert").save_pretrained(tmp_path / "bert")
    assert "# preset: bert  # or fixed" in starter_config(str(tmp_path / "bert"))
