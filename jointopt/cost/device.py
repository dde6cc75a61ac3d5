"""What a device can do: rates, bandwidths, capacities and power, from a YAML file of ours or of the user's."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from jointopt.complaints import Section, one_line
from jointopt.cost.operators import check_kernel
from jointopt.files import writing
from jointopt.yaml_lines import read_yaml
from quant.errors import JointoptError, did_you_mean
from quant.formats import Scheme

Rate = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1)]
FromZero = Annotated[float, Field(ge=0)]
Compute = Literal["float32", "bfloat16", "int8", "int4", "fp8", "fp4"]


class LastLevelCache(Section):
    """The last level of cache: bytes, and bytes a second."""

    capacity: Rate
    bandwidth: Rate


class Network(Section):
    """Between devices: bytes a second in one direction, seconds of a message."""

    bandwidth: Rate
    latency: FromZero


class Efficiency(Section):
    """The share of the peak rates that good kernels reach."""

    compute: Share
    memory: Share


class Power(Section):
    """Watts."""

    idle: FromZero
    peak: Rate

    @model_validator(mode="after")
    def _ordered(self) -> Power:
        if self.idle > self.peak:
            raise ValueError(f"idle {self.idle:g} above peak {self.peak:g}; allowed: peak or less")
        return self


class Device(Section):
    """One device.

    Attributes:
        peak: operations a second by format of the products, a multiplication and an addition being two; formats that
            it has no units for are left out.
        bandwidth, capacity: of its memory, bytes a second and bytes.
        network: to others like it; None where there is none.
        overhead: seconds of starting an operator.
        kernels: operations a second that kernels reach where that was measured, by `Operator.kernel` ("conv 3x3
            W8A8"), in place of the peak and the efficiency; they are those of one batch size and number of threads.
    """

    name: str
    peak: dict[Compute, Rate]
    bandwidth: Rate
    capacity: Rate
    cache: LastLevelCache
    network: Network | None = None
    overhead: FromZero
    efficiency: Efficiency
    power: Power
    kernels: dict[str, Rate] = {}

    @field_validator("peak")
    @classmethod
    def _with_float32(cls, value: dict[Compute, float]) -> dict[Compute, float]:
        if "float32" not in value:
            raise ValueError("no float32, in which all else is computed; allowed: with it")
        return value

    @field_validator("kernels")
    @classmethod
    def _with_known_kernels(cls, value: dict[str, float]) -> dict[str, float]:
        for name in value:
            check_kernel(name)
        return value

    def save(self, path: str | Path) -> None:
        """Writes the YAML file that `load_device` reads. Raises JointoptError where it cannot be written."""
        with writing(f"device: {str(path)!r}"):
            Path(path).write_text(yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False), encoding="utf-8")

    def slower(self, factor: float) -> Device:
        """The device on which everything takes so many times as long."""
        network = self.network
        return self.model_copy(
            update={
                "peak": {name: rate / factor for name, rate in self.peak.items()},
                "kernels": {name: rate / factor for name, rate in self.kernels.items()},
                "bandwidth": self.bandwidth / factor,
                "cache": LastLevelCache(capacity=self.cache.capacity, bandwidth=self.cache.bandwidth / factor),
                "network": network and Network(bandwidth=network.bandwidth / factor, latency=network.latency * factor),
                "overhead": self.overhead * factor,
            }
        )

    def computes(self, scheme: Scheme | None, bits: int) -> Compute:
        """The format in which a layer's products are really computed.

        Weights and activations in formats that the device has no units for are converted to the next wider one that
        it has: INT4 to INT8, FP4 to FP8, and what is still left, or where only the weights are narrow, to the model's
        own type, or else float32.

        Args:
            bits: of the model's own type, 32 or 16.
        """
        for each in _widening(scheme):
            if each in self.peak:
                return each
        own: Compute = "float32" if bits == 32 else "bfloat16"
        return own if own in self.peak else "float32"


def _widening(scheme: Scheme | None) -> tuple[Compute, ...]:
    if scheme is None or scheme.weights is None or scheme.activations is None:
        return ()
    kinds = (scheme.weights.kind, scheme.activations.kind)
    if all(kind.name.startswith("int") for kind in kinds):
        return ("int4", "int8") if all(kind.bits == 4 for kind in kinds) else ("int8",)
    if any(kind.name.startswith("int") or kind.values for kind in kinds):
        return ()
    return ("fp4", "fp8") if all(kind.bits == 4 for kind in kinds) else ("fp8",)


def device_names() -> list[str]:
    """Names of the devices that come with the package."""
    folder = resources.files("jointopt.cost") / "devices"
    return sorted(each.name.removesuffix(".yaml") for each in folder.iterdir() if each.name.endswith(".yaml"))


def load_device(name: str | Path) -> Device:
    """A device by name, or from a YAML file of one's own.

    Raises:
        JointoptError: no such device, with the nearest name; a file that lacks a figure, which is named.
    """
    name = str(name)
    if name in device_names():
        text = (resources.files("jointopt.cost") / "devices" / f"{name}.yaml").read_text(encoding="utf-8")
    elif name.endswith((".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise JointoptError(f"device: {name!r} cannot be read: it is not UTF-8") from None
        except (OSError, ValueError) as error:  # ValueError: no path at all
            reason = getattr(error, "strerror", None) or error
            raise JointoptError(f"device: {name!r} cannot be read: {reason}") from None
    else:
        near, allowed = did_you_mean(name, device_names()), ", ".join(device_names())
        raise JointoptError(f"device: found {name!r}{near}; allowed: {allowed}, or a YAML file of one's own")
    content, lines = read_yaml(text, f"device: {name!r}")
    if not isinstance(content, dict):
        raise JointoptError(f"device: {name!r} holds no figures; allowed: {', '.join(Device.model_fields)}")
    try:
        return Device.model_validate(content)
    except ValidationError as error:
        raise JointoptError(one_line(error, Device, content, lines, f"device: {name!r}")) from None
