"""Rotations and scalings of a super-network: its function stays, in every sub-network, and its outliers go."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet
from jointopt.config.config import load_config
from jointopt.supernet.transforms import TRANSFORMS, rotate_heads, rotate_stream, scale_link
from quant.formats import SCHEMES
from quant.reference import fake_quantize
from quant.rotations import hadamard, mean_keeping_rotation, rotation
from quant.smoothing import awq_scale, smooth_scale
from tests.zoo import MODELS, RELATIVES, batches, logits, make

ALLOWED = {
    **dict.fromkeys(("llama_tied", "llama_untied", "mistral", "qwen2", "qwen3", "vit", "deit", "timm_vit"), TRANSFORMS),
    **dict.fromkeys(("bert", "roberta", "electra", "distilbert"), ("rotate_heads", "smooth", "awq")),
    **dict.fromkeys(("resnet", "resnet_basic", "timm_resnet", "timm_resnet_basic"), ("smooth", "awq")),
}
CASES = [(name, each) for name, allowed in ALLOWED.items() for each in allowed if each != "awq"]


@given(st.sampled_from([1, 2, 4, 12, 20, 28, 36, 60, 64, 80, 96, 128, 144, 192, 384, 576]))
def test_a_hadamard_matrix_has_orthogonal_rows_of_ones(order):
    matrix = hadamard(order)
    assert matrix is not None and torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@given(st.integers(1, 100))
def test_rotations_of_every_order_are_orthogonal_and_one_of_them_keeps_the_mean(order):
    unit = torch.eye(order, dtype=torch.float64)
    for make_one in (rotation, mean_keeping_rotation):
        turn = make_one(order)
        torch.testing.assert_close(turn @ turn.T, unit)
    torch.testing.assert_close(turn.sum(1), unit.sum(1))


def test_what_one_channel_holds_is_spread_over_all():
    outlier = torch.zeros(576, dtype=torch.float64)
    outlier[3] = 100
    assert (outlier @ rotation(576)).abs().max() <= 100 / 576**0.5 + 1e-9
    assert (outlier @ mean_keeping_rotation(576)).abs().max() < 25


@given(st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.01, 100)), min_size=1, max_size=8))
def test_smoothing_makes_activations_and_weights_equally_large_and_is_done_once(ranges):
    inputs, weights = torch.tensor(ranges).T
    scale = smooth_scale(inputs, weights)
    torch.testing.assert_close(inputs / scale, weights * scale)
    torch.testing.assert_close(smooth_scale(inputs / scale, weights * scale), torch.ones_like(scale))


def test_channels_that_are_never_used_or_read_are_not_scaled():
    assert torch.equal(smooth_scale(torch.tensor([0.0, 2.0]), torch.tensor([3.0, 0.0])), torch.ones(2))


def test_awq_loses_less_than_rounding_as_it_is():
    torch.manual_seed(0)
    weight, form = torch.randn(32, 64), SCHEMES["W4A16"].fitted([64]).weights
    inputs = torch.randn(100, 64) * torch.logspace(-1, 1.5, 64)
    scale = awq_scale(inputs.abs().mean(0), torch.arange(64), [(weight, inputs, form)])

    def error(held: torch.Tensor) -> float:
        return float((inputs @ (held - weight).T).square().sum())

    assert error(fake_quantize(weight * scale, form) / scale) < 0.7 * error(fake_quantize(weight, form))


def model_of(name: str) -> nn.Module:
    """With normalizations and biases that are not ones and zeros, so that a fold that forgets one is seen."""
    model = make(name)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            for key in ("weight", "bias"):
                tensor = getattr(module, key, None)
                if tensor is not None and tensor.dim() == 1:
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model


def changed(supernet: Supernet, name: str, transform: str) -> None:
    """The transform made on a super-network that is sorted already, so that its sub-networks are the same."""
    if transform == "rotate":
        rotate_stream(supernet.model, supernet.family)
    elif transform == "rotate_heads":
        rotate_heads(supernet.model, supernet.family)
    else:
        generator = torch.Generator().manual_seed(2)
        for link in supernet.family.links:
            channels = supernet.model.get_submodule(link.producer).weight.shape[0]
            scale_link(supernet.model, link, torch.rand(channels, generator=generator) * 3 + 0.2)


@pytest.mark.parametrize(("name", "transform"), CASES)
def test_the_function_of_every_sub_network_is_preserved(name, transform):
    model = model_of(name)
    space = SearchSpace.for_model(model, schemes=["none"])
    supernet = Supernet(model, space)
    if transform == "rotate" and supernet.family.stream.untie:
        supernet = Supernet(model, space, transforms=["rotate"])  # untied, and rotated a second time below
    supernet.calibrate(batches(name))
    genomes = [space.largest, space.smallest, *space.sample(4, seed=0)]
    batch = batches(name, seed=1)[0]
    before = [logits(supernet.extract(genome), batch) for genome in genomes]
    changed(supernet, name, transform)
    for genome, expected in zip(genomes, before, strict=True):
        found = logits(supernet.extract(genome), batch)
        torch.testing.assert_close(found, expected, atol=2e-4 * float(expected.abs().max()), rtol=1e-3)


@pytest.mark.parametrize("name", [*MODELS, *RELATIVES])
def test_the_whole_model_computes_what_the_original_does_under_all_that_its_family_allows(name):
    allowed = [each for each in ALLOWED[name] if each != "awq"]
    model = model_of(name)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]), transforms=allowed)
    supernet.calibrate(batches(name))
    batch = batches(name, seed=1)[0]
    expected = logits(model, batch)
    with supernet.active(supernet.space.largest) as whole:
        torch.testing.assert_close(logits(whole, batch), expected, atol=5e-4 * float(expected.abs().max()), rtol=1e-3)


def outliers(model: nn.Module) -> nn.Module:
    """Channels of the residual stream a hundred times as large as others, and read by so much smaller weights."""
    with torch.no_grad():
        model.model.embed_tokens.weight[:, [5, 70]] *= 100
        for name, module in model.named_modules():
            if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")):
                module.weight[:, [5, 70]] /= 100
    return model


def spread(supernet: Supernet, name: str) -> float:
    """Largest ratio of a token's largest magnitude to its root mean square, over the inputs of the first q layer."""
    seen: list[torch.Tensor] = []
    with supernet.active(supernet.space.largest) as view:
        view.model.layers[0].self_attn.q_proj.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        logits(view, batches(name)[0])
    return float((seen[0].abs().amax(-1) / seen[0].square().mean(-1).sqrt()).max())


def divergence(supernet: Supernet, expected: torch.Tensor, scheme: str) -> float:
    chosen = supernet.space.decode(supernet.space.largest)
    genome = supernet.space.encode(
        {k: scheme if k.startswith("block") and k.endswith(".precision") else v for k, v in chosen.items()}
    )
    with supernet.active(genome) as view:
        found = logits(view, batches("llama_untied", seed=1)[0]).log_softmax(-1)
    return float((expected.log_softmax(-1).exp() * (expected.log_softmax(-1) - found)).sum(-1).mean())


@pytest.mark.parametrize(("transform", "scheme"), [("rotate", "W8A8_STATIC"), ("smooth", "W8A8")])
def test_outliers_in_the_residual_stream_cost_less(transform, scheme):
    model = outliers(make("llama_untied"))
    space = SearchSpace.for_model(model, schemes=["none", scheme], preset="fixed")
    expected = logits(model, batches("llama_untied", seed=1)[0])
    plain, better = Supernet(model, space), Supernet(model, space, transforms=[transform])
    for supernet in (plain, better):
        supernet.calibrate(batches("llama_untied"))
    assert spread(better, "llama_untied") < 0.7 * spread(plain, "llama_untied")
    assert divergence(better, expected, scheme) < 0.7 * divergence(plain, expected, scheme)


@pytest.mark.parametrize("name", ["bert", "llama_untied"])
def test_the_values_of_each_head_are_rotated_where_that_is_asked_for(name):
    model = make(name)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"]), transforms=["rotate_heads"])
    links = [link for link in supernet.family.links if link.head_dim is not None]
    assert len(links) == 3
    for link in links:
        before, after = (
            each.get_submodule(link.producer).weight.detach().unflatten(0, (-1, link.head_dim))
            for each in (model, supernet.model)
        )
        assert (after - before).norm() > 0.5 * before.norm()
        torch.testing.assert_close(after.mT @ after, before.mT @ before, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama_tied", "bert", "vit", "timm_vit", "resnet"])
def test_an_export_is_the_sub_network_it_was_scored_as(name, tmp_path):
    model = model_of(name)
    allowed = [each for each in ALLOWED[name] if each != "smooth"]
    space = SearchSpace.for_model(model, schemes=["none", "W8A8", "W4A16", "FP8"])
    supernet = Supernet(model, space, transforms=allowed)
    supernet.calibrate(batches(name))
    genome = space.sample(1, seed=3)[0]
    batch = batches(name, seed=1)[0]

    def quality(each: nn.Module) -> float:
        return float(logits(each, batch).square().mean())

    with supernet.active(genome) as view:
        expected = quality(view)
    verification = jointopt.verify(jointopt.export(supernet, genome, tmp_path / name), quality)
    assert verification.ok, verification.differences
    assert verification.metrics["quality"] == pytest.approx(expected, rel=1e-3)
    assert verification.size == supernet.costs(genome)["size"]


def test_a_rotated_tied_head_gets_a_weight_of_its_own_in_the_embeddings_format():
    model = make("llama_tied")
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed")
    supernet = Supernet(model, space, transforms=["rotate"])
    table = model.lm_head.weight
    largest = supernet.costs(space.largest)
    assert largest["size"] - supernet.original_costs()["size"] == table.numel() * 4
    assert supernet.original_costs() == Supernet(model, space).original_costs()
    chosen = space.decode(space.largest) | {"embedding.precision": "W8A8"}
    extracted = supernet.extract(space.encode(chosen))
    assert {extracted.lm_head.scheme.name, extracted.model.embed_tokens.scheme.name} == {"W8A8"}
    assert not extracted.config.tie_word_embeddings and model.config.tie_word_embeddings
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_a_uniform_rotated_sub_network_loads_as_the_stock_class(tmp_path):
    model = make("llama_untied")
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed")
    supernet = Supernet(model, space, transforms=["rotate", "rotate_heads", "smooth"])
    supernet.calibrate(batches("llama_untied"))
    chosen = {g.name: "W8A8" if g.name.startswith("block") else "none" for g in space.genes}
    folder = jointopt.export(supernet, space.encode(chosen), tmp_path / "small")
    assert not (folder / "modeling_jointopt.py").exists()
    assert not jointopt.verify(folder).differences


def test_scales_are_chosen_once_and_again_after_training(tmp_path):
    model = model_of("llama_untied")
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed")
    supernet = Supernet(model, space, transforms=["rotate", "awq"])
    supernet.calibrate(batches("llama_untied"))
    fingerprint = supernet.fingerprint()
    supernet.save(tmp_path / "supernet.safetensors")
    again = Supernet(model, space, transforms=["awq", "rotate"])
    again.load(tmp_path / "supernet.safetensors")
    again.calibrate(batches("llama_untied"))
    assert again.fingerprint() == fingerprint
    again.weights_changed()
    again.calibrate(batches("llama_untied", seed=4))
    assert again.fingerprint() != fingerprint


def test_a_super_network_of_other_transforms_is_another_one(tmp_path):
    model = make("llama_untied")
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed")
    plain, rotated = Supernet(model, space), Supernet(model, space, transforms=["rotate"])
    assert plain.fingerprint() != rotated.fingerprint()
    plain.save(tmp_path / "plain.safetensors")
    with pytest.raises(JointoptError, match=r"saved with transforms none; this super-network has rotate"):
        rotated.load(tmp_path / "plain.safetensors")


def test_what_a_family_does_not_allow_is_refused_by_name():
    def refused(name: str, *transforms: str) -> str:
        model = make(name)
        with pytest.raises(JointoptError) as caught:
            Supernet(model, SearchSpace.for_model(model), transforms=transforms)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "rotate: this bert model has no residual stream" in refused("bert", "rotate")
    assert "allowed here: smooth, awq" in refused("resnet", "rotate_heads")
    assert "did you mean 'smooth'" in refused("bert", "smoth")
    assert "smooth and awq" in refused("vit", "smooth", "awq")


def test_batches_that_can_be_read_once_are_refused():
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model), transforms=["smooth"])
    with pytest.raises(JointoptError, match="smooth reads the batches twice; found a generator; allowed: a list"):
        supernet.calibrate(batch for batch in batches("vit"))


def test_a_bias_of_a_layer_norm_needs_a_bias_to_go_into():
    model = model_of("vit")
    model.vit.layers[1].mlp.fc1.bias = None
    with pytest.raises(JointoptError, match=r"rotate: vit\.layers\.1\.mlp\.fc1 has no bias"):
        Supernet(model, SearchSpace.for_model(model, schemes=["none"], mlp=[128, 256]), transforms=["rotate"])


@pytest.mark.parametrize("name", ["llama_tied", "vit"])
def test_costs_are_known_without_any_weight(name):
    with torch.device("meta"):
        empty = MODELS[name]()
    transforms = ["rotate", "rotate_heads", "smooth"]
    space = SearchSpace.for_model(empty)
    costs = Supernet(empty, space, transforms=transforms).costs(space.smallest)
    assert costs == Supernet(make(name), space, transforms=transforms).costs(space.smallest)


def test_a_config_names_transforms_which_its_record_keeps(tmp_path):
    text = "model: m\ntask: causal-lm\ndata: {calibrate: a.txt, evaluate: b.txt}\noutput: runs/x\n"
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert "transforms" not in load_config(path).record()
    path.write_text(f"{text}transforms: [rotate, smooth]\n")
    assert load_config(path).record()["transforms"] == ["rotate", "smooth"]
    path.write_text(f"{text}transforms: [rotat]\n")
    with pytest.raises(JointoptError, match=r"line 5: transforms.*'rotat'.*rotate"):
        load_config(path)
