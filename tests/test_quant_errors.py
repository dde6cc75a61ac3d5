"""What quant cannot do it refuses in one line that says what was found and what is allowed."""

from __future__ import annotations

import pytest
import torch

from jointopt import SearchSpace, Supernet
from quant.calibration import choose_clip
from quant.errors import JointoptError
from quant.formats import ELEMENTS, SCHEMES, Element, Format, Scheme, scheme
from quant.kernels import fake_quantize_activation, quantize
from quant.layers import QuantizedLinear
from quant.packing import storage_bytes
from quant.reference import round_to_format
from tests.zoo import batches, make

INT8 = Format("int8", "channel")
GROUPS = Format("int4", "group", 32)


def refusal(call, *arguments) -> str:
    with pytest.raises(JointoptError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


@pytest.mark.parametrize(
    ("found", "near"),
    [
        ("fp8_e4m4", "fp8_e4m3"),
        ("FP8_E5M2", "fp8_e5m2"),
        ("fp4_e2m3", "fp4_e2m1"),
        ("int-8", "int8"),
        (["int4"], "int4"),
    ],
)
def test_an_unknown_element_is_answered_with_the_nearest(found, near):
    message = refusal(round_to_format, torch.ones(2), found)
    assert repr(found) in message and f"did you mean {near!r}?; allowed: int8, int4, fp8_e4m3" in message


@pytest.mark.parametrize(
    ("found", "near"),
    [
        ("w8a8", "W8A8"),
        ("W4A61", "W4A16"),
        ("FP8DYNAMIC", "FP8_DYNAMIC"),
        ("nvfp-4", "NVFP4"),
        (None, "none"),
        (["W8A8"], "W8A8"),
    ],
)
def test_an_unknown_scheme_is_answered_with_the_nearest(found, near):
    message = refusal(scheme, found)
    assert repr(found) in message and f"did you mean {near!r}?; allowed: none, W8A8" in message


@pytest.mark.parametrize("found", [8, "", (), "something else entirely"])
def test_what_is_like_no_name_is_refused_without_a_guess(found):
    message = refusal(scheme, found)
    assert "did you mean" not in message and "unknown; allowed: none" in message


def test_a_choice_that_is_no_text_is_refused_like_an_unknown_one():
    message = refusal(choose_clip, torch.ones(2, 32), INT8, ["average"])
    assert message == "calibration: found ['average']; allowed: minmax, percentile, mse"


def test_group_sizes_in_a_schemes_name():
    assert scheme("W4A16_G64").weights.group_size == 64
    assert scheme("W4A16_ASYM_G32").name == "W4A16_ASYM_G32"
    assert "groups of 48; allowed: 128, 64, 32" in refusal(scheme, "W4A16_G48")
    for fixed in ("W8A8_G64", "NVFP4_G32", "none_G32"):
        assert "unknown" in refusal(scheme, fixed)


def test_a_group_that_does_not_divide():
    assert "100 columns in groups of 32" in refusal(quantize, torch.ones(2, 100), GROUPS)
    assert "100 columns in groups of 32" in refusal(choose_clip, torch.ones(2, 100), GROUPS)
    assert "27 columns in groups of 32" in refusal(quantize, torch.ones(2, 3, 3, 3), GROUPS)
    assert "20 columns in groups of 16" in refusal(storage_bytes, SCHEMES["NVFP4"], (4, 20), 4)
    assert "20 columns in groups of 32" in refusal(
        fake_quantize_activation, torch.ones(2, 20), SCHEMES["MXFP4"].activations
    )


def test_a_group_size_that_is_still_open():
    assert "groups of None" in refusal(quantize, torch.ones(2, 128), SCHEMES["W4A16"].weights)
    assert "groups of None" in refusal(storage_bytes, SCHEMES["W4A16"], (2, 128), 4)


def test_the_group_size_is_the_largest_that_divides_every_width():
    assert scheme("W4A16").fitted([256, 512]).weights.group_size == 128
    assert scheme("W4A16").fitted([256, 576]).name == "W4A16_G64"
    assert scheme("W4A16").fitted([96]).weights.group_size == 32
    assert scheme("NVFP4").fitted([48]).weights.group_size == 16
    assert scheme("W8A8").fitted([7]) == SCHEMES["W8A8"]
    assert "multiples of 128 or 64 or 32; found 48, 256" in refusal(scheme("W4A16").fitted, [256, 48])
    assert "multiples of 32; found 48" in refusal(scheme("MXFP4").fitted, [48])


@pytest.mark.parametrize("shape", [(0, 32), (3, 0), (2, 0, 3, 3), (32,), ()], ids=str)
def test_weights_without_elements_or_rows(shape):
    assert f"found shape {shape}" in refusal(quantize, torch.ones(shape), INT8)
    assert f"found shape {shape}" in refusal(choose_clip, torch.ones(shape), INT8)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.bool, torch.complex64], ids=str)
def test_numbers_that_are_not_floating_point(dtype):
    numbers = torch.ones(2, 32).to(dtype)
    for message in (
        refusal(round_to_format, numbers, "int8"),
        refusal(quantize, numbers, INT8),
        refusal(fake_quantize_activation, numbers, SCHEMES["W8A8"].activations),
    ):
        assert str(dtype)[6:] in message and "allowed: floating point" in message


@pytest.mark.parametrize("name", [n for n, each in SCHEMES.items() if each.weights])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite(name, bad):
    weight = torch.ones(3, 128)
    weight[1] = bad
    format = scheme(name).fitted([128]).weights
    assert "found NaN or infinity" in refusal(quantize, weight, format)
    assert "found NaN or infinity" in refusal(choose_clip, weight, format, "mse")


def test_constants_that_calibration_has_not_found():
    x = torch.ones(2, 32)
    assert "found no scale; calibrate first" in refusal(fake_quantize_activation, x, SCHEMES["FP8"].activations)
    assert "found no global scale" in refusal(fake_quantize_activation, x, SCHEMES["NVFP4"].activations)


def test_an_unknown_calibration():
    message = refusal(choose_clip, torch.ones(2, 32), INT8, "percentil")
    assert "did you mean 'percentile'?; allowed: minmax, percentile, mse" in message


def test_formats_that_make_no_sense():
    unknown_scale = ("int8", "channel", None, True, "float32")
    assert "found 'int9'; did you mean 'int8'?" in refusal(Format, "int9", "channel")
    assert "found 'row'; allowed: tensor, channel, token, group" in refusal(Format, "int8", "row")
    for size in (0, -16, 7.5, True, "32"):
        assert f"group_size: found {size!r}; allowed: a whole number from 1" in refusal(Format, "int8", "group", size)
    assert "fp8_e4m3 with a zero point" in refusal(Format, "fp8_e4m3", "channel", None, False)
    assert "a group size with granularity 'channel'" in refusal(Format, "int8", "channel", 32)
    assert "format scale: found 'float32'; did you mean 'bfloat16'" in refusal(Format, *unknown_scale)


@pytest.mark.parametrize(("bits", "dtype"), [(6, None), (8, None), (6, torch.int8)])
def test_an_element_that_no_file_would_hold_is_refused(bits, dtype):
    assert "an integer from -32 to 31 has 8 bits" in refusal(Element, "int6", bits, -32, 31, None, 0, dtype)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"bits": 16, "dtype": torch.int16}, "dtype torch.int16; allowed: torch.int8, torch.float8_e4m3fn"),
        ({"dtype": torch.uint8, "min": 0, "max": 255}, "dtype torch.uint8; allowed: torch.int8"),
        ({"dtype": torch.float8_e4m3fnuz, "mantissa": 3}, "dtype torch.float8_e4m3fnuz; allowed: torch.int8"),
        ({"bits": 4, "dtype": torch.int8}, "4 bits, dtype torch.int8; allowed: 4 bits, or those of a dtype"),
        ({"min": 0}, "min 0, max 7; allowed: finite numbers below and above 0"),
        ({"max": float("inf")}, "max inf; allowed: finite numbers"),
        ({"max": 8}, "-8 to 8; allowed: whole numbers, of 4 bits -8 to 7"),
        ({"max": 2.5}, "-8 to 2.5; allowed: whole numbers"),
        ({"dtype": torch.int8, "max": 200}, "-8 to 200; allowed: whole numbers, of 8 bits -128 to 127"),
        ({"dtype": torch.int8, "mantissa": 3}, "mantissa 3 with dtype torch.int8; allowed: an integer"),
        ({"dtype": torch.float8_e4m3fn}, "torch.float8_e4m3fn, mantissa None"),
        (
            {"dtype": torch.float8_e4m3fn, "mantissa": 4, "exponent_min": -2, "min": -7},
            "of this dtype mantissa 3",
        ),
        ({"dtype": torch.float8_e5m2, "mantissa": 2, "exponent_min": -14, "min": -1e5, "max": 1e5}, "-57344 to 57344"),
        ({"values": (-1.0, 1.0), "dtype": torch.int8}, "values and dtype torch.int8; allowed: values of 4 bits"),
        ({"values": tuple(each / 8 for each in range(-8, 9))}, "17 values; allowed: 2 to 16"),
        ({"values": (-1.0, 9.0)}, "allowed: those from min -8 to max 7"),
    ],
    ids=str,
)
def test_an_element_that_no_kernel_computes_is_refused(options, said):
    options = {"bits": 8 if "dtype" in options else 4, "min": -8, "max": 7, **options}
    message = refusal(lambda: Element("mine", **options))
    assert message.startswith("element 'mine': found ") and said in message


def test_scales_that_a_format_is_not_computed_with(monkeypatch):
    for scale in ("e8m0", "e4m3"):
        message = refusal(Format, "nf4", "group", 32, True, scale)
        assert f"scale: found {scale!r} of the codebook nf4; allowed: bfloat16, absmax" in message
    for scale in ("e8m0", "e4m3", "absmax"):
        assert f"{scale!r} with a zero point; allowed: bfloat16" in refusal(Format, "int8", "group", 32, False, scale)
    monkeypatch.setitem(ELEMENTS, "e3m0", Element("e3m0", 4, -16, 16, 0, -2))
    assert "found 'e3m0'; allowed of 4-bit floating point: E2M1 alone" in refusal(Format, "e3m0", "channel")


def dynamic(element: str, granularity: str = "token", group: int | None = None, scale: str = "bfloat16") -> Format:
    return Format(element, granularity, group, scale=scale, dynamic=True)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": None, "activations": dynamic("int8")}, "activations: found None without weights"),
        ({"weights": Format("int8", "token")}, "weights: found granularity 'token'; allowed: tensor, channel, group"),
        ({"activations": Format("int8", "token")}, "static ones of granularity 'token'"),
        (
            {"activations": Format("int8", "tensor", scale="e8m0")},
            "scale 'e8m0'; allowed: dynamic=True; or",
        ),
        ({"activations": Format("fp4_e2m1", "group", 16, scale="e4m3")}, "static ones of granularity 'group'"),
        ({"activations": dynamic("fp4_e2m1", scale="absmax")}, "scale 'absmax'; allowed: those of bitsandbytes"),
        ({"activations": dynamic("int8", scale="absmax")}, "scale 'absmax'; allowed: those of bitsandbytes"),
        ({"activations": dynamic("int8", "group")}, "groups of an open size; allowed: a group_size"),
        ({"compressed": "int-quantised"}, "did you mean 'int-quantized'?; allowed: int-quantized, pack-quantized"),
        ({"compressed": "float-quantized"}, "weights of int8, scale 'bfloat16'; allowed: in float-quantized: fp8_e4m3"),
        (
            {"compressed": "int-quantized", "activations": dynamic("fp8_e5m2")},
            "activations of fp8_e5m2; allowed",
        ),
        ({"bitsandbytes": "nf3"}, "did you mean 'nf4'?; allowed: llm_int8, nf4, fp4"),
        ({"bitsandbytes": "nf4"}, "allowed: in nf4: Format(element='nf4'"),
    ],
    ids=str,
)
def test_a_scheme_that_no_layer_computes_with_or_no_file_holds(options, said):
    message = refusal(lambda: Scheme("MINE", **{"weights": INT8, **options}))
    assert message.startswith("scheme MINE: ") and said in message


def test_a_format_of_one_s_own_is_offered_under_its_name(monkeypatch):
    monkeypatch.setitem(ELEMENTS, "int6", Element("int6", 8, -32, 31, dtype=torch.int8))
    monkeypatch.setitem(SCHEMES, "W6A16", Scheme("W6A16", Format("int6", "channel"), None))
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W6A16"]))
    supernet.calibrate(batches("vit"))
    chosen = supernet.space.decode(supernet.space.largest)
    genome = supernet.space.encode({k: "W6A16" if k.endswith("precision") else v for k, v in chosen.items()})
    with supernet.active(genome) as view:
        weight = next(m.weight for m in view.modules() if isinstance(m, QuantizedLinear)).detach()
    assert max(row.unique().numel() for row in weight) <= 64


@pytest.mark.filterwarnings("ignore:none of W8A8")
def test_a_super_network_names_the_layer():
    model = make("bert")
    path = "bert.encoder.layer.1.output.dense"
    space = SearchSpace.for_model(model, preset="fixed", schemes=["W8A8"])
    supernet = Supernet(model, space)
    with torch.no_grad():
        supernet.model.get_submodule(path).weight[0, 0] = torch.nan
    assert refusal(supernet.extract, space.largest) == f"{path}: weight: found NaN or infinity; allowed: finite numbers"
    supernet = Supernet(model, SearchSpace.for_model(model, preset="fixed", schemes=["W8A8_STATIC"]))
    with torch.no_grad():
        supernet.model.get_submodule(path).weight[0, 0] = torch.nan
    message = refusal(supernet.calibrate, batches("bert"))
    assert message.startswith("bert.") and "calibration saw inputs that are not finite" in message
