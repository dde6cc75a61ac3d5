"""The sections of a run's configuration, each checked by itself: what its keys may hold, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from jointopt.complaints import Section
from jointopt.files import from_home
from jointopt.installed import lacking
from jointopt.names import BATCH, FINISHING_RATE, MOST, TRAINING_RATE
from jointopt.objectives import EVALUATIONS, QUANTITIES, constraint, is_column
from quant.errors import JointoptError, did_you_mean
from quant.formats import SCHEMES
from search_spaces.defaults import WIDTHS

Positive = Annotated[int, Field(gt=0)]
Threads = Annotated[int, Field(gt=0, le=MOST["threads"])]
UserPath = Annotated[str, Field(min_length=1), AfterValidator(from_home)]
Choices = list[int | float]


def _path_alone(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


def _columns(value: Any) -> Any:
    if isinstance(value, list) and (not value or not all(isinstance(each, str) for each in value)):
        raise ValueError(f"{value}; allowed: a column's name, or a list of one name or more")
    return value


class Source(Section):
    """Where samples come from, and which columns hold them.

    Attributes:
        path: a csv, tsv, json, jsonl, parquet or text file, a folder of images, or the id of a data set on the hub.
        split: of a data set on the hub ("train", "validation").
        text, text_pair, image, label: names of columns; found by their usual names where not given. Of label a list of
            them, where each output of the model has a column of its own: several classes at once, measured values.
        samples: how many to use: rows, the first after a fixed shuffle, or pieces of running text from its start
            (default: all; to calibrate 128 rows or 16 pieces).
    """

    path: UserPath
    split: str | None = None
    text: str | None = None
    text_pair: str | None = None
    image: str | None = None
    label: Annotated[str | list[str] | None, BeforeValidator(_columns)] = None
    samples: Positive | None = None


SourceOrPath = Annotated[Source, BeforeValidator(_path_alone)]


class Data(Section):
    """The data of a run.

    Attributes:
        train: for the super-network's training.
        calibrate: a few samples for ranges and importance, whose labels are not read (default: those of `train`).
        evaluate: what every genome is scored on.
        test: what the front is scored on again when the search has ended, which never sees it.
        batch_size: samples in one forward pass of calibration and evaluation (default: 32, of a language model 4).
        length: tokens in a text at most, or in a chunk of running text (default: what the model and its
            tokenizer take, 512 at most).
    """

    train: SourceOrPath | None = None
    calibrate: SourceOrPath | None = None
    evaluate: SourceOrPath | None = None
    test: SourceOrPath | None = None
    batch_size: Positive | None = None
    length: Annotated[int, Field(ge=2)] | None = None


class Space(Section):
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
    unquantized: list[str] | None = None

    def options(self) -> dict[str, Any]:
        """What is set, as keywords of `SearchSpace.for_model`."""
        return self.model_dump(exclude_none=True)

    @field_validator("depth", *WIDTHS, "schemes", "caches")
    @classmethod
    def _not_empty(cls, value: list | None) -> list | None:
        if value is not None and not value:
            raise ValueError("an empty list; allowed: one choice or more")
        return value

    @field_validator("schemes")
    @classmethod
    def _loadable(cls, value: list[str] | None) -> list[str] | None:
        whole = next((name for name in value or () if name in SCHEMES and SCHEMES[name].bitsandbytes), None)
        if whole and (told := lacking("bitsandbytes")):
            raise ValueError(f"{whole}, and {told}")
        return value


class Distill(Section):
    """What sampled sub-networks learn from the largest: `jointopt.Distillation`, which says what each number is.

    Attributes:
        teacher: a local folder, a hub id or timm/NAME of a model to learn from in the largest's place, with the same
            labels, tokens and preparation of images.
    """

    temperature: Annotated[float, Field(gt=0)] = 1.0
    hidden: Annotated[float, Field(ge=0)] = 0.0
    attention: Annotated[float, Field(ge=0)] = 0.0
    labels: Annotated[float, Field(ge=0)] = 0.0
    teacher: UserPath | None = None


class Lora(Section):
    """Adapters in place of whole weights (PEFT); with the head of a classifier, which is trained whole.

    Attributes:
        rank, alpha: of each adapter; it counts alpha / rank.
        targets: names of Linear layers that get one (q_proj, v_proj, fc1, ...).
    """

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    targets: Annotated[list[str], Field(min_length=1)]


class Train(Section):
    """Super-network training before the search. Give steps or epochs.

    Attributes:
        learning_rate: of AdamW (default: 5e-5).
        sampling: which sub-networks a step trains beside the largest: "sandwich" (the smallest and random ones),
            "random", "attentive" (random ones that keep to the config's constraints of costs), or "progressive"
            (depth, then widths, then number formats).
        random_subnetworks: how many of them are random.
        precision_from: share of the steps after which they compute in their number formats (default: never).
        learned_ranges: whether ranges of quantized weights and static inputs are trained too (LSQ), with
            precision_from.
        distill: what they learn from the largest; false has each learn the task itself.
        sort_every: steps after which channels and heads are sorted again by importance (default: never).
        lora: to train adapters alone (default: all weights).
    """

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = TRAINING_RATE
    sampling: Literal["sandwich", "random", "attentive", "progressive"] = "sandwich"
    random_subnetworks: Annotated[int, Field(ge=0)] = 2
    precision_from: Annotated[float, Field(ge=0, le=1)] | None = None
    learned_ranges: bool = False
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
        if self.learned_ranges and self.precision_from is None:
            raise ValueError("learned_ranges without precision_from; allowed: both, or neither")
        return self


class ObjectiveEntry(Section):
    """One objective: its name, and the direction in which it is better."""

    name: str
    direction: Literal["min", "max"]

    @model_validator(mode="after")
    def _known_direction(self) -> ObjectiveEntry:
        if is_column(self.name):
            raise ValueError(f"{self.name}, a column that every study has; allowed: another name")
        known = QUANTITIES[self.name].direction if self.name in QUANTITIES else self.direction
        if known != self.direction:
            raise ValueError(f"{self.name}: {self.direction}; allowed: {self.name}: {known}")
        return self


def _objective(value: Any) -> Any:
    if isinstance(value, str):
        if value not in QUANTITIES:
            allowed = f"{', '.join(QUANTITIES)}, or a metric of one's own as {{{value}: min}}"
            raise ValueError(f"{value!r}{did_you_mean(value, QUANTITIES)}; allowed: {allowed}")
        return {"name": value, "direction": QUANTITIES[value].direction}
    if isinstance(value, Mapping) and len(value) == 1 and "name" not in value:
        ((name, direction),) = value.items()
        if not isinstance(name, str):
            raise ValueError(f"{name!r} as a name; allowed: text")
        if direction not in ("min", "max"):
            raise ValueError(f"{name}: {direction!r}; allowed: min, max")
        return {"name": name, "direction": direction}
    if isinstance(value, Mapping) and set(value) == {"name", "direction"}:
        return value
    raise ValueError(f"{value!r}; allowed: a name, or {{name: min}} or {{name: max}}")


def limits(value: Any) -> Any:
    if isinstance(value, Mapping):
        for name, text in value.items():
            if not isinstance(name, str):
                raise ValueError(f"{name!r} as a name; allowed: text, such as size_mb")
            try:
                constraint(name, text)
            except JointoptError as error:
                raise ValueError(str(error).removeprefix("constraint ")) from None
    return value


NameOrEntry = Annotated[ObjectiveEntry, BeforeValidator(_objective)]


class Search(Section):
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
    evaluations: Annotated[int, Field(gt=0, le=MOST["evaluations"])] | None = None
    minutes: Annotated[float, Field(gt=0, le=MOST["minutes"])] | None = None
    patience: Positive | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    warm_start: bool = False
    batch: Annotated[int, Field(gt=0, le=MOST["batch"])] = BATCH
    workers: Positive | None = None
    ray: str | None = None
    threads: Threads | None = None
    asynchronous: bool = False

    @model_validator(mode="after")
    def _some_end(self) -> Search:
        if self.evaluations is None and self.minutes is None and self.patience is None:
            object.__setattr__(self, "evaluations", EVALUATIONS)
        if self.warm_start and self.strategy != "guided":
            raise ValueError(f"warm_start with the {self.strategy} strategy; allowed: with guided")
        return self


def choose_entry(value: Any) -> Any:
    return {value: True} if value == "knee" else value


class Choose(Section):
    """Which point of the front is exported. MB are 10^6 bytes; quality is the first objective that is measured.

    Attributes:
        size_mb: the best quality at or under this size.
        drop: the smallest whose quality is at most this much worse than the original's; where size is no objective,
            the one of the least first cost that is, or best in the first other that is.
        knee: the point of the front with the least sum of objectives, each scaled from 0, its best, to 1, its worst.
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


class Finish(Section):
    """What is done to the chosen point and its neighbours on the front when the search has ended. Give rounding or
    steps; with neither, rounding is gptq.

    Attributes:
        rounding: "gptq"; or "descent" or "learned", which go on from it, the one column by column, the other block by
            block towards the block's outputs.
        steps: of training each of them alone, in its number formats, distilled from the whole model on `data.train`.
        batch_size, learning_rate: of that training.
        learned_ranges: whether it trains the ranges of quantized weights and static inputs too (LSQ).
        top: how many points are finished and scored again; what is best then is exported.
    """

    rounding: Literal["gptq", "descent", "learned"] | None = None
    steps: Positive | None = None
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = FINISHING_RATE
    learned_ranges: bool = False
    top: Positive = 3

    @model_validator(mode="after")
    def _one(self) -> Finish:
        if self.rounding is not None and self.steps is not None:
            raise ValueError("both rounding and steps; allowed: one of them")
        if self.learned_ranges and self.steps is None:
            raise ValueError("learned_ranges without steps; allowed: both, or neither")
        return self


class Hardware(Section):
    """What a sub-network shall run on, so that latency, energy and peak memory can be objectives.

    Attributes:
        device: the name of one that comes with the package, or a YAML file of one's own, for its roofline; or "this":
            this machine, whose operators are timed: in ONNX Runtime (target onnxruntime), or in torch on what the run
            computes on (target transformers, with number formats of weights alone).
        batch: samples that are computed together.
        context: tokens of a sample (default: as many as calibration samples have on average).
        parallel: devices over which each layer is spread.
        threads: of the CPU, for "this".
    """

    device: UserPath
    batch: Annotated[int, Field(gt=0, le=MOST["batch"])] = 1
    context: Annotated[int, Field(gt=0, le=MOST["context"])] | None = None
    parallel: Annotated[int, Field(gt=0, le=MOST["parallel"])] = 1
    threads: Threads = 1

    @property
    def is_this_machine(self) -> bool:
        return self.device == "this"

    @model_validator(mode="after")
    def _of_its_kind(self) -> Hardware:
        if self.is_this_machine and (self.context is not None or self.parallel > 1):
            key = "parallel" if self.context is None else "context"
            raise ValueError(f"{key} with device this, which is timed as it is; allowed: with a device by name or file")
        if self.threads > 1 and not self.is_this_machine:
            raise ValueError(f"threads with device {self.device}; allowed: with device this")
        return self
