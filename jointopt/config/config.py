"""The typed configuration of a run: one YAML file, checked whole before anything is loaded.

    config = load_config("bert.yaml")
    config.search.evaluations     # 200

Paths in it are relative to the directory that the command is started in, not to the file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from jointopt.complaints import Section, described, one_line
from jointopt.config.sections import (
    Choose,
    Data,
    Finish,
    Hardware,
    NameOrEntry,
    Search,
    Space,
    Train,
    UserPath,
    choose_entry,
    limits,
)
from jointopt.names import TASK_NAMES, TargetName, TaskName
from jointopt.objectives import ENERGIES, ON_HARDWARE, QUANTITIES, constraint
from jointopt.rows import DataSource
from jointopt.supernet.transforms import TRANSFORMS
from jointopt.targets import TARGETS, UNEVEN, Target, check_schemes, closed_key, narrowed, of_kind
from jointopt.yaml_lines import Dumper, read_yaml
from quant.errors import JointoptError, did_you_mean
from search_spaces.defaults import ARCHITECTURE, space_for_model
from search_spaces.space import SearchSpace

RANGES = ("weight_calibration", "activation_calibration")
"""Keys that say how the ranges of number formats are chosen, by which training in these formats rounds too."""


class Config(Section):
    """A whole run; the README shows one by example.

    Attributes:
        model: a local folder, a GGUF file or a folder with one, a hub id, or timm/NAME.
        task: how data becomes batches and quality; with `quality` it is read off the model where not given.
        repair: whether layers whose inputs are narrowed are fitted to what they computed before, by least squares.
        transforms: changes of the weights that keep the model's function and make it easier to quantize.
        weight_calibration, activation_calibration: how the ranges of quantized weights, and of static activations, are
            chosen.
        quality: "package.function", model -> float (or a dict of metrics), instead of the task's own metrics.
        constraints: limits on costs and measured objectives, "<= number" or ">= number" by name; size_mb is in 10^6.
        target: the library that the export is for; all but "transformers" narrow number formats to those they compute.
        hardware: what the exported sub-network shall run on; `device` is what this run computes on.
        output: the folder of everything that the run writes.
    """

    model: UserPath
    task: TaskName | None = None
    quality: str | None = None
    data: Data = Data()
    space: Space = Space()
    repair: bool = False
    transforms: Annotated[list[str], Field(min_length=1)] | None = None
    weight_calibration: Literal["minmax", "percentile", "mse"] = "minmax"
    activation_calibration: Literal["minmax", "average", "percentile", "mse", "entropy"] = "mse"
    train: Train | None = None
    objectives: Annotated[list[NameOrEntry], Field(min_length=1)] | None = None
    search: Search = Search()
    constraints: Annotated[dict[str, str], BeforeValidator(limits)] | None = None
    choose: Annotated[Choose, BeforeValidator(choose_entry)] = Choose(knee=True)
    finish: Finish | None = None
    target: TargetName = "transformers"
    hardware: Hardware | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    output: UserPath

    @field_validator("quality")
    @classmethod
    def _dotted(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value):
            raise ValueError(f"{value!r}; allowed: my_package.my_function")
        return value

    @field_validator("transforms")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        for name in value or ():
            if name not in TRANSFORMS:
                raise ValueError(f"{name!r}{did_you_mean(name, TRANSFORMS)}; allowed: {', '.join(TRANSFORMS)}")
        return value

    @model_validator(mode="after")
    def _names_its_data(self) -> Config:
        if self.task is None and self.quality is None:
            raise ValueError(
                f"neither task nor quality; allowed: {', '.join(TASK_NAMES)}; or quality: package.function"
            )
        if self.quality is None and self.data.evaluate is None:
            raise ValueError("no data.evaluate; allowed: what every genome is scored on, a path or a hub id")
        if self.data.test is not None and self.data.test == self.data.evaluate:
            raise ValueError("data.test is data.evaluate; allowed: samples that the search does not see")
        if self.quality is not None and self.data.test is not None:
            raise ValueError("data.test with quality, which has its own data; allowed: one of them")
        if self.data.calibrate is None and self.data.train is None:
            raise ValueError("neither data.calibrate nor data.train; allowed: a path or a hub id")
        if self.train is not None and self.data.train is None:
            raise ValueError("train without data.train; allowed: both or neither")
        if self.finish is not None and self.finish.steps is not None and self.data.train is None:
            raise ValueError("finish.steps without data.train; allowed: both, or finish.rounding")
        return self

    @model_validator(mode="after")
    def _wishes_go_together(self) -> Config:
        if self.train is not None and self.train.sampling == "attentive" and not self.constraints:
            raise ValueError("train.sampling attentive without constraints; allowed: limits on costs to sample within")
        names = [entry.name for entry in self.objectives or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"objectives {', '.join(names)}; allowed: each once")
        if self.choose.drop is not None and len(names) == 1:
            raise ValueError(
                f"choose.drop with objectives {names[0]} alone; allowed: with a cost among them, such as size"
            )
        try:
            for name, text in (self.constraints or {}).items() if self.quality is None else ():
                wanted = constraint(name, text)
                if name in QUANTITIES:
                    wanted.check_within(*QUANTITIES[name].range)
        except JointoptError as error:
            raise ValueError(str(error)) from None
        asked = [*names, *(self.constraints or ())]
        wanting = next((name for name in asked if name in ON_HARDWARE), None)
        if wanting is not None and self.hardware is None:
            raise ValueError(f"{wanting} without hardware; allowed: with hardware: {{device: NAME}}")
        untimed = next((name for name in asked if name in ENERGIES), None)
        if untimed is not None and self.hardware is not None and self.hardware.is_this_machine:
            allowed = ", ".join(name for name in ON_HARDWARE if name not in ENERGIES)
            raise ValueError(f"{untimed} with hardware.device this, which is timed; allowed: {allowed}")
        return self

    @model_validator(mode="after")
    def _target_has_a_place_for_it(self) -> Config:
        wanted = TARGETS[self.target]
        try:
            check_schemes(wanted, self.space.schemes or ())
        except JointoptError as error:
            raise ValueError(f"space.schemes: {error}") from None
        try:
            self._check_open(wanted)
        except JointoptError as error:
            raise ValueError(str(error)) from None
        if wanted.fused and self.space.precision_per == "layer":
            raise ValueError(
                f"space.precision_per layer with target {wanted.name}, where q, k, v are one layer; "
                "allowed: projection, block"
            )
        if self.space.caches and not wanted.caches:
            raise ValueError(f"space.caches with target {wanted.name}; allowed: leave them out")
        if self.dtype not in ("auto", *wanted.dtypes):
            raise ValueError(f"dtype {self.dtype} with target {wanted.name}; allowed: {', '.join(wanted.dtypes)}")
        if self.hardware is not None and self.hardware.is_this_machine and wanted.backend is None:
            timed = ", ".join(name for name, each in TARGETS.items() if each.backend)
            raise ValueError(f"hardware.device this with target {self.target}; allowed: {timed}, which are timed")
        return self

    def _check_open(self, wanted: Target, kind: str = "") -> None:
        found = closed_key(wanted, self.space.options())
        if found is not None:
            allowed = ", ".join(key for key in ("depth", *UNEVEN) if key not in wanted.closed)
            raise JointoptError(f"space.{found} with target {wanted.name}{kind}; allowed: {allowed}")

    def space_options(self, kind: str | None = None) -> dict[str, Any]:
        """What the space says, as keywords of `SearchSpace.for_model`; number formats are the target's.

        Args:
            kind: the model's type, by its config.
        """
        options, wanted = self.space.options(), of_kind(TARGETS[self.target], kind)
        if "schemes" not in options and wanted.default_schemes is not None:
            options["schemes"] = list(wanted.default_schemes)
        if not any(options.get(key) for key in (*ARCHITECTURE, "preset")):
            options.update(wanted.open)
        if wanted.unquantized:
            options["unquantized"] = sorted({*wanted.unquantized, *options.get("unquantized", ())})
        return options

    def search_space(self, model: Any) -> SearchSpace:
        """The space of a model, without what the target has no place for.

        Raises:
            JointoptError: it names what models of this type have no place for there.
        """
        kind = getattr(getattr(model, "config", None), "model_type", None)
        wanted = of_kind(TARGETS[self.target], kind)
        self._check_open(wanted, f" and a {kind}")
        return narrowed(wanted, space_for_model(model, **self.space_options(kind)))

    def source(self, entry: str, samples: int | None = None) -> DataSource:
        """data.train, .calibrate (or .train in its place; without labels), .evaluate or .test; `samples` where it has
        none."""
        if entry == "calibrate" and self.data.calibrate is None:
            given, key = self.data.train, "data.train"
        else:
            given, key = getattr(self.data, entry), f"data.{entry}"
        assert given is not None, f"{key} was not checked"
        options = given.model_dump()
        options["samples"] = options["samples"] or samples
        return DataSource(**options, length=self.data.length, labelled=entry != "calibrate", key=key)

    def record(self) -> dict[str, Any]:
        """What determines a study's values, as JSON can hold it: what must not change when it is resumed."""
        content = self.model_dump(exclude_none=True, exclude={"choose", "finish", "output", "device"})
        for key in ("evaluations", "minutes", "patience", "workers", "ray", "threads"):
            content["search"].pop(key, None)
        content["data"].pop("test", None)
        for key in RANGES:
            if content[key] == type(self).model_fields[key].default:
                content.pop(key)  # as in studies that were begun before it could be chosen
        if self.train is None and self.data.calibrate is not None:
            content["data"].pop("train", None)  # only finishing reads it
        return content

    def training_record(self) -> dict[str, Any]:
        """What of it determines the trained super-network and what was timed of it."""
        content = self.record()
        keys = ["model", "data", "space", "train", "dtype", "transforms"]
        if self.train is not None and self.train.precision_from is not None:
            keys += RANGES
        if self.train is not None and self.train.sampling == "attentive":
            keys.append("constraints")
        return {**{key: content[key] for key in keys if content.get(key)}, "seed": self.search.seed}

    def to_yaml(self) -> str:
        """The whole configuration, defaults written out; `load_config` reads it back."""
        content = self.model_dump(exclude_none=True)
        return yaml.dump(content, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """Reads and checks a config.

    Args:
        path: a YAML file.
        overrides: dotted key -> value, in place of what the file says ({"search.evaluations": 20}).

    Raises:
        JointoptError: an unknown key (with the nearest valid one), a wrong type, a missing file: the file and line,
            the key, what was found and what is allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise JointoptError(f"{path}: {reason}; allowed: a YAML file") from None
    content, lines = read_yaml(text, str(path))
    if not isinstance(content, dict):
        raise JointoptError(f"{path}: found {described(content)}; allowed: keys, {', '.join(Config.model_fields)}")
    for key, value in (overrides or {}).items():
        _set(content, key.split("."), value)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise JointoptError(one_line(error, Config, content, lines, str(path))) from None


def _set(content: dict, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        if not isinstance(content.get(key), dict):
            content[key] = {}
        content = content[key]
    content[keys[-1]] = value
