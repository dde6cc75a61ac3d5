"""One study seen on many devices."""

from __future__ import annotations

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
import yaml
from transformers import ViTForImageClassification

import jointopt
from jointopt import Roofline, SearchSpace, Supernet, load_device
from jointopt.cli import _on_devices
from jointopt.config.config import load_config
from jointopt.report.devices import device_figure, on_device
from jointopt.report.spent import spent_figure
from jointopt.report.terminal import device_table
from jointopt.timing.hardware import latency_of
from tests.on_h100 import FAST, supernet_of
from tests.saved import save_vit
from tests.zoo import make


def test_one_study_on_many_devices_measures_no_quality_again(tmp_path):
    supernet = supernet_of("llama_tied", None)
    calls = []
    study = jointopt.search(supernet, lambda m: float(len(calls) or calls.append(1) or 1), evaluations=8)
    asked = len(calls)
    model = make("llama_tied").to("meta")
    bare = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8", "W4A16", "FP8_DYNAMIC"]))
    bare.take_shapes(json.loads(json.dumps(study.fact("shapes"))))
    found = [on_device(study, bare, name, Roofline(load_device(name), 2, 64)) for name in ("h100", "orin")]
    assert len(calls) == asked
    for each, name in zip(found, ("h100", "orin"), strict=True):
        genome = np.array(each.chosen)
        with_weights = supernet.costs_by(Roofline(load_device(name), 2, 64)).columns(genome[None])
        row = each.rows[each.rows["genome"] == each.chosen].iloc[0]
        assert row["decode_latency"] == pytest.approx(with_weights["decode_latency"][0])
        assert each.chosen in set(each.front["genome"])
    assert found[0].front["decode_latency"].min() < found[1].front["decode_latency"].min()
    page = jointopt.write_report(study, tmp_path / "report.html", devices=found).read_text()
    assert "On another device: orin" in page and "Jetson AGX Orin" in page


def test_a_report_keeps_the_run_s_batch_and_parallel_unless_its_options_say_otherwise_and_shows_a_device_once(tmp_path):
    save_vit(tmp_path / "vit")
    content = {
        "model": str(tmp_path / "vit"),
        "task": "image-classification",
        "data": {"calibrate": "images", "evaluate": "images"},
        "space": {"depth": [1, 2]},
        "hardware": {"device": "h100", "batch": 4, "parallel": 2},
        "output": str(tmp_path),
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    config = load_config(tmp_path / "config.yaml")
    model = ViTForImageClassification.from_pretrained(tmp_path / "vit")
    supernet = Supernet(model, config.search_space(model), latency=latency_of(config))
    side = model.config.image_size
    supernet.calibrate([{"pixel_values": torch.randn(4, 1, side, side)}])
    study = jointopt.search(supernet, lambda m: 1.0, ["quality", "latency"], evaluations=4)
    searched = study.evaluations().set_index("number")["latency"]
    for batch in (None, 16):
        options = Namespace(device=["h100", "orin", "h100"], batch=batch, context=None)
        on, alone = _on_devices(study, tmp_path, options)
        assert on.source == f"roofline of 2 x NVIDIA H100 80GB SXM, batch {batch or 4}" and "2 x" not in alone.source
        if batch is None:
            assert on.rows.set_index("number")["latency"].to_dict() == pytest.approx(searched.to_dict())
        else:
            assert (on.rows["latency"].to_numpy() > searched[on.rows["number"]].to_numpy()).all()


def test_a_run_s_own_device_has_its_own_front_and_a_time_is_added_where_there_is_none():
    supernet = supernet_of("vit", FAST)
    study = jointopt.search(supernet, lambda m: 1.0, ["quality", "size", "energy"], evaluations=12)
    own = on_device(study, supernet, "h100", FAST)
    assert sorted(own.front["number"]) == sorted(study.front()["number"])
    assert own.chosen == tuple(study.best(knee=True))
    assert own.measures[0] == "energy"
    study = jointopt.search(supernet_of("vit", FAST), lambda m: 1.0, ["quality", "size"], evaluations=4)
    added = on_device(study, supernet, "h100", FAST)
    assert [objective.name for objective in added.objectives] == ["quality", "size", "latency"]


@pytest.fixture(scope="module")
def alike():
    """A super-network and a study of sub-networks that are all as good."""
    supernet = supernet_of("vit", FAST)
    return supernet, jointopt.search(supernet, lambda m: 1.0, ["quality", "size"], evaluations=20)


def test_what_does_not_fit_into_a_device_s_memory_is_not_shown_on_it(alike):
    supernet, study = alike
    peaks = [supernet.costs(np.array(genome))["peak_memory"] for genome in study.evaluations()["genome"]]
    limit = float(np.median(peaks))
    found = on_device(study, supernet, "small", Roofline(FAST.device.model_copy(update={"capacity": limit})))
    assert 0 < len(found.rows) < 20 and sorted(found.rows["peak_memory"]) == sorted(p for p in peaks if p <= limit)


def test_a_device_s_front_has_what_is_fast_there_though_something_smaller_is_as_good(alike):
    supernet, study = alike
    front = on_device(study, supernet, "h100", FAST).front
    assert list(front["latency"]) == sorted(front["latency"]) and len(front) > len(study.front()) == 1
    assert front["size"].is_monotonic_decreasing


def test_what_may_be_lost_on_a_device_is_given_up_for_its_time_and_not_for_size(alike):
    supernet, study = alike
    found = on_device(study, supernet, "h100", FAST, {"drop": 0.0})
    chosen = found.rows[found.rows["genome"] == found.chosen]
    assert chosen["latency"].item() == found.rows["latency"].min()
    assert chosen["size"].item() > found.rows["size"].min()


def test_a_limit_of_the_run_s_own_device_does_not_hold_on_another():
    supernet = supernet_of("vit", FAST)
    study = jointopt.search(
        supernet, lambda m: 1.0, ["quality", "size"], evaluations=4, constraints={"latency": "<= 1"}
    )
    slow = load_device("orin").model_copy(update={"bandwidth": 1.0})
    found = on_device(study, supernet, "slow", Roofline(slow))
    assert found.rows["latency"].min() > 1 and found.chosen is not None and not found.unmet


def test_on_a_device_the_choice_keeps_to_the_constraints_and_an_original_that_does_not_fit_has_no_times():
    supernet = supernet_of("vit", FAST)
    limit = float(np.median([supernet.costs(genome)["size"] for genome in supernet.space.sample(20, 0)])) / 1e6
    limits = {"size_mb": f"<= {limit}"}
    study = jointopt.search(supernet, lambda m: 1.0, ["quality", "size"], constraints=limits, evaluations=20)
    whole = supernet.original_costs()["peak_memory"]
    small = Roofline(FAST.device.model_copy(update={"capacity": whole - 1}))
    found = on_device(study, supernet, "small", small)
    assert supernet.costs(np.array(found.chosen))["size"] <= limit * 1e6
    assert "latency" not in found.original and found.original["quality"] == 1.0
    assert "latency" in on_device(study, supernet, "h100", FAST).original
    device_table(found), device_figure(study, found)


def test_on_a_device_the_choice_is_by_the_wish_that_the_run_had():
    supernet = supernet_of("vit", FAST)
    scored = iter(np.linspace(0.5, 1.0, 21)[::-1])
    study = jointopt.search(supernet, lambda m: float(next(scored)), ["quality", "size"], evaluations=20)
    level = study.original["quality"] - 0.1
    lossy = on_device(study, supernet, "h100", FAST, {"drop": 0.1})
    good = lossy.rows[lossy.rows["quality"] >= level - 1e-9]
    assert good["latency"].min() == lossy.rows[lossy.rows["genome"] == lossy.chosen]["latency"].item()
    assert (
        device_table(lossy).caption.plain
        == "* the least latency whose quality is at most 0.1 worse than the original's"
    )
    limit = float(study.evaluations()["size"].median()) / 1e6
    small = on_device(study, supernet, "h100", FAST, {"size_mb": limit})
    assert small.chosen == tuple(study.best(size_mb=limit))
    assert small.wish in {trace.name for trace in device_figure(study, small).data}
    assert on_device(study, supernet, "h100", FAST, {"size_mb": 1e-6}).unmet.startswith("size_mb: found 1e-06")


def test_a_device_s_front_is_shown_without_a_choice_where_nothing_keeps_to_the_constraints(tmp_path):
    supernet = supernet_of("vit", FAST)
    limits = {"quality": ">= 2"}
    study = jointopt.search(supernet, lambda m: 1.0, ["quality", "size"], constraints=limits, evaluations=4)
    found = on_device(study, supernet, "h100", FAST)
    assert found.chosen is None and len(found.front)
    unmet = "constraints: no evaluation has quality >= 2; the closest has 1"
    assert str(device_table(found).caption) == unmet
    page = jointopt.write_report(study, tmp_path / "report.html", devices=[found]).read_text()
    assert f"Nothing is chosen here: {unmet.replace('>', '&gt;')}." in page
    assert "the knee" not in {trace.name for trace in device_figure(study, found).data}


def test_bars_of_what_is_spent_are_stacked_and_add_up_to_the_sub_network_and_to_the_original():
    supernet = supernet_of("vit", FAST)
    genome = supernet.space.sample(1, seed=1)[0]
    costs, original = supernet.costs(genome), supernet.original_costs()
    figure = spent_figure(supernet.breakdown(genome), supernet.original_breakdown())
    for axis, measure, unit in (("y", "latency", 1e-3), ("y2", "size", 1e6)):
        bars = [bar for bar in figure.data if bar.yaxis == axis]
        whole, parts = ([bar for bar in bars if (bar.name == "the original") is said] for said in (True, False))
        assert sum(whole[0].y) == pytest.approx(original[measure] / unit)
        assert sum(sum(bar.y) for bar in parts) == pytest.approx(costs[measure] / unit)
        below = np.cumsum([bar.y for bar in parts], axis=0)
        np.testing.assert_allclose([bar.base for bar in parts[1:]], below[:-1], atol=1e-12)
