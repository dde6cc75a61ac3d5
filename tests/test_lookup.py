"""Look-up latency: operators timed for real, kept with the machine that they were timed on, fitted end to end."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import jointopt
from jointopt import JointoptError, Lookup, SearchSpace, Supernet
from jointopt.config.config import load_config
from jointopt.cost.operators import Answer, Operator
from jointopt.timing.backend import Backend, host
from jointopt.timing.hardware import FITTED, check_timed, lookup_here
from jointopt.timing.lookup import ANCHORS, default_path, key_of, times_of
from jointopt.timing.timers import module_of, time_export, time_exports, time_operators
from quant.formats import scheme
from quant.layers import QuantizedLinear
from tests.zoo import batches, make

pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")


@cache
def supernet() -> Supernet:
    model = make("vit")
    found = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"], depth=[2, 3], mlp=[128, 256]))
    found.calibrate(batches("vit"))
    return found


@pytest.fixture(scope="module")
def timed(tmp_path_factory) -> tuple[Lookup, object]:
    path = tmp_path_factory.mktemp("lookup") / "operators.json"
    return Lookup.of(supernet(), batch=2, path=path), path


def test_every_operator_gets_a_time_of_its_own():
    seconds = time_operators([Operator("linear", 512, 512, 64), Operator("norm", 512, 512, 64)], 1, Backend(), rounds=5)
    assert len(seconds) == 2 and all(each >= 0 for each in seconds) and seconds[0] > 0


@pytest.mark.parametrize(
    "operator",
    [
        Operator("linear", 64, 32, 5, scheme=scheme("W8A8")),
        Operator("linear", 64, 32, 5, scheme=scheme("W4A16_G32")),
        Operator("conv", 8, 4, 16, area=9, scheme=scheme("W8A8_STATIC")),
        Operator("conv", 8, 1, 16, area=9, heads=8),
        Operator("embedding", 32, 0, 5),
        Operator("norm", 32, 32, 5),
        Operator("attention", 64, 32, 5, context=9, heads=4),
    ],
    ids=lambda each: each.kind,
)
def test_an_operator_s_module_makes_what_the_operator_says(operator):
    module, inputs = module_of(operator, 3)
    if isinstance(module, QuantizedLinear):
        assert module.scheme == operator.scheme
    with torch.no_grad():
        output = torch.nn.Linear.forward(module, *inputs) if isinstance(module, QuantizedLinear) else module(*inputs)
    if operator.kind == "conv":
        assert output.shape == (3, operator.rows, 4, 4)
    else:
        assert output.shape == (3, 5, operator.rows)


def test_an_integer_convolution_is_fused_with_its_reader_s_rounding_and_no_other_is():
    static, dynamic = scheme("W8A8_STATIC"), scheme("W8A8")
    inside = Operator("conv", 64, 64, 1024, area=9, scheme=static, reader=scheme("W8A8_STATIC_ASYM"))
    others = [
        replace(inside, **given)
        for given in ({"reader": None}, {"reader": dynamic}, {"scheme": dynamic}, {"reader": scheme("FP8")})
    ]
    assert inside.fused and not any(each.fused for each in others)
    assert len({key_of(each, 1) for each in (inside, *others)}) == 3
    fused, apart = time_operators([inside, others[0]], 1, Backend(), rounds=8)
    assert 0 < fused < apart  # by far: ConvInteger is slow


def test_a_convolution_s_time_follows_from_its_reader_s_format():
    model = make("resnet")
    space = SearchSpace.for_model(model, schemes=["W8A8_STATIC", "W8A8"], preset="fixed", precision_per="layer")
    supernet = Supernet(model, space)
    supernet.calibrate(batches("resnet"))
    block = supernet.family.blocks[0].name
    path = next(layer.path for layer in supernet.family.layers if layer.name == f"{block}.conv1")

    class Told(Lookup):
        def time_of(self, operator: Operator) -> float:
            return 1.0 if operator.fused else 2.0

    def latency(**chosen: str) -> float:
        choices = dict.fromkeys(space.names, "W8A8_STATIC") | {f"{block}.{k}.precision": v for k, v in chosen.items()}
        parts = supernet.costs_by(Told(Backend())).breakdown(supernet.space.encode(choices))
        return next(part["latency"] for part in parts if part["path"] == path)

    assert (latency(), latency(conv2="W8A8"), latency(conv1="W8A8")) == (1.0, 2.0, 2.0)


@pytest.mark.parametrize("kind", ["resnet", "timm_resnet_basic"])
def test_as_many_convolutions_are_fused_as_an_export_writes_as_one_kernel(kind, tmp_path):
    model = make(kind)
    formats = ["W8A8_STATIC", "W8A8_STATIC_ASYM", "W8A8", "none"]
    space = SearchSpace.for_model(model, schemes=formats, preset="fixed", precision_per="layer")
    supernet = Supernet(model, space)
    supernet.calibrate(batches(kind))
    firsts = ["stem", "stage1.block0.conv1", "stage1.block0.shortcut"]
    of_stem = [f"{name}.precision" for name in firsts if f"{name}.precision" in space.names]
    alike = dict.fromkeys(of_stem, "W8A8_STATIC")
    decoded = [{**space.decode(genome), **alike} for genome in space.sample(2, seed=1)]
    decoded += [{**decoded[-1], of_stem[-1]: "W8A8_STATIC_ASYM"}, dict.fromkeys(space.names, "W8A8_STATIC")]

    class Fused(Lookup):
        def answer(self, operator: Operator) -> Answer:
            return Answer(float(operator.fused), 0.0)

    genomes = [space.encode(each) for each in decoded]
    told = supernet.costs_by(Fused(Backend())).columns(np.stack(genomes))["latency"]
    for at, genome in enumerate(genomes):
        folder = jointopt.export(supernet, genome, tmp_path / str(at), target="onnxruntime")
        nodes = onnx.load(folder / "model.onnx", load_external_data=False).graph.node
        assert told[at] == sum(node.op_type == "QLinearConv" for node in nodes)
    assert len(set(told)) > 1


def test_an_operator_s_latency_is_its_time_and_what_a_graph_adds_to_its_kind():
    attention, plain, held, norm = (
        Operator("attention", 64, 32, 5, context=9, heads=4),
        Operator("linear", 64, 32, 5),
        Operator("linear", 64, 32, 5, scheme=scheme("W8A8")),
        Operator("norm", 32, 32, 5),
    )
    seconds = {key_of(each, 2): 2.0 for each in (attention, plain, held, norm)}
    factors = {"operators": 3.0, "attention": 5.0, "layers": 7.0, "quantized": 11.0}
    lookup = Lookup(Backend(), 2, None, seconds, factors)
    found = [lookup.answer(each).seconds for each in (attention, plain, held, norm)]
    assert found == [2 * 3 + 2 * 5, 2 * 3 + 7, 2 * 3 + 7 + 11, 2 * 3]
    assert lookup.answer(Operator("cache", 64, 32, 1, context=9)).seconds == 0


def test_every_operator_of_the_space_is_timed_once_and_kept(timed, monkeypatch):
    lookup, path = timed
    record = json.loads(path.read_text())["machines"]
    assert list(record) == [Backend().machine] and record[Backend().machine] == dict(lookup.seconds)

    def never(*given):
        raise AssertionError("timed again")

    monkeypatch.setattr("jointopt.timing.timers.time_operators", never)
    assert Lookup.of(supernet(), batch=2, path=path).seconds == lookup.seconds


def test_costs_are_sums_of_what_was_timed(timed):
    lookup, _ = timed
    columns = supernet().costs_by(lookup).columns(supernet().space.largest)
    parts = supernet().costs_by(lookup).breakdown(supernet().space.largest)
    assert columns["latency"][0] == pytest.approx(sum(part["latency"] for part in parts))
    assert columns["latency"][0] > 0 and "energy" not in columns


def test_a_width_between_those_timed_is_interpolated_and_one_beyond_is_refused():
    seconds = {key_of(Operator("linear", rows, 64, 10), 1): rows * 1e-6 for rows in (64, 128)}
    lookup = Lookup(Backend(), seconds=seconds)
    assert lookup.time_of(Operator("linear", 96, 64, 10)) == pytest.approx(96e-6)
    with pytest.raises(JointoptError, match=r"no timing of linear 256 x 64 in none at 10 positions"):
        lookup.time_of(Operator("linear", 256, 64, 10))
    with pytest.raises(JointoptError, match="in W8A8 at 10"):
        lookup.time_of(Operator("linear", 96, 64, 10, scheme=scheme("W8A8")))


@pytest.mark.parametrize(
    "of_width",
    [
        lambda width: Operator("linear", 64, width, 8.0),
        lambda width: Operator("norm", width, width, 8.0),
        lambda width: Operator("attention", width, width // 2, 8.0, 8.0, heads=width // 16),
        lambda width: Operator("conv", width, width, 64.0, area=9),
        lambda width: Operator("conv", width, 1, 64.0, area=9, heads=width),
    ],
    ids=["input", "norm", "attention", "square convolution", "depthwise convolution"],
)
def test_a_width_that_is_several_sides_is_interpolated_along_all_of_them(of_width):
    lookup = Lookup(Backend(), seconds={key_of(of_width(width), 1): width * 1e-6 for width in (32, 96)})
    assert lookup.time_of(of_width(64)) == pytest.approx(64e-6)
    with pytest.raises(JointoptError, match="no timing of"):
        lookup.time_of(of_width(128))


def test_a_fit_finds_what_a_graph_adds_to_its_operators(timed):
    lookup, _ = timed
    genomes = list(supernet().space.sample(12, seed=0))
    tables = supernet().costs_by(lookup)
    sums = tables.columns(np.array(genomes))["latency"]
    layers = [sum(p["kind"] in ("linear", "conv") for p in tables.breakdown(genome)) for genome in genomes]
    fitted = lookup.fit(supernet(), genomes, [0.8 * s + 5e-6 * n for s, n in zip(sums, layers, strict=True)])
    assert fitted.error < 0.01
    found = supernet().costs_by(fitted).columns(np.array(genomes))["latency"]
    np.testing.assert_allclose(found, 0.8 * sums + 5e-6 * np.array(layers), rtol=0.02)
    assert "off where it was fitted end to end" in fitted.source
    with pytest.raises(JointoptError, match="3 or more"):
        lookup.fit(supernet(), genomes[:2], [1.0, 2.0])


def test_timings_of_another_machine_are_refused(tmp_path):
    path = tmp_path / "operators.json"
    path.write_text(json.dumps({"machines": {"Another CPU, 64 cores, ONNX Runtime 1.0, 1 threads": {}}}))
    with pytest.raises(JointoptError, match="timed on another machine"):
        Lookup.of(supernet(), path=path)
    path.write_text("{")
    with pytest.raises(JointoptError, match="cannot be read"):
        Lookup.of(supernet(), path=path)


def test_a_home_that_machines_share_keeps_the_timings_of_each(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    other = {"Another CPU, 64 cores, ONNX Runtime 1.0, 1 threads": {"of it": 1.0}}
    (tmp_path / "jointopt").mkdir()
    default_path().write_text(json.dumps({"machines": other}))
    asked = [Operator("linear", rows, 16, 4) for rows in (8, 16)]
    found = times_of(asked, 1, Backend())
    kept = json.loads(default_path().read_text())["machines"]
    assert kept.keys() == {*other, Backend().machine} and other.items() <= kept.items()
    assert sorted(kept[Backend().machine].values()) == sorted(found)


@pytest.mark.parametrize("content", ['{"machines": []}', "3", "[" * 100_000], ids=["list", "number", "deep"])
def test_a_damaged_file_of_timings_is_named(tmp_path, content):
    path = tmp_path / "operators.json"
    path.write_text(content)
    with pytest.raises(JointoptError, match=r"operators.json.*remove it"):
        Lookup.of(supernet(), path=path)


def test_a_time_that_was_too_short_to_tell_is_kept(tmp_path):
    path = tmp_path / "operators.json"
    lookup = Lookup.of(supernet(), path=path)
    short = {**lookup.seconds, next(iter(lookup.seconds)): 0.0}
    path.write_text(json.dumps({"machines": {lookup.backend.machine: short}}))
    assert Lookup.of(supernet(), path=path).seconds == short


@pytest.mark.parametrize("options", [{"batch": 0}, {"batch": 10**20}, {"context": -4}, {"threads": 0}])
def test_what_is_no_number_to_time_by_is_refused_at_once(tmp_path, options):
    ((name, value),) = options.items()
    with pytest.raises(JointoptError, match=f"{name}:? .*{value}; allowed: a whole number from 1"):
        Lookup.of(supernet(), path=tmp_path / "operators.json", **options)
    assert not list(tmp_path.iterdir())


def test_formats_without_a_form_in_onnx_runtime_are_not_timed(tmp_path):
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W4A8"]))
    supernet.calibrate(batches("vit"))
    for timed in (Lookup.of, jointopt.fit_roofline):
        with pytest.raises(JointoptError, match=r"target onnxruntime: W4A8\w* has no form there"):
            timed(supernet, path=tmp_path / "operators.json")


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf"), None, "1"])
def test_times_that_are_none_fit_nothing(wrong):
    lookup = Lookup(Backend(threads=1))
    with pytest.raises(JointoptError, match="lookup: found a time of .*; allowed: above 0"):
        lookup.fit(supernet(), supernet().space.sample(3, 0), [1.0, 1.0, wrong])


def of_weights(**options) -> Supernet:
    model = make("vit")
    space = SearchSpace.for_model(model, schemes=["none", "W4A16", "W8A16_CHANNEL"], depth=[2, 3], **options)
    found = Supernet(model, space)
    found.calibrate(batches("vit"))
    return found


def test_in_torch_a_layer_takes_the_time_of_an_unquantized_one_whatever_its_format_of_weights(tmp_path):
    found = of_weights(mlp=[128, 256])
    path = tmp_path / "operators.json"
    lookup = Lookup.of(found, batch=2, path=path, backend="torch")
    assert all(json.loads(key)["scheme"] == "none" for key in lookup.seconds)
    assert f"{host()}, torch {torch.__version__.partition('+')[0]}" in lookup.source
    assert list(json.loads(path.read_text())["machines"]) == [Backend.of(found, "torch", 1).machine]
    largest = found.space.decode(found.space.largest)
    packed = {gene.name: "W4A16" if "W4A16" in gene.choices else largest[gene.name] for gene in found.space.genes}
    assert packed != largest
    times = found.costs_by(lookup).columns(np.stack([found.space.encode(each) for each in (largest, packed)]))
    assert times["latency"][0] == times["latency"][1] > 0


def test_in_torch_sub_networks_are_timed_end_to_end_and_the_fit_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = of_weights()
    threads = torch.get_num_threads()
    lookup = lookup_here(found, 2, 1, batches("vit"), tmp_path / "latency.json", 0, "torch")
    assert lookup.error is not None and torch.get_num_threads() == threads
    again = lookup_here(found, 2, 1, batches("vit"), tmp_path / "latency.json", 0, "torch")
    assert again.factors == lookup.factors
    with pytest.raises(JointoptError, match=r"latency.json' is of .*torch.*; this is .*ONNX Runtime"):
        lookup_here(found, 2, 1, batches("vit"), tmp_path / "latency.json", 0)
    record = json.loads((tmp_path / "latency.json").read_text())
    for name in FITTED:
        (tmp_path / "latency.json").write_text(json.dumps({key: record[key] for key in record.keys() - {name}}))
        with pytest.raises(JointoptError, match=r"latency.json' cannot be read: .*; allowed: remove it"):
            lookup_here(found, 2, 1, batches("vit"), tmp_path / "latency.json", 0, "torch")


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("vit", {"schemes": ["none", "W8A8"]}, "W8A8: rounds a layer's inputs, for which torch has no kernel"),
        ("bert", {"schemes": ["none", "BNB_NF4"]}, "BNB_NF4: bitsandbytes' kernels are not timed"),
        ("llama_tied", {"schemes": ["none"], "caches": ["none", "INT8"]}, "quantized caches are not timed in torch"),
    ],
)
def test_what_torch_has_no_kernel_for_is_refused(name, options, match, tmp_path):
    model = make(name)
    found = Supernet(model, SearchSpace.for_model(model, preset="fixed", **options))
    found.calibrate(batches(name))
    with pytest.raises(JointoptError, match=match):
        Lookup.of(found, path=tmp_path / "operators.json", backend="torch")
    with pytest.raises(JointoptError, match=r"backend: found 'tensorrt'; allowed: onnxruntime, torch"):
        Lookup.of(found, path=tmp_path / "operators.json", backend="tensorrt")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: nothing is timed on CUDA")
def test_on_a_gpu_operators_and_sub_networks_are_timed_there(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = make("vit").to("cuda", torch.bfloat16)
    found = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W4A16"], depth=[2, 3]))
    found.calibrate(batches("vit"))
    lookup = lookup_here(found, 2, 1, batches("vit"), tmp_path / "latency.json", 0, "torch")
    assert torch.cuda.get_device_name() in lookup.source and "bfloat16" in lookup.source
    assert found.costs_by(lookup).columns(found.space.largest)["latency"][0] > 0


def test_energy_by_look_up_is_no_objective(timed):
    model = make("vit")
    found = Supernet(model, supernet().space, latency=timed[0])
    found.calibrate(batches("vit"))
    said = r"objective 'energy': look-up on .* has no figure for it; allowed: latency, peak_memory$"
    with pytest.raises(JointoptError, match=said):
        jointopt.search(found, lambda m: 1.0, ["quality", "energy"], evaluations=2)
    chances = [torch.ones(len(gene.choices)) / len(gene.choices) for gene in found.space.genes]
    with pytest.raises(JointoptError, match=r"expected_cost: look-up on .* has no figure for energy"):
        jointopt.expected_cost(found, chances, "energy")


def test_an_export_is_timed_end_to_end(tmp_path):
    folder = jointopt.export(supernet(), supernet().space.smallest, tmp_path / "out", target="onnxruntime")
    inputs = batches("vit")[0]
    assert time_export(folder, inputs, Backend(), rounds=3) > 0
    small, larger = time_exports((folder, folder), inputs, Backend(), rounds=3)
    assert small > 0 and larger > 0


class Machine:
    """One that gets slower by a tenth with every group of operators it is given."""

    def __init__(self) -> None:
        self.groups: list[int] = []

    def __call__(self, operators, batch, backend):
        self.groups.append(len(operators))
        return [1.1 ** len(self.groups) * 1e-9 * operator.macs for operator in operators]


def test_operators_are_timed_together_and_later_ones_at_the_pace_of_those_before(monkeypatch, tmp_path):
    machine, path = Machine(), tmp_path / "operators.json"
    monkeypatch.setattr("jointopt.timing.timers.time_operators", machine)
    asked = [Operator("linear", rows, 512, 64) for rows in range(8, 1024, 8)]
    first = times_of(asked[:60], 1, Backend(), path)
    whole = times_of(asked, 1, Backend(), path)
    assert machine.groups[0] == 60 and 68 < machine.groups[1] <= 68 + ANCHORS and len(machine.groups) == 2
    assert whole[:60] == first
    np.testing.assert_allclose(whole, [1.1e-9 * each.macs for each in asked])


def test_operators_that_do_not_fit_in_memory_together_are_timed_in_groups_of_one_pace(monkeypatch, tmp_path):
    machine = Machine()
    monkeypatch.setattr("jointopt.timing.timers.time_operators", machine)
    monkeypatch.setattr("jointopt.timing.lookup.TOGETHER", 10**8)
    asked = [Operator("linear", rows, 512, 64) for rows in range(8, 1024, 8)]
    found = times_of(asked, 1, Backend(), tmp_path / "operators.json")
    assert len(machine.groups) == 2
    np.testing.assert_allclose(found, [1.1e-9 * each.macs for each in asked])


def test_an_interrupt_costs_the_group_that_is_being_timed(monkeypatch, tmp_path):
    def interrupted(operators, batch, backend):
        if machine.groups:
            raise KeyboardInterrupt
        return machine(operators, batch, backend)

    machine, path = Machine(), tmp_path / "operators.json"
    monkeypatch.setattr("jointopt.timing.timers.time_operators", interrupted)
    monkeypatch.setattr("jointopt.timing.lookup.TOGETHER", 10**8)
    asked = [Operator("linear", rows, 512, 64) for rows in range(8, 1024, 8)]
    with pytest.raises(KeyboardInterrupt):
        times_of(asked, 1, Backend(), path)
    (kept,) = json.loads(path.read_text())["machines"].values()
    assert 0 < len(kept) == machine.groups[0] < len(asked)


def test_what_two_processes_time_at_once_is_kept_of_both_and_alike_for_both(monkeypatch, tmp_path):
    def meanwhile(operators, batch, backend):
        monkeypatch.setattr("jointopt.timing.timers.time_operators", lambda operators, *_: [1.0] * len(operators))
        others.extend(times_of(asked[4:], 1, Backend(), path))
        return [2.0] * len(operators)

    asked, others, path = [Operator("linear", rows, 16, 4) for rows in range(8, 72, 8)], [], tmp_path / "operators.json"
    monkeypatch.setattr("jointopt.timing.timers.time_operators", meanwhile)
    assert times_of(asked[:6], 1, Backend(), path) == [2.0] * 4 + [1.0] * 2 and others == [1.0] * 4
    (kept,) = json.loads(path.read_text())["machines"].values()
    assert kept == {key_of(each, 1): 2.0 if at < 4 else 1.0 for at, each in enumerate(asked)}


def test_formats_that_cannot_be_timed_in_torch_are_refused_before_any_training(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "model: m\ntask: image-classification\ndata: {calibrate: a, evaluate: b}\noutput: o\nhardware: {device: this}\n"
    )
    config = load_config(tmp_path / "config.yaml")
    check_timed(config, of_weights())
    with pytest.raises(JointoptError, match=r"hardware.device this: W8A8\w*: rounds a layer's inputs"):
        check_timed(config, supernet())


def test_a_study_notices_other_timings(timed):
    lookup, _ = timed
    other = replace(lookup, seconds={key: 10 * value for key, value in lookup.seconds.items()})
    assert lookup.described() == replace(lookup).described() != other.described()
