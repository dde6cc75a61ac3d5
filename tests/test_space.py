"""Laws of search spaces, by brute force over small ones; the papers' spaces, on models of the papers' sizes."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
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

from jointopt import Gene, JointoptError, SearchSpace, Supernet
from search_spaces import vit
from search_spaces.family import Family
from tests.zoo import batches, make

CHOICES = ((2, 3, 4), (False, True), ("none", "W8A8", "W4A16"), (0.5,), (None, 1), ((3, 3), (5, 5)), tuple(range(5)))


@st.composite
def spaces(draw: st.DrawFn) -> SearchSpace:
    """Up to six genes, each of which may require several earlier ones, also of those that require others."""
    genes: list[Gene] = []
    for at in range(draw(st.integers(1, 6))):
        needed = draw(st.lists(st.integers(0, at - 1), unique=True, max_size=2)) if at else []
        requires = {}
        for other in needed:
            choices = genes[other].choices
            requires[genes[other].name] = tuple(draw(st.lists(st.sampled_from(choices), unique=True)))
        genes.append(Gene(f"gene{at}", draw(st.sampled_from(CHOICES)), requires))
    return SearchSpace(genes)


def law(test: Callable) -> Callable:
    return settings(max_examples=40, deadline=None)(given(space=spaces(), data=st.data())(test))


def everything(space: SearchSpace) -> np.ndarray:
    """Every vector of indices, canonical or not."""
    return np.array(list(product(*(range(len(gene.choices)) for gene in space.genes))))


def matters(space: SearchSpace, name: str, chosen: Mapping[str, Any]) -> bool:
    """Whether a gene matters, as its docstring has it: what it requires matters too, and has one of those choices."""
    gene = next(gene for gene in space.genes if gene.name == name)
    return all(
        matters(space, other, chosen) and any(chosen[other] is c or chosen[other] == c for c in allowed)
        for other, allowed in gene.requires.items()
    )


def rows(genomes: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(genome) for genome in genomes.tolist()}


@law
def test_active_genes_are_those_whose_conditions_hold(space, data):
    genomes = everything(space)
    genome = genomes[data.draw(st.integers(0, len(genomes) - 1))]
    expected = [matters(space, gene.name, space.decode(genome)) for gene in space.genes]
    assert space.active(genome).tolist() == expected
    assert np.array_equal(space.active(genomes), np.array([space.active(g) for g in genomes]))


@law
def test_canonical_changes_only_what_cannot_matter_and_only_once(space, data):
    genomes = everything(space)
    canonical, active = space.canonical(genomes), space.active(genomes)
    assert np.array_equal(canonical[active], genomes[active])
    assert not canonical[~active].any()
    assert np.array_equal(space.canonical(canonical), canonical)
    assert np.array_equal(space.active(canonical), active)


@law
def test_genomes_are_all_canonical_ones_in_order_and_count_is_their_number(space, data):
    expected = sorted(rows(space.canonical(everything(space))))
    assert [tuple(genome) for genome in space.genomes()] == expected
    assert space.count() == len(expected)


@law
def test_samples_are_canonical_all_different_and_the_same_for_one_seed(space, data):
    n, seed = data.draw(st.integers(0, 30)), data.draw(st.integers(0, 99))
    drawn = space.sample(n, seed)
    assert drawn.dtype == np.int64 and drawn.shape == (min(n, space.count()), len(space))
    assert np.array_equal(space.canonical(drawn), drawn) if len(drawn) else n == 0
    assert len(rows(drawn)) == len(drawn)
    assert np.array_equal(drawn, space.sample(n, seed))
    assert rows(space.sample(space.count() + 5, seed)) == rows(np.array(list(space.genomes())))


@law
def test_decode_and_encode_are_inverse(space, data):
    for genome in space.sample(10, 0):
        chosen = space.decode(genome)
        assert list(chosen) == [gene.name for gene in space.genes]
        assert np.array_equal(space.encode(chosen), genome)
        told = {name: chosen[name] for name, active in zip(chosen, space.active(genome), strict=True) if active}
        assert np.array_equal(space.encode(told), genome)


@law
def test_a_space_survives_json(space, data):
    kept = SearchSpace(space.genes, smallest=space.sample(1, 1)[0], largest=space.sample(1, 2)[0])
    back = SearchSpace.from_dict(json.loads(json.dumps(kept.to_dict())))
    assert back == kept and back.genes == kept.genes
    assert np.array_equal(back.smallest, kept.smallest) and np.array_equal(back.largest, kept.largest)


@law
def test_the_ends_are_canonical_and_as_they_were_told(space, data):
    first, last = everything(space)[[0, -1]]
    assert np.array_equal(space.smallest, space.canonical(first))
    assert np.array_equal(space.largest, space.canonical(last))
    told = SearchSpace(space.genes, smallest=last, largest=first)
    assert np.array_equal(told.smallest, space.largest) and np.array_equal(told.largest, space.smallest)


def chain(links: int, last: int) -> SearchSpace:
    """Each gene matters only where the one before is True: 2^links vectors, links + last genomes."""
    genes = [Gene("link0", (False, True))]
    genes += [Gene(f"link{at}", (False, True), {f"link{at - 1}": (True,)}) for at in range(1, links)]
    return SearchSpace([*genes, Gene("last", tuple(range(last)), {f"link{links - 1}": (True,)})])


def test_a_space_with_few_genomes_among_many_vectors_is_filled():
    space = chain(60, 3)
    assert space.count() == len(list(space.genomes())) == len(space.sample(1000, 0)) == 63


def test_genomes_that_are_hardly_ever_drawn_are_reached_too():
    space = chain(30, 10**6)
    drawn = space.sample(200, 0)
    assert len(rows(drawn)) == 200 and np.array_equal(space.canonical(drawn), drawn)
    assert space.count() == 30 + 10**6


def test_what_matters_is_drawn_evenly():
    space = SearchSpace([Gene("depth", (2, 3)), *(Gene(f"g{n}", tuple(range(5)), {"depth": (3,)}) for n in range(9))])
    drawn = space.sample(4000, 0)
    deep = drawn[drawn[:, 0] == 1]
    assert len(drawn) - len(deep) == 1, "there is one genome without the others"
    for column in deep[:, 1:].T:
        assert max(Counter(column.tolist()).values()) < 1.15 * len(deep) / 5


def test_many_switches_of_one_gene_are_counted_at_once():
    switches = [Gene(f"switch{n}", (False, True)) for n in range(40)]
    space = SearchSpace([*switches, Gene("light", tuple(range(10)), {s.name: (True,) for s in switches})])
    assert space.count() == 2**40 - 1 + 10


def transformer(blocks: int, layers: int) -> SearchSpace:
    """Genes as a large model has them: depth, a keep gene a block, widths and formats that hang on both."""
    genes = [Gene("depth", tuple(range(blocks // 2, blocks + 1)))]
    for block in range(blocks):
        stays = {"depth": tuple(c for c in genes[0].choices if c > block)}
        genes.append(Gene(f"block{block}.keep", (False, True), stays))
        needs = {**stays, f"block{block}.keep": (True,)}
        genes += [Gene(f"block{block}.layer{n}", ("none", "W8A8", "W4A16"), needs) for n in range(layers)]
    return SearchSpace(genes)


def test_the_count_of_a_transformers_space_is_the_sum_over_its_depths():
    blocks, layers = 6, 2
    expected = 0
    for depth in range(blocks // 2, blocks + 1):
        expected += (1 + 3**layers) ** depth
    assert transformer(blocks, layers).count() == expected


def test_four_hundred_genes_take_milliseconds():
    space = transformer(40, 9)
    assert len(space) == 401
    started = time.process_time()
    assert space.count() > 10**150
    drawn = space.sample(500, 0)
    assert np.array_equal(space.canonical(drawn), drawn)
    for genome in drawn[:50]:
        assert np.array_equal(space.encode(space.decode(genome)), genome)
    assert time.process_time() - started < 3


def test_numpys_numbers_are_choices_too():
    space = SearchSpace([Gene("k", np.arange(3)), Gene("m", [np.float64(0.5), 1], {"k": [np.int64(2)]})])
    assert space == SearchSpace.from_dict(json.loads(json.dumps(space.to_dict())))
    assert space.encode({"k": 2, "m": 1}).tolist() == [2, 1]


def test_a_width_that_cannot_be_stored_is_left_out_aloud_and_alone_refused():
    with pytest.warns(UserWarning, match=r"space.mlp: 33 left out, at which a layer cannot take all of none, W4A16"):
        space = SearchSpace.for_model(make("bert"), schemes=["none", "W4A16"], mlp=[33, 64, 128])
    assert space.genes[0].choices == (64, 128)
    with pytest.raises(JointoptError, match=r"space.mlp \(block0.mlp\): found 33, at which a layer cannot take all of"):
        SearchSpace.for_model(make("bert"), schemes=["none", "W4A16"], mlp=[33])


SPACE = SearchSpace([Gene("depth", (2, 3, 4)), Gene("block4.kernel", (3, 5, 7), {"depth": (4,)})])
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no gene": (lambda: SearchSpace([]), "found no gene"),
    "no choice": (lambda: Gene("a", ()), "gene 'a': has no choice"),
    "a choice twice": (lambda: Gene("a", (1, 2, 1)), "gene 'a': found a choice twice"),
    "a choice JSON cannot hold": (lambda: Gene("a", ({1},)), "gene 'a': a choice is of type set; allowed: numbers"),
    "a name twice": (lambda: SearchSpace([Gene("a", (1,)), Gene("a", (2,))]), "gene 'a': found twice"),
    "requires a later gene": (
        lambda: SearchSpace([Gene("a", (1,), {"b": (1,)}), Gene("b", (1,))]),
        "gene 'a': requires 'b', which is no earlier gene",
    ),
    "requires a gene without a choice": (lambda: Gene("a", (1,), {"b": 1}), "gene 'a': found 1 in place of choices"),
    "requires letters": (lambda: Gene("a", (1,), {"b": "relu"}), "gene 'a': found 'relu' in place of choices"),
    "requires a list": (lambda: Gene("a", (1,), ["b"]), "gene 'a': found ['b'] in place of what it requires"),
    "requires itself": (lambda: SearchSpace([Gene("a", (1,), {"a": (1,)})]), "which is no earlier gene"),
    "requires a misspelt gene": (
        lambda: SearchSpace([Gene("depth", (1,)), Gene("b", (1,), {"deptj": (1,)})]),
        "did you mean 'depth'?",
    ),
    "requires a choice that is none": (
        lambda: SearchSpace([Gene("a", (1, 2)), Gene("b", (1,), {"a": (3,)})]),
        "gene 'b': requires 'a' in (3,); its choices are (1, 2)",
    ),
    "a genome too short": (lambda: SPACE.canonical([0]), "found shape (1,); allowed: (2,) or (n, 2)"),
    "no array at all": (lambda: SPACE.decode(SPACE), "genome: found a SearchSpace; allowed: an array of choice"),
    "an index out of range": (lambda: SPACE.active([0, 3]), "gene 'block4.kernel' has index 3; allowed: 0 to 2"),
    "a negative index": (lambda: SPACE.decode([-1, 0]), "gene 'depth' has index -1; allowed: 0 to 2"),
    "indices that are no integers": (lambda: SPACE.validate([0.0, 1.0]), "numbers of type float64; allowed: integers"),
    "many where one is wanted": (lambda: SPACE.decode([[0, 0], [1, 0]]), "found shape (2, 2); allowed: (2,)"),
    "an end that is no genome": (lambda: SearchSpace(SPACE.genes, smallest=[9, 9]), "gene 'depth' has index 9"),
    "an unknown gene": (lambda: SPACE.encode({"dept": 2}), "gene 'dept': not in the space; did you mean 'depth'?"),
    "an unknown choice": (lambda: SPACE.encode({"depth": 5}), "gene 'depth': found 5; allowed: 2, 3, 4"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_space_or_no_genome_of_it_is_refused_in_one_line(what):
    call, expected = BAD[what]
    with pytest.raises(JointoptError) as caught:
        call()
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_smallest_stays_the_smallest_when_blocks_leave_in_another_order():
    """Its formats in blocks that were to leave first are remembered, should they come to stay."""
    space = SearchSpace(
        [Gene("depth", (1, 2)), *(Gene(f"b{n}", ("none", "W4A16"), {"depth": (2,)} if n else {}) for n in range(2))],
        smallest=[0, 1, 1],
    )
    assert space.decode(space.smallest) == {"depth": 1, "b0": "W4A16", "b1": "none"}
    turned = space.replaced(requires={"b0": {"depth": (2,)}})
    assert turned.decode(turned.smallest) == {"depth": 1, "b0": "none", "b1": "W4A16"}


def test_no_genome_of_a_calibrated_model_is_smaller_than_its_smallest():
    model = make("bert", seed=3)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8", "W4A16"]))
    supernet.calibrate(batches("bert", seed=3))
    sizes = supernet.cost_columns(supernet.space.sample(300, 0))["size"]
    assert supernet.costs(supernet.space.smallest)["size"] <= sizes.min()
    assert supernet.costs(supernet.space.largest)["size"] >= sizes.max()


def full(model: Callable[..., nn.Module], config: Any) -> nn.Module:
    """The whole model, without storage."""
    with torch.device("meta"):
        return model(config)


def choices(space: SearchSpace, kind: str) -> list[tuple]:
    """The choices of every gene of a kind."""
    return [gene.choices for gene in space.genes if gene.name.rpartition(".")[2] == kind]


@pytest.fixture(scope="module", params=[("bert", range(6, 13)), ("vit", range(10, 13))], ids=["bert", "vit"])
def encoder(request) -> tuple[SearchSpace, range]:
    preset, depths = request.param
    models = {
        "bert": (BertForSequenceClassification, BertConfig()),
        "vit": (ViTForImageClassification, ViTConfig(num_labels=1000)),
    }
    return SearchSpace.for_model(full(*models[preset]), preset=preset), depths


def test_simq_nas_on_bert_base_and_vit_base(encoder):
    space, depths = encoder
    assert choices(space, "depth") == [tuple(depths)]
    assert choices(space, "heads") == [(6, 8, 10, 12)] * 12
    assert choices(space, "mlp") == [(1024, 2048, 3072)] * 12
    formats = choices(space, "precision")
    assert set(formats) == {("none", "W8A8")}
    assert len(formats) == 12 * 6 + 1, "every linear layer of a block, and the embedding"
    assert len(space) == 1 + 24 + 73


def test_simq_nas_on_the_once_for_all_resnet_50():
    """Widths as multiples that groups of weights divide, so they are near the paper's fractions, not on them."""
    config = ResNetConfig(depths=[4, 4, 6, 4], num_labels=1000)
    space = SearchSpace.for_model(full(ResNetForImageClassification, config), preset="resnet")
    assert choices(space, "depth") == [(2, 3, 4), (2, 3, 4), (4, 5, 6), (2, 3, 4)]
    assert len(choices(space, "bottleneck")) == 18 and len(choices(space, "width")) == 4
    for kind, fractions in (("bottleneck", (0.2 / 0.35, 0.25 / 0.35, 1)), ("width", (0.65, 0.8, 1))):
        for found in choices(space, kind):
            assert np.allclose(np.array(found) / found[-1], fractions, atol=0.055)
            assert all(size % 8 == 0 for size in found)
    assert set(choices(space, "precision")) == {("none", "W8A8")}
    assert len(choices(space, "precision")) == 18 * 3 + 4 + 1


def test_llama_nas_on_llama2_7b():
    space = SearchSpace.for_model(full(LlamaForCausalLM, LlamaConfig()), preset="llama")
    assert choices(space, "depth") == [(24, 28, 32)]
    assert choices(space, "mlp") == [(5504, 11008)] * 32
    assert set(choices(space, "precision")) == {("none", "W8A8")}
    assert len(choices(space, "precision")) == 32 * 4 + 2, "qkv, out, gate and up, down; embedding and head"


def test_the_fixed_preset_leaves_the_architecture_as_it_is():
    space = SearchSpace.for_model(full(BertForSequenceClassification, BertConfig()), preset="fixed", schemes=["W8A16"])
    assert {gene.name.rpartition(".")[2] for gene in space.genes} == {"precision"}


def test_none_says_nothing_and_false_takes_a_preset_s_key_away():
    model = make("vit")

    def kinds(**options: Any) -> set[str]:
        genes = SearchSpace.for_model(model, ["none"], preset="vit", **options).genes
        return {gene.name.rpartition(".")[2] for gene in genes}

    assert kinds(heads=None, keep=None) == kinds() == {"depth", "heads", "mlp"}
    assert kinds(mlp=False) == {"depth", "heads"}


def test_blocks_that_cannot_leave_are_named_though_their_parts_can():
    def staying(model: nn.Module) -> Family:
        found = vit.declare(model)
        return replace(found, blocks=tuple(replace(block, removable=False) for block in found.blocks))

    model = make("vit")
    assert SearchSpace.for_model(model, ["none"], family=staying, mlp_keep=True).names[0] == "block0.mlp.keep"
    with pytest.raises(JointoptError, match=r"space\.keep: the vit family has no block that can leave this way"):
        SearchSpace.for_model(model, ["none"], family=staying, keep=True, mlp_keep=True)


def test_choices_may_be_numpy_s():
    model = make("bert")
    given = {"depth": np.array([1, 2]), "mlp": [np.int64(64), np.float32(1.0)]}
    assert (
        SearchSpace.for_model(model, ["none"], **given).to_dict()
        == SearchSpace.for_model(model, ["none"], depth=[1, 2], mlp=[64, 1.0]).to_dict()
    )


def test_the_middle_is_halfway_and_of_genes_of_two_choices_every_second_one_is_at_its_largest():
    width = (1, 2)
    space = SearchSpace(
        [
            Gene("b0.keep", (False, True)),
            Gene("b1.keep", (False, True)),
            Gene("b0.width", (1, 2, 3), {"b0.keep": (True,)}),
            Gene("b1.width", width, {"b1.keep": (True,)}),
            Gene("b2.width", width),
            Gene("b3.width", width),
        ]
    )
    middle = {"b0.keep": True, "b1.keep": False, "b0.width": 2, "b1.width": 1, "b2.width": 2, "b3.width": 1}
    assert space.decode(space.middle) == middle
    turned = SearchSpace(space.genes, smallest=[0, 0, 2, 1, 1, 1], largest=[1, 1, 0, 0, 0, 0])
    assert turned.decode(turned.middle) == {**middle, "b2.width": 1, "b3.width": 2}
    assert np.array_equal(space.canonical(space.middle), space.middle)
