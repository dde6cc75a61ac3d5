"""Devices: those that come along, one's own, and what is wrong with a file."""

from __future__ import annotations

import pytest
import yaml

from jointopt import JointoptError, load_device
from jointopt.cost.device import device_names
from quant.formats import scheme


@pytest.mark.parametrize("name", device_names())
def test_a_device_that_comes_with_the_package_is_whole_and_says_where_from(name):
    device = load_device(name)
    assert device.peak["float32"] <= max(device.peak.values())
    assert device.efficiency.memory <= 1 and device.power.idle < device.power.peak


@pytest.mark.parametrize(
    ("device", "name", "expected"),
    [
        ("a100", "FP8_DYNAMIC", "bfloat16"),
        ("a100", "W8A8", "int8"),
        ("a100", "W4A4", "int4"),
        ("h100", "W4A4", "int8"),
        ("h100", "FP8_DYNAMIC", "fp8"),
        ("h100", "NVFP4", "fp8"),
        ("b200", "NVFP4", "fp4"),
        ("b200", "W4A16", "bfloat16"),
        ("cpu-avx2", "NVFP4", "float32"),
        ("orin", "BNB_NF4", "bfloat16"),
    ],
)
def test_a_format_that_a_device_lacks_is_computed_in_the_next_wider_one(device, name, expected):
    assert load_device(device).computes(scheme(name), 16) == expected


def test_a_device_of_one_s_own_is_read_and_a_missing_figure_is_named(tmp_path):
    content = load_device("l4").model_dump()
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(content))
    assert load_device(str(path)) == load_device("l4")
    del content["cache"]["bandwidth"]
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(JointoptError, match=r"mine\.yaml.*line 2: cache\.bandwidth: found nothing; allowed: a number"):
        load_device(str(path))
    path.write_text("name: [")
    with pytest.raises(JointoptError, match="mine.yaml', line 1: not YAML"):
        load_device(str(path))
    with pytest.raises(JointoptError, match="cannot be read"):
        load_device(str(tmp_path / "other.yaml"))
    with pytest.raises(JointoptError, match="did you mean 'h100'"):
        load_device("h1000")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("peak", {"int8": 1e12}, "peak: found no float32, in which all else is computed"),
        ("overhead", float("inf"), "overhead: found inf; allowed: a number"),
        ("bandwidth", True, "bandwidth: found true; allowed: a number"),
        ("overhead", True, "overhead: found true; allowed: a number"),
        ("power", {"idle": 90, "peak": 70}, "power: found idle 90 above peak 70; allowed: peak or less"),
        ("kernels", {"linaer none": 1e12}, "kernels: found kernel 'linaer none'; allowed: linear, "),
        ("kernels", {"conv 3x1 none": 1e12}, "kernels: found kernel 'conv 3x1 none'; allowed: linear, "),
        ("kernels", {"linear W8A9": 1e12}, "kernels: found kernel 'linear W8A9'; did you mean 'W8A8'"),
        ("kernels", {"linear W4A16_G64": 1e12}, "kernels: found kernel 'linear W4A16_G64'"),
        ("peak", {"float32": 1e12, "int9": 1e12}, r"line \d+: peak\.int9: unknown key; did you mean 'int8'.*float32, "),
        ("peak", 1e12, "peak: found 1000000000000.0; allowed: keys of float32, bfloat16"),
        ("peak", {"float32": 0}, r"peak\.float32: found 0; allowed: more than 0"),
        ("kernels", {"linear none": "fast"}, "kernels.linear none: found 'fast'; allowed: a number"),
        ("kernels", [1e12], "kernels: found a list; allowed: names with numbers"),
        ("kernels", {5: 1e12}, r"line \d+: kernels\.5: found a key that YAML takes for a number"),
        ("caches", {}, "caches: unknown key; did you mean 'cache'"),
        ("efficiency", {"compute": True, "memory": 1.0}, "efficiency.compute: found true; allowed: a number"),
    ],
)
def test_a_figure_that_is_none_is_named(tmp_path, key, value, said):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({**load_device("l4").model_dump(), key: value}))
    with pytest.raises(JointoptError, match=f"mine.yaml.*{said}"):
        load_device(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no figures; allowed: name, peak"),
        (b"name: a\noverhead: 1\nname: b\n", "line 3: name: found twice; allowed: once"),
        (b"\xff", "not UTF-8"),
        (b"[" * 3000, "nested too deeply"),
        (b"name: !!timestamp 2026-30-11", "not YAML: a value is not what its tag says"),
    ],
)
def test_a_device_file_that_says_nothing_or_two_things_is_named(tmp_path, content, said):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(JointoptError, match=f"mine.yaml.*{said}"):
        load_device(path)
