"""Latency, energy and memory by roofline: how operators add up, and what fits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import jointopt
from jointopt import Family, Gene, JointoptError, Layer, Roofline, SearchSpace, Supernet, load_device
from jointopt.cost.device import Device, Efficiency, LastLevelCache, Network, Power, device_names
from jointopt.cost.expected import expected_cost
from jointopt.cost.operators import Answer, Operator
from jointopt.timing.lookup import operators_of
from search_spaces.families import declare
from tests.on_h100 import FAST, supernet_of
from tests.test_expected_cost import one_hot
from tests.test_supernet import partly_sliding
from tests.zoo import MODELS, batches, make


def long_llama() -> nn.Module:
    """As small as the others, and it says that it takes long texts."""
    model = make("llama_tied")
    model.config.max_position_embeddings = 4096
    return model


WRONG = [("batch", 2.5), ("batch", True), ("batch", 10**20), ("context", 0), ("context", 10**20), ("parallel", 0)]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_roofline_of_no_whole_number_is_refused(name, value):
    with pytest.raises(JointoptError, match=f"roofline: {name}: found {value}; allowed: a whole number from 1"):
        Roofline(FAST.device, **{name: value})


def test_a_bert_looks_up_its_positions_once_whatever_the_batches_of_calibration_and_of_the_device():
    model = make("bert")
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"])
    found = []
    for size in (1, 2, 6):
        supernet = Supernet(model, space, latency=Roofline(load_device("cpu-avx2"), batch=8, context=60))
        supernet.calibrate([{"input_ids": torch.randint(3, 96, (size, 16))} for _ in range(2)])
        found.append(supernet.costs(space.largest))
        looked_up = [each for each in operators_of(supernet, batch=8, context=60) if each.kind == "embedding"]
        assert {(each.positions, each.samples(8)) for each in looked_up} == {(60.0, 8), (60.0, 1)}
    assert found[0] == found[1] == found[2]


def test_norms_within_heads_follow_the_context_and_decode_one_token():
    model = make("qwen3")
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"])
    found = []
    for tokens in (4, 12):
        supernet = Supernet(model, space, latency=Roofline(load_device("h100"), batch=8, context=64))
        supernet.calibrate([{"input_ids": torch.randint(3, 90, (2, tokens))}])
        found.append(supernet.costs(space.largest))
    for name in ("latency", "decode_latency"):
        assert found[0][name] == pytest.approx(found[1][name])


def test_norms_within_heads_take_no_more_than_the_heads_that_are_left_need():
    model = make("qwen3")
    space = SearchSpace.for_model(model, schemes=["none"], heads=[2, 4])

    class Numbers(Roofline):
        def answer(self, operator):  # of a norm: the numbers that it reads
            return Answer(operator.positions * operator.rows if operator.kind == "norm" else 0.0, 0.0)

    supernet = Supernet(model, space, latency=Numbers(FAST.device, context=64))
    supernet.calibrate(batches("qwen3"))
    whole = space.largest.copy()
    half = whole.copy()
    half[space.names.index("block0.heads")] = 0
    for genome, heads in ((whole, 4), (half, 2)):
        parts = {part["path"]: part for part in supernet.breakdown(genome)}
        read = parts["model.layers.0.self_attn.q_norm"]
        width = model.config.head_dim
        assert read["latency"] == 64 * heads * width and read["decode_latency"] == heads * width
        assert parts["model.layers.0.self_attn.k_norm"]["latency"] == 64 * heads // 2 * width
        assert parts["model.layers.1.self_attn.q_norm"]["latency"] == 64 * 4 * width
        found = float(expected_cost(supernet, one_hot(space, genome), "latency"))
        assert found == pytest.approx(supernet.costs(genome)["latency"])


linears = st.builds(
    Operator,
    kind=st.just("linear"),
    rows=st.integers(1, 4096),
    columns=st.integers(1, 4096),
    positions=st.floats(1, 4096),
    weight_bytes=st.floats(1, 1e8),
)


@given(linears, st.integers(1, 64))
def test_a_larger_batch_takes_no_less(operator, batch):
    one, many = (Roofline(FAST.device, n).answer(operator) for n in (1, batch))
    assert one.seconds <= many.seconds * (1 + 1e-9) and one.joules <= many.joules * (1 + 1e-9)


@given(linears, st.sampled_from(device_names()))
def test_no_operator_beats_the_peak_or_the_bandwidth(operator, name):
    device = load_device(name)
    seconds = Roofline(device).answer(operator).seconds
    assert seconds >= 2 * operator.macs / max(device.peak.values())
    assert seconds >= operator.weight_bytes / device.bandwidth


@given(linears)
def test_two_devices_are_faster_but_for_what_they_send_each_other(operator):
    alone, both = (Roofline(FAST.device, 8, parallel=n).answer(operator).seconds for n in (1, 2))
    assert both <= alone
    sending = Roofline(FAST.device, 8, parallel=2).answer(replace(operator, reduces=True)).seconds
    assert sending > both


def test_an_operator_takes_the_seconds_and_joules_that_are_computed_by_hand():
    """Of a device of round numbers, where computing and then moving takes longest, and for parts on two of it."""
    device = Device(
        name="round", peak={"float32": 1000, "int8": 4000}, bandwidth=100, capacity=1e9, overhead=3,
        cache=LastLevelCache(capacity=600, bandwidth=400), network=Network(bandwidth=50, latency=0.5),
        efficiency=Efficiency(compute=0.5, memory=0.8), power=Power(idle=10, peak=40),
    )  # fmt: skip
    computing = Operator("linear", 20, 10, 30, weight_bytes=400)  # reads 1200 bytes and writes 2400 for each sample
    computed, moved = 2 * 2 * 30 * 20 * 10 / 500, 400 / 80 + 6600 / 80 + 600 / 400
    assert moved > computed
    found = Roofline(device, 2).answer(computing)
    assert found.seconds == pytest.approx(moved + 3) and found.joules == pytest.approx(40 * moved + 10 * 3)
    wide = Operator("linear", 200, 100, 3, weight_bytes=400)  # 1200 + 2400
    computed = 2 * 2 * 3 * 200 * 100 / 500
    assert Roofline(device, 2).answer(wide).seconds == pytest.approx(computed + 3)
    sent = 2400 * 2 / 50 + 2 * 0.5  # one of two parts, twice; two messages
    on_two = Roofline(device, 2, parallel=2).answer(replace(wide, reduces=True))
    assert on_two.seconds == pytest.approx(computed / 2 + 3 + sent)
    assert on_two.joules == pytest.approx(2 * (40 * computed / 2 + 10 * (3 + sent)))
    keys = Operator("cache", 0, 0, 0.0, cache_bytes=800)
    assert Roofline(device, 2).answer(keys).seconds == pytest.approx(2 * 800 / 80)
    table = Operator("embedding", 25, 0, 2, weight_bytes=1e6)  # of which two rows are read, and written to the cache
    assert Roofline(device, 2).answer(table).seconds == pytest.approx(400 / 80 + 400 / 400 + 3)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_smaller_sub_networks_are_no_slower_and_the_parts_add_up(name):
    supernet = supernet_of(name)
    small, large = (supernet.costs(genome) for genome in (supernet.space.smallest, supernet.space.largest))
    for measure in ("latency", "energy", "peak_memory"):
        assert 0 < small[measure] <= large[measure] * (1 + 1e-9)
    for genome in supernet.space.sample(3, seed=0):
        parts = supernet.breakdown(genome)
        assert sum(part["latency"] for part in parts) == pytest.approx(supernet.costs(genome)["latency"])
        assert sum(part["size"] for part in parts) == supernet.costs(genome)["size"]


def test_latency_is_that_of_each_operator_alone():
    """Of a ViT on one device, added up by hand."""
    supernet = supernet_of("vit", schemes=["none"])
    hidden, mlp, tokens = 128, 256, 17
    model = Roofline(FAST.device)

    def seconds(kind, rows, columns, positions, stored, **more):
        return model.answer(Operator(kind, rows, columns, positions, weight_bytes=4 * stored, **more)).seconds

    block = 4 * seconds("linear", hidden, hidden, tokens, hidden**2)
    block += seconds("linear", mlp, hidden, tokens, hidden * mlp) + seconds("linear", hidden, mlp, tokens, hidden * mlp)
    block += 2 * seconds("norm", hidden, hidden, tokens, hidden)
    held = 2 * hidden * tokens * 4
    block += seconds("attention", hidden, hidden, tokens, 0, context=tokens, cache_bytes=held)
    total = 3 * block + seconds("norm", hidden, hidden, tokens, hidden) + seconds("linear", 5, hidden, 1, 5 * hidden)
    total += seconds("conv", hidden, 3, 16, 3 * 16 * hidden, area=16, stride=16)
    assert supernet.costs(supernet.space.largest)["latency"] == pytest.approx(total, rel=1e-9)


def test_a_longer_context_costs_more_and_a_quantized_cache_less():
    short, long = (supernet_of("llama_tied", Roofline(FAST.device, 4, n), model=long_llama()) for n in (64, 4096))
    whole = short.space.largest
    for measure in ("latency", "decode_latency", "peak_memory"):
        assert short.costs(whole)[measure] < long.costs(whole)[measure]
    assert long.costs(whole)["decode_latency"] < long.costs(whole)["latency"] / 10
    held = supernet_of("llama_tied", Roofline(FAST.device, 4, 4096), model=long_llama(), caches=["INT8", "none"])
    genomes = [
        held.space.encode(
            {**dict(held.space.decode(held.space.largest)), **{f"block{i}.cache": form for i in range(3)}}
        )
        for form in ("none", "INT8")
    ]
    plain, quantized = (held.costs(genome) for genome in genomes)
    assert quantized["decode_latency"] < plain["decode_latency"]
    assert quantized["peak_memory"] < plain["peak_memory"]


@pytest.mark.parametrize("made", [lambda: make("mistral"), partly_sliding, lambda: make("qwen2")])
def test_decoding_and_memory_count_the_keys_that_transformers_computes_with_and_holds(made):
    """Under a window of 8, in all blocks or in some, and without any."""
    model = made()
    model.set_attn_implementation("eager")
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed")
    supernet = Supernet(model, space, latency=Roofline(load_device("orin"), batch=2, context=24))
    ids = torch.randint(3, 96, (2, 24))
    supernet.calibrate([{"input_ids": ids}])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        with FlopCounterMode(display=False) as counted:
            model(ids[:1, :1], past_key_values=of_one(cache))
    found = supernet.original_costs()
    largest = max(each["activation"] for each in supernet.original_breakdown())
    assert found["peak_memory"] == found["size"] + largest + held
    assert found["decode_macs"] == counted.get_total_flops() / 2


def test_blocks_that_share_a_gene_have_windows_of_their_own():
    def one_gene(model: nn.Module) -> Family:
        _, family = declare(model)
        widths = [replace(width, gene="heads") if width.attention else width for width in family.widths]
        caches = [replace(cache, heads="heads") for cache in family.caches]
        return replace(family, widths=tuple(widths), caches=tuple(caches))

    model = partly_sliding()
    space = SearchSpace.for_model(model, schemes=["none", "W8A8"], preset="fixed")
    shared, own = Supernet(model, space, family=one_gene), Supernet(model, space)
    assert shared.original_costs()["decode_macs"] == own.original_costs()["decode_macs"]


def of_one(cache: DynamicCache) -> DynamicCache:
    """The cache of the first sequence alone."""
    cache.batch_select_indices(torch.tensor([0]))
    return cache


def test_a_longer_context_than_the_window_leaves_decoding_as_it_is():
    def costs(context: int) -> dict[str, float]:
        model = make("mistral")
        model.config.max_position_embeddings = 4096
        return supernet_of("mistral", Roofline(FAST.device, 4, context), model=model).original_costs()

    short, long = costs(64), costs(4096)
    assert short["decode_latency"] == long["decode_latency"]
    assert short["latency"] < long["latency"]


@pytest.mark.parametrize("name", ["llama_tied", "bert"])
def test_attention_over_a_whole_text_reads_keys_and_values_once_a_sequence(name):
    class Reading:
        """Stands in for a device that takes a second for each byte of keys and values, and a joule."""

        source, batch, context, capacity = "reading", 1, 16, float("inf")

        def described(self):
            return {}

        def answer(self, operator: Operator) -> Answer:
            return Answer(operator.cache_bytes, operator.cache_bytes)

    found = supernet_of(name, Reading()).original_costs()
    width = 64 if name == "llama_tied" else 128  # two heads of four
    assert found["latency"] == 3 * 2 * width * 16 * 4
    if name == "llama_tied":
        assert found["decode_latency"] == found["latency"]


def test_keys_and_values_from_cached_inputs_are_computed_again_for_each_token():
    class Products:
        """Stands in for a device that takes a second for each product, and a joule."""

        source, batch, context, capacity = "products", 1, 640, float("inf")

        def described(self):
            return {}

        def answer(self, operator: Operator) -> Answer:
            return Answer(operator.macs, operator.macs)

    supernet = supernet_of("llama_tied", Products(), model=long_llama(), caches=["INT8", "X_INT8"])
    names = [gene.name for gene in supernet.space.genes]
    kept, inputs = (supernet.space.decode(supernet.space.largest) | caches for caches in (
        {name: form for name in names if name.endswith(".cache")} for form in ("INT8", "X_INT8")
    ))  # fmt: skip
    kept, inputs = (supernet.costs(supernet.space.encode(each)) for each in (kept, inputs))
    sample = batches("llama_tied")[0]["input_ids"].shape[1]
    recomputed = (inputs["decode_macs"] - kept["decode_macs"]) * 640 / sample
    assert recomputed > 0
    for measure in ("decode_latency", "decode_energy"):
        assert inputs[measure] - kept[measure] == pytest.approx(recomputed)


def test_a_search_has_latency_as_an_objective_and_records_where_it_comes_from(tmp_path):
    supernet = supernet_of("vit")
    study = jointopt.search(
        supernet, lambda m: 1.0, ["quality", "latency"], evaluations=6, storage=tmp_path / "study.db"
    )
    assert study.config["latency"]["device"]["name"] == "NVIDIA H100 80GB SXM"
    assert (study.evaluations()["latency"] > 0).all()
    study.close()
    other = supernet_of("vit", Roofline(load_device("a100")))
    with pytest.raises(JointoptError, match="latency"):
        jointopt.search(other, lambda m: 1.0, ["quality", "latency"], evaluations=6, storage=tmp_path / "study.db")


def test_what_does_not_fit_into_the_memory_is_no_choice(tmp_path):
    supernet = supernet_of("vit")
    sizes = [supernet.costs(genome)["peak_memory"] for genome in (supernet.space.smallest, supernet.space.largest)]
    device = FAST.device.model_copy(update={"capacity": sum(sizes) / 2})
    study = jointopt.search(supernet_of("vit", Roofline(device)), lambda m: 1.0, ["quality", "size"], evaluations=20)
    assert (study.evaluations()["peak_memory"] <= sum(sizes) / 2).all()
    tiny = FAST.device.model_copy(update={"capacity": sizes[0] / 2})
    with pytest.raises(JointoptError, match=r"the smallest sub-network takes .* GB, roofline of NVIDIA H100"):
        jointopt.search(supernet_of("vit", Roofline(tiny)), lambda m: 1.0, ["quality", "size"], evaluations=20)


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)])
def test_a_convolution_s_inputs_are_counted_whole(conv):
    model = nn.Sequential(conv)
    family = Family("one", (), (), (Layer("conv", "0", "conv"),))
    pixels = torch.randn(2, conv.in_channels, 16, 16)
    space = SearchSpace([Gene("conv.precision", ("none", "W8A16_CHANNEL"))])
    supernet = Supernet(model, space, family=lambda _: family, latency=FAST)
    supernet.calibrate([{"input": pixels}])
    found = supernet.costs(space.largest)
    assert found["peak_memory"] - found["size"] == (pixels[0].numel() + conv(pixels)[0].numel()) * 4


def test_impossible_hardware_is_refused():
    for match, call in {
        "batch: found 0": lambda: Roofline(FAST.device, 0),
        "found device 'h100'; allowed: what load_device returns": lambda: Roofline("h100"),
        "has no network": lambda: Roofline(load_device("orin"), parallel=2),
        "context: found 128, and a vit reads no tokens": lambda: supernet_of(
            "vit", Roofline(FAST.device, 1, 128)
        ).original_costs(),
        "context: found 69; the model takes 64 tokens at most": lambda: supernet_of(
            "roberta", Roofline(FAST.device, 1, 69)
        ).original_costs(),
    }.items():
        with pytest.raises(JointoptError, match=match):
            call()
    assert supernet_of("llama_tied", Roofline(FAST.device, 1, 65)).original_costs()  # whose positions are computed
    plain = supernet_of("vit", None)
    with pytest.raises(JointoptError, match="objective 'latency': found no hardware"):
        jointopt.search(plain, lambda m: 1.0, ["quality", "latency"], evaluations=2)


def test_what_fits_is_told_from_what_does_not_where_cached_inputs_are_larger_than_keys_and_values():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=2**17,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    space = SearchSpace.for_model(model, ["none"], depth=[2, 3], caches=["none", "X_INT8"])

    def searched(capacity: float):
        device = load_device("h100").model_copy(update={"capacity": capacity})
        supernet = Supernet(model, space, latency=Roofline(device, batch=8, context=100_000))
        supernet.calibrate(batches("llama_tied"))
        taken = supernet.cost_columns(supernet.space.sample(100, seed=0))["peak_memory"]
        if not np.isfinite(capacity):
            return taken, supernet.original_costs()["peak_memory"]
        found = jointopt.search(supernet, lambda _: 0.5, ["quality", "latency"], evaluations=4, strategy="random")
        return found.evaluations()["peak_memory"], None

    taken, original = searched(float("inf"))
    assert taken.min() < original < taken.max()
    for capacity in (1.05 * original, (taken.min() + original) / 2):
        assert (searched(capacity)[0] <= capacity).all()
