"""Quantized caches: their arithmetic, the bytes they take, and attention on them in view, extraction and export."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet
from jointopt.rebuilding.held_cache import joined, packed, split, unpacked
from quant.cache import CACHE_FORMATS, KeyObserver
from quant.reference import fake_quantize
from tests.test_three_are_one import three_are_one
from tests.zoo import batches, logits, make

KEPT = ("INT8", "INT4", "FP8", "FP4")
ALL = tuple(CACHE_FORMATS)


def llama(name: str = "llama_tied", caches: tuple[str, ...] = ALL, **options) -> Supernet:
    model = make(name)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"], caches=caches, **options))
    supernet.calibrate(batches(name))
    return supernet


def with_caches(supernet: Supernet, name: str, **others):
    """The largest genome with all its caches in one format."""
    genome = supernet.space.largest
    for at, gene in enumerate(supernet.space.genes):
        if gene.name.endswith(".cache"):
            genome[at] = gene.choices.index(name)
        if gene.name in others:
            genome[at] = gene.choices.index(others[gene.name])
    return supernet.space.canonical(genome)


@pytest.mark.parametrize("name", KEPT)
def test_a_value_vector_is_held_as_the_reference_rounds_a_channel(name):
    form = CACHE_FORMATS[name]
    values = torch.randn(2, 3, 5, 32, generator=torch.Generator().manual_seed(0))
    held = unpacked(form.element, *packed(values, form.element))
    expected = fake_quantize(values.reshape(-1, 32), form.format("channel")).reshape(values.shape)
    torch.testing.assert_close(held, expected, rtol=0, atol=0)


@given(st.integers(0, 2**31 - 1), st.sampled_from(KEPT), st.floats(-12, 12))
def test_stored_bytes_give_the_held_values_again(seed, name, magnitude):
    element = CACHE_FORMATS[name].element
    values = torch.randn(2, 2, 3, 8, generator=torch.Generator().manual_seed(seed)) * 10**magnitude
    parts = packed(values, element)
    stored = joined(*parts)
    assert stored.dtype == torch.uint8
    assert torch.equal(unpacked(element, *split(stored, element)), unpacked(element, *parts))


@pytest.mark.parametrize("element", ["int8", "fp8_e4m3"])
def test_one_token_of_one_head_is_split_again_whatever_its_strides(element):
    codes, scale = torch.arange(4, dtype=torch.uint8)[None, None, None], torch.full((1, 1, 1, 1), 0.5)
    zero_point = None if element == "fp8_e4m3" else torch.full((1, 1, 1, 1), -3.0)
    stored = joined(codes, scale, zero_point)
    odd = torch.empty_strided(stored.shape, (35, 35, 35, 1), dtype=torch.uint8).copy_(stored)
    found, again, point = split(odd, element)
    assert torch.equal(found, codes) and float(again) == 0.5 and float(point) == (0.0 if zero_point is None else -3.0)


@pytest.mark.parametrize("name", KEPT)
def test_zeros_are_held_as_zeros(name):
    element = CACHE_FORMATS[name].element
    assert not unpacked(element, *packed(torch.zeros(1, 1, 2, 8), element)).any()


def test_more_bits_are_closer_to_the_unquantized_cache():
    supernet = llama()
    batch = batches("llama_tied", seed=1)[0]
    exact = logits(supernet.extract(supernet.space.largest), batch)
    error = {n: float((logits(supernet.extract(with_caches(supernet, n)), batch) - exact).norm()) for n in ALL}
    assert error["none"] == 0 < error["INT8"] < error["INT4"]
    assert 0 < error["FP8"] < error["FP4"]
    assert 0 < error["X_INT8"] < error["X_INT4"]


@pytest.mark.parametrize("name", ALL)
def test_a_token_takes_the_bytes_in_a_real_cache_that_the_cost_says(name):
    supernet = llama()
    genome = with_caches(supernet, name)
    with supernet.active(genome) as view, torch.no_grad():
        cache = view(**batches("llama_tied", size=3)[0], use_cache=True).past_key_values
    found = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / (3 * 16)
    if CACHE_FORMATS[name].inputs:  # what stands for the inputs is kept as the keys and values computed from them
        assert supernet.costs(genome)["cache"] == 3 * (128 * CACHE_FORMATS[name].kind.bits // 8 + 3)
    else:
        assert supernet.costs(genome)["cache"] == found


@pytest.mark.parametrize(
    ("name", "stored"), [("INT8", 3), ("INT4", 3), ("FP8", 2), ("FP4", 2), ("X_INT8", 0), ("X_INT4", 0)]
)
def test_a_checkpoint_stores_the_keys_scales_and_zero_points_and_nothing_for_cached_inputs(name, stored):
    supernet = llama()
    plain, held = (supernet.costs(with_caches(supernet, each))["size"] for each in ("none", name))
    assert held - plain == 3 * 64 * stored  # bytes, of each channel of the keys of three layers


def test_cached_inputs_cost_their_keys_and_values_again_for_each_new_token():
    supernet = llama()
    plain, inputs = (supernet.costs(with_caches(supernet, name)) for name in ("none", "X_INT4"))
    assert inputs["decode_macs"] - plain["decode_macs"] == 3 * 16 * 2 * 64 * 128
    assert inputs["macs"] == plain["macs"]


def test_decoding_one_more_token_costs_its_layers_and_the_products_with_the_context():
    supernet = llama()
    layers = 3 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256) + 96 * 128
    assert supernet.costs(supernet.space.largest)["decode_macs"] == layers + 3 * 2 * 17 * 128


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("model", ["llama_tied", "mistral"])
def test_generating_token_by_token_gives_what_one_pass_gives(model, name):
    supernet = llama(model)
    # In double precision, so that a last bit that depends on the number of tokens does not turn into another code.
    model = supernet.extract(with_caches(supernet, name)).double()
    ids = batches("llama_tied", size=2)[0]["input_ids"]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        step = model(input_ids=ids[:, :10], use_cache=True)
        parts = [step.logits]
        for at in range(10, 16):
            step = model(input_ids=ids[:, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["dynamic", "static", "none"])
def test_every_kind_of_cache_gives_the_same(kind):
    from transformers import StaticCache

    supernet = llama()
    model = supernet.extract(with_caches(supernet, "INT4"))
    ids = batches("llama_tied", size=2)[0]["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        options = {"use_cache": kind != "none"}
        if kind == "static":
            options["past_key_values"] = StaticCache(config=model.config, max_cache_len=16)
        torch.testing.assert_close(model(input_ids=ids, **options).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_cache_of_codes_that_was_saved_goes_on_as_it_would_have():
    supernet = llama()
    model = supernet.extract(with_caches(supernet, "INT4"))
    ids = batches("llama_tied", size=2)[0]["input_ids"]
    with torch.no_grad():
        begun = model(input_ids=ids[:, :10], use_cache=True).past_key_values
        again = pickle.loads(pickle.dumps(begun))
        expected = model(input_ids=ids[:, 10:], past_key_values=begun).logits
        assert torch.equal(model(input_ids=ids[:, 10:], past_key_values=again).logits, expected)


def test_beams_and_crops_work_on_codes():
    supernet = llama()
    model = supernet.extract(with_caches(supernet, "INT4"))
    ids = batches("llama_tied", size=1)[0]["input_ids"]
    beams = model.generate(input_ids=ids, max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    assert beams.shape == (1, 21)


def test_heads_that_leave_take_their_constants_along():
    supernet = llama(caches=("none", "INT8"), heads=[2, 4])
    genome = with_caches(supernet, "INT8", **{"block0.heads": 2})
    with supernet.active(genome) as view:
        assert view.model.layers[0].self_attn.key_scale.shape == (1, 32)
        assert view.model.layers[1].self_attn.key_scale.shape == (2, 32)


def test_constants_follow_their_heads_when_these_are_sorted():
    first, again = (llama("llama_untied", caches=("none", "INT8")) for _ in range(2))
    batch = batches("llama_untied", seed=1)[0]
    one, other = (logits(s.extract(with_caches(s, "INT8")), batch) for s in (first, again))
    model = make("llama_untied")
    unsorted = Supernet(model, first.space)
    unsorted.trained = True
    unsorted.calibrate(batches("llama_untied"))
    assert torch.equal(one, other)
    # In double precision, so that another order of sums does not turn into another code.
    sorted_, plain = (logits(s.extract(with_caches(s, "INT8")).double(), batch) for s in (first, unsorted))
    torch.testing.assert_close(sorted_, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama_tied", "qwen3", "mistral"])
def test_view_extracted_and_reloaded_are_one_with_quantized_caches(name, tmp_path):
    three_are_one(name, 4, tmp_path, caches=ALL)


@pytest.mark.parametrize(("name", "stored"), [("llama_tied", "uint8"), ("mistral", "float32")])
def test_a_reloaded_export_generates_on_stored_codes_or_under_a_sliding_window_on_values(name, stored, tmp_path):
    supernet = llama(name)
    genome = with_caches(supernet, "INT4")
    folder = jointopt.export(supernet, genome, tmp_path / "small")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()\n"
        f"out = model.generate(torch.arange(3, 19)[None], return_dict_in_generate=True, **{options})\n"
        f"assert out.past_key_values.layers[0].keys.dtype == torch.{stored}\n"
        "print(out.sequences.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    model = supernet.extract(genome)
    ids = expected = torch.arange(3, 19)[None]
    assert done.stdout.strip().splitlines()[-1] == str(model.generate(ids, **options).tolist())
    for _ in range(6):  # each token by a pass of its own over all before it, without any cache
        with torch.no_grad():
            scores = model(input_ids=expected, use_cache=False).logits[0, -1]
        scores[model.generation_config.eos_token_id] = -torch.inf
        expected = torch.cat([expected, scores.argmax().view(1, 1)], dim=1)
    assert done.stdout.strip().splitlines()[-1] == str(expected.tolist())


def test_the_range_of_each_channel_of_keys_is_that_of_all_batches():
    keys = torch.randn(30, 2, 8, generator=torch.Generator().manual_seed(0))
    keys[:10] *= 3
    for parts in (keys.split(10), keys.flip(0).split(10)):
        observer = KeyObserver()
        for part in (*parts, keys[:0]):
            observer.observe(part)
        assert torch.equal(observer.low, keys.amin(0)) and torch.equal(observer.high, keys.amax(0))


def test_padding_does_not_enter_the_ranges_of_keys():
    model = make("llama_tied")
    space = SearchSpace.for_model(model, schemes=["none"], caches=["INT8"])
    ids = batches("llama_tied", count=1)[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    scales = []
    for last in (3, 90):
        filled = ids.clone()
        filled[:, 12:] = last
        supernet = Supernet(model, space)
        supernet.calibrate([{"input_ids": filled, "attention_mask": mask}])
        with supernet.active(supernet.space.largest) as view:
            scales.append(view.model.layers[0].self_attn.key_scale)
    assert torch.equal(*scales)


@pytest.mark.parametrize(
    ("name", "caches", "said"),
    [
        ("llama_tied", ["INT9"], "cache format: found 'INT9'; did you mean"),
        ("llama_tied", [], "space.caches: found an empty list"),
        ("bert", ["INT8"], "the bert family has no cache"),
    ],
)
def test_caches_that_cannot_be_are_refused(name, caches, said):
    with pytest.raises(JointoptError, match=said):
        SearchSpace.for_model(make(name), caches=caches)


def test_a_cache_that_was_not_calibrated_is_refused_by_name():
    model = make("llama_tied")
    supernet = Supernet(model, SearchSpace.for_model(model, caches=["none", "INT8"]))
    with (
        pytest.raises(JointoptError, match=r"model\.layers\.0\.self_attn.*calibrate"),
        supernet.active(with_caches(supernet, "INT8")),
    ):
        pass


def test_the_bytes_of_the_cache_can_be_an_objective():
    supernet = llama(caches=("none", "INT8", "INT4"))
    batch = batches("llama_tied", seed=1)[0]
    study = jointopt.search(
        supernet, lambda model: -float(logits(model, batch).var()), ["quality", "cache"], evaluations=12, seed=0
    )
    assert study.front()["cache"].is_monotonic_increasing


def test_a_model_without_a_cache_has_no_such_objective():
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model))
    supernet.calibrate(batches("vit"))
    with pytest.raises(JointoptError, match="'cache'.*no cache"):
        jointopt.search(supernet, lambda model: 0.0, ["quality", "cache"], evaluations=2)
