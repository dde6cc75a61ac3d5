"""A user's own model, declared as the README shows; and a transformers model of a family that nobody declared."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM

import jointopt
from jointopt import Block, Family, JointoptError, Layer, Part, SearchSpace, Supernet, Width
from jointopt.checkpoint.reload import load_model
from jointopt.rebuilding.structure import tensors_of
from tests.readme import code, own_model

PIXELS = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def own() -> SimpleNamespace:
    return own_model()


def test_layers_of_other_kinds_stay_whole_and_their_parameters_are_counted(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_embd=64, n_layer=3, n_head=4, n_positions=64)).eval()

    def shorter(model, kept: Sequence[int]) -> None:
        model.config = copy.deepcopy(model.config)
        model.config.n_layer = len(kept)

    def declare(model) -> Family:
        blocks = tuple(Block(f"block{at}", f"transformer.h.{at}") for at in range(len(model.transformer.h)))
        embedding = Layer("embedding", "transformer.wte", "embedding", tied=("lm_head",))
        return Family("gpt2", blocks, (), (embedding,), configure=shorter)

    space = SearchSpace.for_model(model, family=declare, depth=[2, 3], schemes=["none", "W8A16_CHANNEL"])
    with pytest.warns(UserWarning, match="layers of kind Conv1D, whose MACs and time are not counted"):
        supernet = Supernet(model, space, family=declare)
    supernet.calibrate([{"input_ids": torch.randint(96, (4, 12))}])
    for at, genome in enumerate((space.largest, space.smallest)):
        extracted = supernet.extract(genome)
        assert supernet.costs(genome)["parameters"] == sum(each.numel() for each in extracted.parameters())
        verification = jointopt.verify(jointopt.export(supernet, genome, tmp_path / str(at)))
        assert verification.ok, verification.differences


def test_the_declaration_takes_a_few_dozen_lines():
    text = code("A model of your own")
    declaration = text[text.index("def declare") : text.index("mixer = Mixer()")]
    assert len(declaration.splitlines()) < 36


def test_depth_width_and_formats_of_every_block_are_genes(own):
    names = own.space.names
    assert {"depth", "block0.mlp", "block3.mlp.keep", "block2.up.precision", "patches.precision"} <= set(names)
    assert own.space.genes[names.index("block0.mlp")].choices == (32, 64, 128)


def test_a_block_whose_branch_left_hands_its_input_on(own):
    chosen = own.space.decode(own.space.largest)
    genome = own.space.encode({**chosen, **{f"block{index}.mlp.keep": False for index in range(4)}})
    with own.supernet.active(genome) as view, torch.no_grad():
        hidden = torch.randn(2, 16, 64)
        block = view.blocks[0]
        mixed = hidden + block.mix(block.mix_norm(hidden).transpose(1, 2)).transpose(1, 2)
        assert torch.equal(block(hidden), mixed)


def test_the_largest_sub_network_computes_what_the_model_does(own):
    with own.supernet.active(own.space.largest) as view, torch.no_grad():
        torch.testing.assert_close(view(PIXELS), own.mixer(PIXELS))


def test_the_view_is_the_extracted_model_and_weighs_what_was_reported(own):
    for genome in own.space.sample(12, seed=0):
        extracted = own.supernet.extract(genome)
        with own.supernet.active(genome) as view, torch.no_grad():
            assert torch.equal(view(PIXELS), extracted(PIXELS))
        stored = sum(tensor.nbytes for tensor in tensors_of(extracted).values())
        assert own.supernet.costs(genome)["size"] == stored


def test_it_is_searched_like_any_other(own):
    with torch.no_grad():
        wanted = own.mixer(PIXELS)

    def closeness(model: nn.Module) -> float:
        return -float((model(PIXELS) - wanted).square().mean())

    before = {name: tensor.clone() for name, tensor in own.mixer.state_dict().items()}
    study = jointopt.search(own.supernet, closeness, evaluations=20, strategy="evolutionary")
    front = study.front()
    assert len(study) == 20 and len(front) > 1 and not study.evaluations()["failed"].notna().any()
    assert study.original["quality"] == 0.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.mixer.state_dict().items())


def test_its_export_for_a_library_is_refused_in_one_line_that_says_why(own, tmp_path):
    with pytest.raises(JointoptError, match=r"export: no library loads a Mixer.*onnxruntime.*extract") as caught:
        jointopt.export(own.supernet, own.space.smallest, tmp_path / "small")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


class Recommender(nn.Module):
    """Ids and numbers in, two named things out."""

    def __init__(self):
        super().__init__()
        self.items, self.up, self.down = nn.Embedding(40, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = (self.items(ids) * weights[..., None]).sum(1)
        return {"taste": self.down(torch.relu(self.up(pooled))), "total": weights.sum(1)}


def declare_recommender(model: nn.Module) -> Family:
    layers = tuple(Layer(name, name, name, tokens=name == "items") for name in ("items", "up", "down"))
    return Family("recommender", (), (Width("hidden", "mlp", 64, (Part("up"),), (Part("down"),)),), layers)


class ByKeyword(Recommender):
    """The same, its layers called by the name of what they take."""

    def forward(self, ids: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
        pooled = (self.items(input=ids) * weights[..., None]).sum(1)
        return {"taste": self.down(input=torch.relu(self.up(input=pooled))), "total": weights.sum(1)}


@pytest.mark.parametrize("rounding", ["gptq", "descent", "learned"])
def test_layers_called_by_keyword_are_finished_like_others(rounding):
    generator = torch.Generator().manual_seed(0)
    batch = {
        "weights": torch.rand(64, 5, generator=generator),
        "ids": torch.randint(0, 40, (64, 5), generator=generator),
    }
    found = []
    for kind in (Recommender, ByKeyword):
        torch.manual_seed(1)
        model = kind()
        space = SearchSpace.for_model(model, family=declare_recommender, schemes=["W4A16_G32"], mlp=[32, 64])
        supernet = Supernet(model, space, family=declare_recommender)
        supernet.calibrate([batch])
        with torch.no_grad():
            found.append(jointopt.finish(supernet, space.largest, [batch], rounding).model(**batch)["taste"])
    assert torch.equal(*found)


def keep_count(model: nn.Module, kept: Sequence[Block]) -> None:
    """GPT-NeoX reads from its config how many blocks there are."""
    model.config = copy.deepcopy(model.config)
    model.config.num_hidden_layers = len(kept)


def declare_neox(model: nn.Module) -> Family:
    blocks, widths, layers = [], [], [Layer("embedding", "gpt_neox.embed_in", "embedding")]
    for index, block in enumerate(model.gpt_neox.layers):
        name, path = f"block{index}", f"gpt_neox.layers.{index}"
        up, down = f"{path}.mlp.dense_h_to_4h", f"{path}.mlp.dense_4h_to_h"
        hidden = block.mlp.dense_h_to_4h.out_features
        blocks.append(Block(name, path))
        widths.append(Width(f"{name}.mlp", "mlp", hidden, (Part(up),), (Part(down),), block=name))
        inside = {"qkv": f"{path}.attention.query_key_value", "out": f"{path}.attention.dense", "up": up, "down": down}
        layers.extend(Layer(f"{name}.{short}", member, f"{name}.{short}", name) for short, member in inside.items())
    layers.append(Layer("head", "lm_head", "head"))
    return Family("gpt_neox", tuple(blocks), tuple(widths), tuple(layers), keep_count)


def test_a_declared_model_of_transformers_is_exported_and_verified(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
    model = GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=96, max_position_embeddings=64, **sizes)).eval()
    schemes = ["none", "W8A8", "W4A16", "NVFP4"]
    space = SearchSpace.for_model(model, schemes, family=declare_neox, depth=[1, 2, 3], mlp=[32, 64, 128])
    supernet = Supernet(model, space, family=declare_neox)
    batch = {"input_ids": torch.randint(0, 96, (4, 16), generator=torch.Generator().manual_seed(0))}
    supernet.calibrate([batch])

    def quality(each: nn.Module) -> float:
        return float(each(**batch).logits.square().mean())

    genome = space.sample(1, seed=0)[0]
    with supernet.active(genome) as view, torch.no_grad():
        expected = quality(view)
    result = jointopt.verify(jointopt.export(supernet, genome, tmp_path / "small"), quality)
    assert result.ok, result.differences
    assert result.metrics["quality"] == pytest.approx(expected, rel=1e-4)


def declare_opt(model: nn.Module) -> Family:
    blocks, widths, layers = [], [], []
    for index, block in enumerate(model.model.decoder.layers):
        name, path = f"block{index}", f"model.decoder.layers.{index}"
        blocks.append(Block(name, path))
        parts = (Part(f"{path}.fc1"),), (Part(f"{path}.fc2"),)
        widths.append(Width(f"{name}.mlp", "mlp", block.fc1.out_features, *parts, block=name))
        layers += [Layer(f"{name}.{each}", f"{path}.{each}", f"{name}.{each}", name) for each in ("fc1", "fc2")]
    return Family("opt", tuple(blocks), tuple(widths), tuple(layers))


def opt_supernet(**options) -> Supernet:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "ffn_dim": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = OPTForCausalLM(OPTConfig(vocab_size=96, max_position_embeddings=64, word_embed_proj_dim=64, **sizes)).eval()
    supernet = Supernet(model, SearchSpace.for_model(model, family=declare_opt, **options), family=declare_opt)
    supernet.calibrate([{"input_ids": torch.randint(3, 96, (4, 12))}])
    return supernet


def test_unequal_blocks_export_though_the_config_calls_their_width_by_another_name(tmp_path: Path):
    supernet = opt_supernet(schemes=["none", "W4A16"], mlp=[64, 128])
    choices = {"block0.mlp": 64, "block1.mlp": 128}
    genome = supernet.space.encode({**supernet.space.decode(supernet.space.largest), **choices})
    result = jointopt.verify(jointopt.export(supernet, genome, tmp_path / "small"))
    assert result.ok, result.differences


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
def test_layers_that_are_given_rows_alone_scale_each_row_after_the_reload_too(scheme, tmp_path: Path):
    supernet = opt_supernet(schemes=["none", scheme], preset="fixed")
    genome = supernet.space.encode(dict.fromkeys(supernet.space.names, scheme))
    batch = {"input_ids": torch.randint(3, 96, (4, 12))}
    with torch.no_grad():
        expected = supernet.extract(genome)(**batch).logits
        found = load_model(str(jointopt.export(supernet, genome, tmp_path / "small")))(**batch).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


class GridBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(64), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Grid(nn.Module):
    """Takes tokens in a row, [N, 16, 64], or as a grid, [N, 4, 4, 64], to the same outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.head = nn.ModuleList(GridBlock() for _ in range(2)), nn.Linear(64, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x).flatten(1, -2)


def declare_grid(model: nn.Module) -> Family:
    blocks, widths, layers = [], [], []
    for index in range(len(model.blocks)):
        name, path = f"block{index}", f"blocks.{index}"
        blocks.append(Block(name, path))
        widths.append(Width(f"{name}.mlp", "mlp", 128, (Part(f"{path}.up"),), (Part(f"{path}.down"),), block=name))
        layers += [Layer(f"{name}.{short}", f"{path}.{short}", f"{name}.{short}", name) for short in ("up", "down")]
    return Family("grid", tuple(blocks), tuple(widths), tuple(layers))


def test_tokens_in_a_grid_are_tokens_in_a_row():
    torch.manual_seed(0)
    grid, tokens = Grid().eval(), torch.randn(6, 16, 64) * torch.logspace(-1, 1, 64)
    schemes = ["none", "W8A8", "W8A8_STATIC", "NVFP4", "MXFP4", "FP8_DYNAMIC"]
    space = SearchSpace.for_model(grid, schemes, family=declare_grid, depth=[1, 2], mlp=[32, 64, 128])
    found = []
    for inputs in (tokens, tokens.unflatten(1, (4, 4))):
        supernet = Supernet(grid, space, family=declare_grid)
        supernet.calibrate([{"x": inputs}])
        for genome in space.sample(12, seed=0):
            with supernet.active(genome) as view, torch.no_grad():
                found.append((view(inputs), supernet.costs(genome)))
    for (in_row, costs), (in_grid, same_costs) in zip(found[:12], found[12:], strict=True):
        torch.testing.assert_close(in_grid, in_row, atol=1e-5, rtol=1e-5)
        assert same_costs == costs


class HalvedLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) / 2


def test_a_layer_that_computes_in_its_own_way_is_refused_with_its_path():
    grid = Grid()
    grid.blocks[1].down = HalvedLinear(128, 64)
    with pytest.raises(JointoptError, match=r"blocks\.1\.down: HalvedLinear computes its output in its own way"):
        SearchSpace.for_model(grid, ["none", "W8A8"], family=declare_grid)


@pytest.mark.parametrize("readers", [("up", "down", "items"), ("absent",)])
def test_readers_that_are_no_declared_layers_or_too_many_are_refused(readers):
    def declared(model: nn.Module) -> Family:
        family = declare_recommender(model)
        return replace(family, layers=(replace(family.layers[0], readers=readers), *family.layers[1:]))

    with pytest.raises(JointoptError, match=rf"items: found readers {', '.join(readers)}; allowed: .* one or two"):
        SearchSpace.for_model(Recommender(), ["none", "W8A8"], family=declared)
