"""The config: the issue's example is valid, and every mistake is one line that names the key."""

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jointopt import JointoptError, Supernet, strategies
from jointopt.checkpoint import card
from jointopt.checkpoint.writers import WRITERS
from jointopt.config.config import RANGES, Config, load_config
from jointopt.config.sections import Finish, Search, Space, Train
from jointopt.finishing.rounding import ROUNDINGS
from jointopt.models import DTYPES
from jointopt.targets import TARGETS
from jointopt.tasks import TASKS
from jointopt.training import sampling
from quant.calibration import ACTIVATION_METHODS, WEIGHT_METHODS
from quant.formats import SCHEMES
from search_spaces.precision import PRECISION_PER

EXAMPLE = """
model: ./my-finetuned-bert
task: text-classification
data: {train: train.csv, calibrate: train.csv, evaluate: valid.csv}
space:
  preset: bert
  schemes: [none, W8A8, W4A16, FP8_DYNAMIC, NVFP4]
  precision_per: projection
objectives: [accuracy, size]
search: {strategy: guided, evaluations: 200, seed: 0}
choose: {size_mb: 20}
device: auto
output: runs/bert
"""
MINIMAL = "model: m\ntask: causal-lm\ndata: {calibrate: a.txt, evaluate: b.txt}\noutput: runs/x\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(JointoptError) as error:
        load_config(written(folder, text))
    message = str(error.value)
    assert "\n" not in message
    return message


def test_a_whole_example_is_read(tmp_path):
    config = load_config(written(tmp_path, EXAMPLE))
    assert config.data.train.path == "train.csv"
    assert config.space.options() == {
        "preset": "bert",
        "schemes": ["none", "W8A8", "W4A16", "FP8_DYNAMIC", "NVFP4"],
        "precision_per": "projection",
    }
    assert [(entry.name, entry.direction) for entry in config.objectives] == [("accuracy", "max"), ("size", "min")]
    assert (config.search.strategy, config.search.evaluations, config.choose.size_mb) == ("guided", 200, 20)


def test_what_is_left_out_has_a_default(tmp_path):
    config = load_config(written(tmp_path, MINIMAL))
    assert (config.search.evaluations, config.choose.knee, config.dtype, config.train) == (200, True, "auto", None)


def test_the_written_out_config_reads_back_the_same(tmp_path):
    config = load_config(written(tmp_path, EXAMPLE + "train: {steps: 10, learning_rate: 5e-5}\n"))
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert load_config(again) == config
    assert config.train.learning_rate == 5e-5


def test_an_output_that_looks_like_a_number_reads_back_as_text(tmp_path):
    for text in ("1e5", "010", "0o10", "1:00", "2026-11-30", ".5", "1."):
        config = load_config(written(tmp_path, MINIMAL.replace("runs/x", f'"{text}"')))
        assert load_config(written(tmp_path, config.to_yaml())).output == text


@pytest.mark.parametrize("output", ["2026-30-11", "2026-11-30", "1:00"])
def test_an_output_that_is_a_number_or_a_date_to_older_yaml_is_text(tmp_path, output):
    assert load_config(written(tmp_path, MINIMAL.replace("runs/x", output))).output == output


@pytest.mark.parametrize(("text", "number"), [("010", 10), ("0o10", 8), ("0x10", 16), ("+7", 7)])
def test_whole_numbers_are_those_of_yaml_1_2(tmp_path, text, number):
    config = load_config(written(tmp_path, MINIMAL + f"search: {{evaluations: {text}}}\n"))
    assert config.search.evaluations == number


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("serch: {seed: 1}", "line 5: serch: unknown key; did you mean 'search'?"),
        ("search: {evaluation: 9}", "line 5: search.evaluation: unknown key; did you mean 'evaluations'?"),
        ("search: {evaluations: many}", "search.evaluations: found 'many'; allowed: a whole number"),
        ("search: {evaluations: 0}", "search.evaluations: found 0; allowed: more than 0"),
        ("search: {strategy: magic}", "search.strategy: found 'magic'; allowed: guided, evolutionary, random"),
        ("search: 7", "search: found 7; allowed: keys of strategy, evaluations, "),
        ("space: {mpl: [1]}", "space.mpl: unknown key; did you mean 'mlp'?"),
        ("space: {heads: many}", "space.heads: found 'many'; allowed: a list of whole numbers or numbers"),
        ("space: {heads: [2, x]}", "space.heads.1: found 'x'; allowed: a whole number, a number"),
        ("space: {schemes: []}", "space.schemes: found an empty list; allowed: one choice or more"),
        ("objectives: [acuracy]", "objectives.0: found 'acuracy'; did you mean 'accuracy'?"),
        ("objectives: [{f1: up}]", "objectives.0: found f1: 'up'; allowed: min, max"),
        ("objectives: [{loss: max}]", "found loss: max; allowed: loss: min"),
        ("objectives: [size, size]", "each once"),
        ("search: {minutes: 0}", "search.minutes: found 0; allowed: more than 0"),
        ("constraints: {size_mb: 20}", "constraints: found 'size_mb': found 20; allowed: '<= number' or '>= number'"),
        ("constraints: [size]", "constraints: found a list; allowed: {size_mb: '<= 20'} and the like"),
        ("choose: best", "choose: found 'best'; allowed: {size_mb: 20}, {drop: 0.01} or knee"),
        (
            "objectives: [accuracy]\nchoose: {drop: 0.1}",
            "choose.drop with objectives accuracy alone; allowed: with a cost",
        ),
        ("choose: {size_mb: 2, drop: 0.1}", "choose: found size_mb, drop; allowed: one of"),
        ("dtype: float16", "dtype: found 'float16'; allowed: auto, float32, bfloat16"),
        ("device: tpu", "device: found 'tpu'; allowed: auto, cpu, cuda, cuda:1 and the like"),
        ("quality: accuracy", "quality: found 'accuracy'; allowed: my_package.my_function"),
        ("train: {epochs: 1}", "train without data.train"),
        ("train: {batch_size: 8}", "train: found neither of steps and epochs"),
        ("finish: {learned_ranges: true}", "finish: found learned_ranges without steps; allowed: both, or neither"),
        ("train: {steps: 5, learned_ranges: true}", "learned_ranges without precision_from; allowed: both"),
        ("model: other", "line 5: model: found twice"),
        ("hardware: {device: this, context: 7}", "context with device this, which is timed as it is"),
        ("hardware: {device: this, parallel: 2}", "parallel with device this, which is timed as it is"),
        (
            "target: onnxruntime\nhardware: {device: this}\nobjectives: [accuracy, energy]",
            "energy with hardware.device this, which is timed; allowed: latency, decode_latency, peak_memory",
        ),
        ("hardware: {device: orin, threads: 2}", "threads with device orin; allowed: with device this"),
        ("space: {{x}}", "line 5: found a key in braces or brackets; allowed: text, in quotes"),
        ("space: &a [*a]", "found a list or mapping that holds itself"),
        ("on: 4", "line 5: on: found a key that YAML takes for a number, a truth value or the like; allowed: text"),
        ("~: 4", "line 5: ~: found a key that YAML takes for"),
        ("4: x", "line 5: 4: found a key that YAML takes for"),
        ("constraints: {3: '<= 1'}", "line 5: constraints.3: found a key that YAML takes for"),
        ("objectives: [{no: min}]", "line 5: objectives.0.no: found a key that YAML takes for"),
        ("objectives: [{seconds: min}]", "found seconds, a column that every study has; allowed: another name"),
        ("transforms: []", "transforms: found an empty list; allowed: one or more"),
        ("train: {steps: 5, precision_from: 1.5}", "train.precision_from: found 1.5; allowed: at most 1"),
        ("train: {epochs: .inf}", "train.epochs: found inf; allowed: a number"),
        ("search: {minutes: .inf}", "search.minutes: found inf; allowed: a number"),
        ("search: {strategy: random, warm_start: true}", "warm_start with the random strategy; allowed: with guided"),
        ("search: {evaluations: 1:00}", "search.evaluations: found '1:00'; allowed: a whole number"),
        ("search: {evaluations: 1_000}", "search.evaluations: found '1_000'; allowed: a whole number"),
        ("search: {evaluations: !!timestamp 2026-30-11}", "not YAML: a value is not what its tag says: ValueError("),
        ("search: {evaluations: !!timestamp soon}", "not YAML: a value is not what its tag says"),
        ("search: {warm_start: !!bool maybe}", "not YAML: a value is not what its tag says"),
        ("search: {minutes: !!float ''}", "not YAML: a value is not what its tag says"),
        ("search: {batch: 99999999999}", "search.batch: found 99999999999; allowed: at most 1000000"),
        ("hardware: {device: orin, batch: 99999999999}", "hardware.batch: found 99999999999; allowed: at most 1000000"),
        (
            "hardware: {device: orin, context: 1000000000}",
            "hardware.context: found 1000000000; allowed: at most 100000000",
        ),
        (
            "hardware: {device: h100, parallel: 99999999999}",
            "hardware.parallel: found 99999999999; allowed: at most 10000",
        ),
        ("search: {threads: 100000}", "search.threads: found 100000; allowed: at most 1024"),
        ("search: {minutes: 1.0e14}", "search.minutes: found 100000000000000.0; allowed: at most 10000000"),
        ("model2: [", "not YAML"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(tmp_path, line, said):
    assert said in complaint(tmp_path, MINIMAL + line + "\n")


@pytest.mark.parametrize(("key", "value"), [("constraints", {3: "<= 1"}), ("objectives", [{3: "min"}])])
def test_a_name_that_is_no_text_is_refused_where_no_file_says_it_too(tmp_path, key, value):
    with pytest.raises(JointoptError, match=rf"{key}.*: found 3 as a name; allowed: text"):
        load_config(written(tmp_path, MINIMAL), {key: value})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("task: causal-lm\ndata: {calibrate: a, evaluate: b}\noutput: o", "model: found nothing; allowed: a local"),
        ("model: m\ndata: {calibrate: a, evaluate: b}\noutput: o", "neither task nor quality"),
        ("model: m\ntask: causal-lm\ndata: {calibrate: a}\noutput: o", "no data.evaluate"),
        ("model: m\ntask: causal-lm\ndata: {evaluate: a}\noutput: o", "neither data.calibrate nor data.train"),
        ("model: m\ntask: causal-lm\ndata: {evaluate: 3}\noutput: o", "data.evaluate: found 3; allowed: a path"),
        ("model: m\ntask: causal-lm\ndata: {evaluate: ''}\noutput: o", "data.evaluate: found ''; allowed: a path"),
        (
            "model: m\ntask: causal-lm\ndata: {calibrate: a, evaluate: b}\noutput: 010",
            "output: found 10; allowed: a folder (in quotes, where it looks like a number or a truth value)",
        ),
        ("- a\n- b", "found a list; allowed: keys, model"),
        ("", "found nothing; allowed: keys, model"),
    ],
)
def test_what_is_missing_is_named(tmp_path, text, said):
    assert said in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ("accuracy: '>= 80'", "found constraints accuracy >= 80; allowed: a number from 0 to 1, as all accuracy is"),
        ("pearson: '<= -2'", "found constraints pearson <= -2; allowed: a number from -1 to 1, as all pearson is"),
        ("perplexity: '<= 0.5'", "found constraints perplexity <= 0.5; allowed: a number from 1, as all perplexity"),
    ],
)
def test_a_limit_that_no_metric_of_the_tasks_can_keep_is_refused(tmp_path, limit, said):
    assert said in complaint(tmp_path, MINIMAL + f"constraints: {{{limit}}}\n")


def test_a_metric_of_ones_own_may_be_of_another_range(tmp_path):
    own = "quality: mine.percent\nobjectives: [accuracy]\nconstraints: {accuracy: '>= 80'}\n"
    assert load_config(written(tmp_path, MINIMAL + own)).constraints == {"accuracy": ">= 80"}


def test_a_path_may_begin_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = "model: ~/m\ntask: causal-lm\ndata: {calibrate: ~/a.txt, evaluate: {path: ~/b.txt}}\noutput: ~/runs/x\n"
    config = load_config(written(tmp_path, text + "hardware: {device: ~/mine.yaml}\n"))
    paths = [config.model, config.data.calibrate.path, config.data.evaluate.path, config.output, config.hardware.device]
    assert paths == ["/home/me/m", "/home/me/a.txt", "/home/me/b.txt", "/home/me/runs/x", "/home/me/mine.yaml"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("$HOME/x", "line 4: output: found '$HOME/x'; allowed: a path without variables; ~ is your home"),
        ("runs/${USER}", "output: found 'runs/${USER}'; allowed: a path without variables"),
        ("~nobody-at-all/x", "output: found '~nobody-at-all/x', which is nobody's home; allowed: ./~nobody-at-all/x"),
    ],
)
def test_what_only_a_shell_fills_in_is_refused(tmp_path, path, said):
    assert said in complaint(tmp_path, MINIMAL.replace("runs/x", f'"{path}"'))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(JointoptError, match="none.yaml: No such file"):
        load_config(tmp_path / "none.yaml")


def test_overrides_take_the_place_of_the_files_values(tmp_path):
    config = load_config(written(tmp_path, MINIMAL), {"search.evaluations": 7, "output": "elsewhere"})
    assert (config.search.evaluations, config.output) == (7, "elsewhere")


@pytest.mark.parametrize(
    ("section", "key", "table"),
    [
        (Config, "task", TASKS),
        (Config, "target", TARGETS),
        (Config, "target", WRITERS),
        (Config, "dtype", ["auto", *DTYPES]),
        (Config, "weight_calibration", WEIGHT_METHODS),
        (Config, "activation_calibration", ACTIVATION_METHODS),
        (Space, "precision_per", PRECISION_PER),
        (Train, "sampling", sampling.SAMPLERS),
        (Search, "strategy", strategies.STRATEGIES),
        (Finish, "rounding", ROUNDINGS),
        (Finish, "rounding", [name for name in card.ROUNDED_BY if name != "nearest"]),
    ],
)
def test_a_config_names_what_there_is(section, key, table):
    named = section.model_fields[key].annotation
    literals = [each for each in (named, *get_args(named)) if get_origin(each) is Literal]
    assert [name for each in literals for name in get_args(each)] == list(table)


def test_a_format_of_one_s_own_is_one_of_its_target_s(tmp_path, monkeypatch):
    monkeypatch.setitem(SCHEMES, "MINE", replace(SCHEMES["W8A16_CHANNEL"], name="MINE"))
    named = MINIMAL + "space: {schemes: [none, MINE]}\n"
    assert load_config(written(tmp_path, named)).space.schemes == ["none", "MINE"]
    said = "space.schemes: target onnxruntime: MINE has no form there; allowed: none, W8A8"
    assert said in complaint(tmp_path, named + "target: onnxruntime\n")


def test_the_record_leaves_out_what_may_change_between_runs(tmp_path):
    path = written(tmp_path, EXAMPLE)
    one = load_config(path)
    other = load_config(path, {"search.evaluations": 7, "output": "x", "choose": "knee", "device": "cpu"})
    assert one.record() == other.record()
    assert one.record() != load_config(path, {"search.seed": 1}).record()


@pytest.mark.parametrize("key", RANGES)
def test_how_ranges_are_chosen_is_recorded_where_it_is_not_the_default_of_python_too(tmp_path, key):
    own = signature(Supernet).parameters[key].default
    path = written(tmp_path, EXAMPLE)
    assert load_config(path, {key: own}).record() == load_config(path).record()
    assert load_config(path, {key: "percentile"}).record() == {**load_config(path).record(), key: "percentile"}


@pytest.mark.parametrize("key", RANGES)
def test_training_depends_on_how_ranges_are_chosen_where_it_rounds(tmp_path, key):
    path = written(tmp_path, EXAMPLE + "train: {steps: 10}\n")
    without, rounding = {key: "percentile"}, {key: "percentile", "train.precision_from": 0.5}
    assert key not in load_config(path, without).training_record()
    assert load_config(path, rounding).training_record()[key] == "percentile"


KEYS = st.sampled_from([*Config.model_fields, "path", "steps", "evaluations", "x"])
SCALARS = st.none() | st.booleans() | st.integers() | st.text()
CONTENT = st.recursive(SCALARS, lambda x: st.dictionaries(KEYS, x, max_size=4) | st.lists(x, max_size=3), max_leaves=12)


@given(CONTENT)
def test_whatever_a_file_holds_the_answer_is_a_config_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    try:
        load_config(path)
    except JointoptError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("3", "found 3; allowed: text, a list of texts"),
        ("[]", "found []; allowed: a column's name, or a list of one name or more"),
        ("[a, 1]", "found ['a', 1]; allowed: a column's name, or a list of one name or more"),
    ],
)
def test_labels_are_a_column_or_several(tmp_path, label, said):
    text = "model: m\ntask: text-classification\ndata: {{calibrate: a, evaluate: {{path: a, label: {}}}}}\noutput: o"
    assert load_config(written(tmp_path, text.format("[a, b]"))).source("evaluate").label == ["a", "b"]
    assert f"line 3: data.evaluate.label: {said}" in complaint(tmp_path, text.format(label))
