"""The typed configuration of a run: one YAML file, checked whole before anything is loaded.

    config = load_config("bert.yaml")
    config.search.evaluations     # 200

Paths in it are relative to the directory that the command is started in, not to the file.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from jointopt.objectives import DIRECTIONS, EVALUATIONS, ON_HARDWARE, constraint
from quant.errors import JointoptError, did_you_mean
from quant.formats import SCHEMES

from .config_complaints import described, dotted, one_line
from .rows import DataSource
from .targets import TARGETS, check_schemes
from .transforms import TRANSFORMS

TASKS = ("text-classification", "image-classification", "causal-lm")
TaskName = Literal["text-classification", "image-classification", "causal-lm"]

UNEVEN = ("heads", "mlp", "bottleneck", "stage", "keep", "attention_keep", "mlp_keep")
"""Keys of a space by which blocks can differ."""

Positive = Annotated[int, Field(gt=0)]
Choices = list[int | float]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class Source(_Section):
    """Where samples come from, and which columns hold them.

    Attributes:
        path: a csv, tsv, json, jsonl, parquet or text file, a folder of images, or the id of a data set on the hub.
        split: of a data set on the hub ("train", "validation").
        text, text_pair, image, label: names of columns; found by their usual names where not given.
        samples: how many to use: rows, the first after a fixed shuffle, or pieces of running text from its start
            (default: all; to calibrate 128 rows or 16 pieces).
    """

    path: str
    split: str | None = None
    text: str | None = None
    text_pair: str | None = None
    image: str | None = None
    label: str | None = None
    samples: Positive | None = None


SourceOrPath = Annotated[Source, BeforeValidator(_path_alone)]


class Data(_Section):
    """The data of a run.

    Attributes:
        train: for the super-network's training.
        calibrate: a few samples for ranges and importance (default: those of `train`).
        evaluate: what every genome is scored on.
        test: what the front is scored on again when the search has ended, which never sees it.
        batch_size: samples in one forward pass of calibration and evaluation (default: 32, of a language model 4).
        length: tokens in a text at most, or in a chunk of running text (default: what the model takes, 512 at most).
    """

    train: SourceOrPath | None = None
    calibrate: SourceOrPath | None = None
    evaluate: SourceOrPath | None = None
    test: SourceOrPath | None = None
    batch_size: Positive | None = None
    length: Annotated[int, Field(ge=2)] | None = None


class Space(_Section):
    """The search space: a preset, or the choices written out, or neither for the default of the model's family."""

    preset: str | None = None
    depth: Choices | None = None
    heads: Choices | None = None
    mlp: Choices | None = None
    bottleneck: Choices | None = None
    stage: Choices | None = None
    keep: bool | None = None
    attention_keep: bool | None = None
    mlp_keep: bool | None = None
    schemes: list[str] | None = None
    precision_per: Literal["layer", "projection", "block"] | None = None
    caches: list[str] | None = None

    def options(self) -> dict[str, Any]:
        """What is set, as keywords of `SearchSpace.for_model`."""
        return self.model_dump(exclude_none=True)

    @field_validator("depth", "heads", "mlp", "bottleneck", "stage", "schemes", "caches")
    @classmethod
    def _not_empty(cls, value: list | None) -> list | None:
        if value is not None and not value:
            raise ValueError("an empty list; allowed: one choice or more")
        return value

    @field_validator("schemes")
    @classmethod
    def _loadable(cls, value: list[str] | None) -> list[str] | None:
        whole = next((name for name in value or () if name in SCHEMES and SCHEMES[name].bitsandbytes), None)
        if whole and find_spec("bitsandbytes") is None:
            raise ValueError(f"{whole}, and no bitsandbytes to load it; pip install 'jointopt[bitsandbytes]'")
        return value


class Distill(_Section):
    """What sampled sub-networks learn from the largest: `jointopt.Distillation`, which says what each number is.

    Attributes:
        teacher: a local folder, a hub id or timm/NAME of a model to learn from in the largest's place.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0
    hidden: Annotated[float, Field(ge=0)] = 0.0
    attention: Annotated[float, Field(ge=0)] = 0.0
    labels: Annotated[float, Field(ge=0)] = 0.0
    teacher: str | None = None


class Lora(_Section):
    """Adapters in place of whole weights (PEFT); with the head of a classifier, which is trained whole.

    Attributes:
        rank, alpha: of each adapter; it counts alpha / rank.
        targets: names of layers that get one (q_proj, v_proj, fc1, ...).
    """

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    targets: Annotated[list[str], Field(min_length=1)]


class Train(_Section):
    """Super-network training before the search. Give steps or epochs.

    Attributes:
        learning_rate: of AdamW (default: 5e-5).
        sampling: which sub-networks a step trains beside the largest: "sandwich" (the smallest and random ones),
            "random", "attentive" (random ones that keep to the config's constraints of costs), or "progressive"
            (depth, then widths, then number formats).
        random_subnetworks: how many of them are random.
        precision_from: share of the steps after which they compute in their number formats (default: never).
        distill: what they learn from the largest; false has each learn the task itself.
        sort_every: steps after which channels and heads are sorted again by importance (default: never).
        lora: to train adapters alone (default: all weights).
    """

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    sampling: Literal["sandwich", "random", "attentive", "progressive"] = "sandwich"
    random_subnetworks: Annotated[int, Field(ge=0)] = 2
    precision_from: Annotated[float, Field(ge=0, le=1)] | None = None
    distill: Distill | Literal[False] = Distill()
    sort_every: Positive | None = None
    lora: Lora | None = None

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"{'neither' if self.steps is None else 'both'} of steps and epochs; allowed: one of them")
        if self.sampling == "random" and not self.random_subnetworks:
            raise ValueError("sampling random with random_subnetworks 0; allowed: 1 or more")
        if self.lora is not None and self.sort_every is not None:
            raise ValueError("sort_every with lora; allowed: one of them")
        return self


class ObjectiveEntry(_Section):
    """One objective: its name, and the direction in which it is better."""

    name: str
    direction: Literal["min", "max"]

    @model_validator(mode="after")
    def _known_direction(self) -> ObjectiveEntry:
        known = DIRECTIONS.get(self.name, self.direction)
        if known != self.direction:
            raise ValueError(f"{self.name}: {self.direction}; allowed: {self.name}: {known}")
        return self


def _objective(value: Any) -> Any:
    if isinstance(value, str):
        if value not in DIRECTIONS:
            near = difflib.get_close_matches(value, DIRECTIONS, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{value!r}{hint}; allowed: {', '.join(DIRECTIONS)}, or a metric of one's own as {{{value}: min}}"
            )
        return {"name": value, "direction": DIRECTIONS[value]}
    if isinstance(value, Mapping) and len(value) == 1 and "name" not in value:
        ((name, direction),) = value.items()
        if direction not in ("min", "max"):
            raise ValueError(f"{name}: {direction!r}; allowed: min, max")
        return {"name": name, "direction": direction}
    if isinstance(value, Mapping) and set(value) == {"name", "direction"}:
        return value
    raise ValueError(f"{value!r}; allowed: a name, or {{name: min}} or {{name: max}}")


def _limits(value: Any) -> Any:
    if isinstance(value, Mapping):
        for name, text in value.items():
            try:
                constraint(str(name), text)
            except JointoptError as error:
                raise ValueError(str(error).removeprefix("constraint ")) from None
    return value


NameOrEntry = Annotated[ObjectiveEntry, BeforeValidator(_objective)]


class Search(_Section):
    """How the space is searched.

    Attributes:
        evaluations: how many sub-networks are really measured (default: 200; with minutes or patience, any number).
        minutes: of searching, earlier runs counted.
        patience: evaluations without any hypervolume gained, after which the search ends.
        seed: of everything random.
        warm_start: whether "guided" begins with what one pass of gradients tells of each choice.
        batch: sub-networks asked for at a time.
        workers: processes on this machine that evaluate.
        ray: auto, or the address of a Ray cluster, for its workers.
        threads: of torch in each evaluation (default: with workers 1, else torch's setting).
        asynchronous: to wait for no batch to end, at the price of determinism.
    """

    strategy: Literal["guided", "evolutionary", "random"] = "guided"
    evaluations: Positive | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    patience: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    warm_start: bool = False
    batch: Positive = 10
    workers: Positive | None = None
    ray: str | None = None
    threads: Positive | None = None
    asynchronous: bool = False

    @model_validator(mode="after")
    def _some_end(self) -> Search:
        if self.evaluations is None and self.minutes is None and self.patience is None:
            object.__setattr__(self, "evaluations", EVALUATIONS)
        return self


def _choice(value: Any) -> Any:
    return {value: True} if value == "knee" else value


class Choose(_Section):
    """Which point of the front is exported. MB are 10^6 bytes.

    Attributes:
        size_mb: the best quality at or under this size.
        drop: the smallest whose quality is at most this much worse than the original's.
        knee: the point farthest from the line between the ends of the front.
    """

    size_mb: Annotated[float, Field(gt=0)] | None = None
    drop: Annotated[float, Field(ge=0)] | None = None
    knee: Literal[True] | None = None

    @model_validator(mode="after")
    def _one(self) -> Choose:
        given = self.model_dump(exclude_none=True)
        if len(given) != 1:
            raise ValueError(f"{', '.join(given) or 'nothing'}; allowed: one of size_mb, drop, knee")
        return self


class Finish(_Section):
    """What is done to the chosen point and its neighbours on the front when the search has ended. Give rounding or
    steps; with neither, rounding is gptq.

    Attributes:
        rounding: "gptq"; or "descent", which goes on from it column by column.
        steps: of training each of them alone, in its number formats, distilled from the whole model on `data.train`.
        batch_size, learning_rate: of that training.
        top: how many points are finished and scored again; what is best then is exported.
    """

    rounding: Literal["gptq", "descent"] | None = None
    steps: Positive | None = None
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    top: Positive = 3

    @model_validator(mode="after")
    def _one(self) -> Finish:
        if self.rounding is not None and self.steps is not None:
            raise ValueError("both rounding and steps; allowed: one of them")
        return self


class Hardware(_Section):
    """What a sub-network shall run on, so that latency, energy and peak memory can be objectives.

    Attributes:
        device: the name of one that comes with the package, or a YAML file of one's own, for its roofline; or "this":
            this machine, whose operators are timed in ONNX Runtime (with target onnxruntime).
        batch: samples that are computed together.
        context: tokens of a sample (default: as many as a calibration sample has).
        parallel: devices over which each layer is spread.
        threads: of ONNX Runtime, for "this".
    """

    device: str
    batch: Positive = 1
    context: Positive | None = None
    parallel: Positive = 1
    threads: Positive = 1


class Config(_Section):
    """A whole run; the README shows one by example.

    Attributes:
        model: a local folder, a hub id, timm/NAME, or a folder with a GGUF file.
        task: how data becomes batches and quality; with `quality` it is read off the model where not given.
        repair: whether layers whose inputs are narrowed are fitted to what they computed before, by least squares.
        transforms: changes of the weights that keep the model's function and make it easier to quantize.
        quality: "package.function", model -> float (or a dict of metrics), instead of the task's own metrics.
        constraints: limits on costs and measured objectives, "<= number" or ">= number" by name; size_mb is in 10^6.
        target: the library that the export is for; "onnxruntime" narrows the number formats to those that it computes.
        hardware: what the exported sub-network shall run on; `device` is what this run computes on.
        output: the folder of everything that the run writes.
    """

    model: str
    task: TaskName | None = None
    quality: str | None = None
    data: Data = Data()
    space: Space = Space()
    repair: bool = False
    transforms: Annotated[list[str], Field(min_length=1)] | None = None
    train: Train | None = None
    objectives: Annotated[list[NameOrEntry], Field(min_length=1)] | None = None
    search: Search = Search()
    constraints: Annotated[dict[str, str], BeforeValidator(_limits)] | None = None
    choose: Annotated[Choose, BeforeValidator(_choice)] = Choose(knee=True)
    finish: Finish | None = None
    target: Literal["transformers", "onnxruntime", "gguf"] = "transformers"
    hardware: Hardware | None = None
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    output: str

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
    def _complete(self) -> Config:
        if self.task is None and self.quality is None:
            raise ValueError(f"neither task nor quality; allowed: {', '.join(TASKS)}; or quality: package.function")
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
        if self.train is not None and self.train.sampling == "attentive" and not self.constraints:
            raise ValueError("train.sampling attentive without constraints; allowed: limits on costs to sample within")
        names = [entry.name for entry in self.objectives or ()]
        if len(set(names)) < len(names):
            raise ValueError(f"objectives {', '.join(names)}; allowed: each once")
        wanted = TARGETS[self.target]
        try:
            check_schemes(wanted, self.space.schemes or ())
        except JointoptError as error:
            raise ValueError(f"space.schemes: {error}") from None
        narrowed = [key for key in UNEVEN if getattr(self.space, key)]
        if wanted.uniform and (narrowed or self.space.preset not in (None, "fixed")):
            found = narrowed[0] if narrowed else f"preset {self.space.preset}"
            raise ValueError(
                f"space.{found} with target {wanted.name}, whose blocks are all of one size; allowed: depth"
            )
        if self.space.caches and not wanted.caches:
            raise ValueError(f"space.caches with target {wanted.name}; allowed: leave them out")
        if self.dtype not in ("auto", *wanted.dtypes):
            raise ValueError(f"dtype {self.dtype} with target {wanted.name}; allowed: {', '.join(wanted.dtypes)}")
        if self.hardware is not None and self.hardware.device == "this" and self.target != "onnxruntime":
            raise ValueError(
                "hardware.device this with target transformers; allowed: target: onnxruntime, which is timed"
            )
        wanting = next((name for name in [*names, *(self.constraints or ())] if name in ON_HARDWARE), None)
        if wanting is not None and self.hardware is None:
            raise ValueError(f"{wanting} without hardware; allowed: with hardware: {{device: NAME}}")
        return self

    def space_options(self) -> dict[str, Any]:
        """What the space says, as keywords of `SearchSpace.for_model`; number formats are the target's."""
        options, wanted = self.space.options(), TARGETS[self.target]
        if "schemes" not in options and wanted.default_schemes is not None:
            options["schemes"] = list(wanted.default_schemes)
        if wanted.uniform and not {"depth", "preset"} & set(options):
            options["preset"] = "fixed"
        return options

    def source(self, entry: str, samples: int | None = None) -> DataSource:
        """data.train, .calibrate (or .train in its place), .evaluate or .test; `samples` where it has none."""
        if entry == "calibrate" and self.data.calibrate is None:
            given, key = self.data.train, "data.train"
        else:
            given, key = getattr(self.data, entry), f"data.{entry}"
        assert given is not None, f"{key} was not checked"
        options = given.model_dump()
        options["samples"] = options["samples"] or samples
        return DataSource(**options, length=self.data.length, key=key)

    def record(self) -> dict[str, Any]:
        """What determines a study's values, as JSON can hold it: what must not change when it is resumed."""
        content = self.model_dump(exclude_none=True, exclude={"choose", "finish", "output", "device"})
        for key, default in (("repair", False), ("target", "transformers")):
            if content[key] == default:
                content.pop(key)
        for key in ("evaluations", "minutes", "patience", "workers", "ray", "threads"):
            content["search"].pop(key, None)
        content["data"].pop("test", None)
        return content

    def to_yaml(self) -> str:
        """The whole configuration, defaults written out; `load_config` reads it back."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML by safe loading, in which 5e-5 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


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
    try:
        node = yaml.compose(text, Loader=_Loader)
        lines = _lines(node, path) if node else {}
        content = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise JointoptError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
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


def _lines(node: yaml.Node, path: str | Path, at: tuple = ()) -> dict[tuple, int]:
    """Path of keys and list indices -> line number in the file; refuses a key that is there twice."""
    found = {at: node.start_mark.line + 1}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*at, key.value)
            line = key.start_mark.line + 1
            if below in found:
                raise JointoptError(f"{path}, line {line}: {dotted(below)}: found twice; allowed: once")
            found |= {**_lines(value, path, below), below: line}
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            found |= _lines(value, path, (*at, index))
    return found
