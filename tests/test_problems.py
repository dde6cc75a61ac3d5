"""Several classes at once and measured values, from data to a verified export: how labels are read and models score."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, rel_entr
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, log_loss, mean_squared_error
from torch import Tensor

from jointopt import JointoptError, Study
from jointopt.cli import main
from jointopt.config.starter import starter_config
from jointopt.models import load_model
from jointopt.outputs import MULTI_LABEL, REGRESSION, problem_of
from jointopt.rows import DataSource, read_columns
from jointopt.sensitivity import estimated_losses
from jointopt.tasks import TASKS
from jointopt.tasks.labels import multi_labels, value_labels
from jointopt.tasks.problems import CLASSIFICATION, NEXT_TOKEN, SEVERAL_CLASSES, VALUES, Problem
from tests.commands import command
from tests.saved import WORDS, batches_of, quality_of, save_bert, save_vit, write_images
from tests.test_fidelity import Given, Shifted
from tests.test_training_problems import supernet_for
from tests.zoo import batches, make

TAGS = ("toxic", "insult", "threat")


def named(*names: str) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: at for at, name in enumerate(names)}}


SAVED = {
    MULTI_LABEL: {"problem_type": MULTI_LABEL, **named(*TAGS)},
    REGRESSION: {"problem_type": REGRESSION, **named("score")},
}


def drawn(problem: Problem, count: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    """Logits, and labels that have something to do with them."""
    generator = torch.Generator().manual_seed(seed)
    logits, noise = torch.randn(2, count, outputs, generator=generator)
    return logits, ((logits + noise > 0).float() if problem is SEVERAL_CLASSES else 2 * logits + noise + 3)


def scored(problem: Problem, logits: Tensor, labels: Tensor, size: int = 7, **options) -> dict[str, float]:
    pairs = zip(logits.split(size), labels.split(size), strict=True)
    return problem.quality([{"logits": x, "labels": y} for x, y in pairs], **options)(Given())


@settings(max_examples=20, deadline=None)
@given(count=st.integers(2, 40), outputs=st.integers(2, 5), size=st.integers(1, 40), seed=st.integers(0, 9))
def test_several_classes_are_scored_as_by_scikit_learn(count, outputs, size, seed):
    logits, labels = drawn(SEVERAL_CLASSES, count, outputs, seed)
    labels[0, 0] = 1
    found = scored(SEVERAL_CLASSES, logits, labels, size)
    told, right, chances = (logits > 0).numpy(), labels.numpy(), expit(logits.double().numpy())
    losses = [log_loss(right[:, at], chances[:, at], labels=[0, 1]) for at in range(outputs)]
    assert list(found) == ["f1", "accuracy", "loss"]
    assert math.isclose(found["f1"], f1_score(right, told, average="micro"))
    assert math.isclose(found["accuracy"], accuracy_score(right, told))
    assert math.isclose(found["loss"], np.mean(losses), rel_tol=1e-5)


@settings(max_examples=20, deadline=None)
@given(count=st.integers(3, 40), outputs=st.integers(1, 3), size=st.integers(1, 40), seed=st.integers(0, 9))
def test_values_are_scored_as_by_scipy(count, outputs, size, seed):
    logits, labels = drawn(VALUES, count, outputs, seed)
    found = scored(VALUES, logits, labels[:, 0] if outputs == 1 else labels, size)
    pairs = [(logits[:, at].double().numpy(), labels[:, at].double().numpy()) for at in range(outputs)]
    assert list(found) == ["pearson", "mse"]
    assert math.isclose(found["pearson"], np.mean([pearsonr(*pair).statistic for pair in pairs]), abs_tol=1e-9)
    assert math.isclose(found["mse"], np.mean([mean_squared_error(*pair) for pair in pairs]))


def test_kl_of_several_classes_is_the_sum_of_what_each_diverges():
    logits, labels = drawn(SEVERAL_CLASSES, 20, 4, 0)
    added = torch.randn(4, generator=torch.Generator().manual_seed(1))
    whole = {"logits": logits, "labels": labels}
    found = SEVERAL_CLASSES.quality([whole], Shifted(added))(Given())
    ours, theirs = (expit(each.double().numpy()) for each in (logits, logits + added))
    expected = (rel_entr(theirs, ours) + rel_entr(1 - theirs, 1 - ours)).sum(1)
    assert math.isclose(found["kl"], expected.mean(), rel_tol=1e-5)
    assert math.isclose(found.errors["kl"], expected.std(ddof=1) / 20**0.5, rel_tol=1e-4)
    assert SEVERAL_CLASSES.quality([whole], Given())(Given())["kl"] == 0


@pytest.mark.parametrize("problem", [SEVERAL_CLASSES, VALUES])
def test_errors_are_about_those_of_leaving_out_one_sample_after_the_other(problem):
    count = 300
    logits, labels = drawn(problem, count, 3, 0)
    found = scored(problem, logits, labels)
    kept = [[at for at in range(count) if at != left_out] for left_out in range(count)]
    parts = [scored(problem, logits[rows], labels[rows], count) for rows in kept]
    for name in problem.metrics:
        if name != "kl":
            spread = np.std([part[name] for part in parts]) * (count - 1) ** 0.5
            assert math.isclose(found.errors[name], spread, rel_tol=0.02), name


@pytest.mark.parametrize("problem", [SEVERAL_CLASSES, VALUES])
def test_logits_that_are_no_numbers_score_no_number(problem):
    logits, labels = drawn(problem, 9, 3, 0)
    logits[4, 1] = math.nan
    assert all(math.isnan(value) for value in scored(problem, logits, labels).values())


def test_what_is_always_the_same_correlates_with_nothing():
    _, labels = drawn(VALUES, 9, 1, 0)
    found = scored(VALUES, torch.full((9, 1), 0.1), labels[:, 0])
    assert found["pearson"] == 0 and found.errors["pearson"] == 0


@pytest.mark.parametrize(
    ("problem", "labels", "said"),
    [
        (SEVERAL_CLASSES, torch.zeros(5, 2), "found no class in any of 5 rows; allowed: one or more, for f1"),
        (VALUES, torch.ones(5), "found 1 in all of 5 rows; allowed: two values or more, for pearson"),
        (VALUES, torch.tensor([[1.0, 2], [3, 2]]), "found 2 for output 1 in all of 2 rows; allowed: two values"),
    ],
)
def test_labels_that_tell_nothing_are_refused(problem, labels, said):
    with pytest.raises(JointoptError, match=f"^data.test.label: {said}"):
        problem.quality([{"logits": torch.zeros(len(labels), 2), "labels": labels}], key="data.test.label")


def write_rows(path: Path, rows: list[dict]) -> str:
    """A table of the kind that the path's suffix says."""
    if path.suffix == ".csv":
        pd.DataFrame(rows).to_csv(path, index=False)
    elif path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


LISTED = [["insult", "toxic"], [], ["threat"]]
FLAGS = [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("suffix", "label", "rows"),
    [
        ("jsonl", None, [{"labels": each} for each in LISTED]),
        ("parquet", "tags", [{"tags": each} for each in LISTED]),
        ("jsonl", None, [{"label": [TAGS.index(name) for name in each]} for each in LISTED]),
        ("jsonl", None, [{"label": each} for each in FLAGS]),
        ("parquet", None, [{"label": list(map(float, each))} for each in FLAGS]),
        ("jsonl", None, [{"label": list(map(bool, each))} for each in FLAGS]),
        ("csv", ["threat", "Toxic", "insult"], [{"Toxic": t, "insult": i, "threat": h} for t, i, h in FLAGS]),
        ("csv", ["a", "b", "c"], [{"c": c, "b": b, "a": a} for a, b, c in FLAGS]),
    ],
)
def test_several_classes_are_lists_or_columns(tmp_path, suffix, label, rows):
    """Columns are those of the classes of their names, or in the order of the config."""
    source = DataSource(write_rows(tmp_path / f"rows.{suffix}", rows), label=label)
    found = multi_labels(read_columns(source), source, TAGS)
    assert found.dtype == torch.float32 and found.tolist() == FLAGS


def test_lists_of_numbers_that_a_data_set_has_names_for_are_classes_of_these_names(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "labels": [[0, 1], [2]]})
    feature = datasets.List(datasets.ClassLabel(names=["insult", "threat", "toxic"]))
    rows.cast_column("labels", feature).to_parquet(tmp_path / "rows.parquet")
    source = DataSource(str(tmp_path / "rows.parquet"))
    assert multi_labels(read_columns(source), source, TAGS).tolist() == [[0, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("label", "rows", "expected"),
    [
        (None, [{"label": "0.5"}, {"label": "-2"}], [0.5, -2]),
        (["grade"], [{"grade": 1}, {"grade": 2}], [1, 2]),
        (["b", "a"], [{"a": 1.5, "b": 2}, {"a": 3, "b": 4}], [[1.5, 2], [3, 4]]),
        (None, [{"label": [1.5, 2]}, {"label": [3, 4]}], [[1.5, 2], [3, 4]]),
    ],
)
def test_values_are_columns_of_numbers_or_lists(tmp_path, label, rows, expected):
    source = DataSource(write_rows(tmp_path / "rows.jsonl", rows), label=label)
    found = value_labels(read_columns(source), source, ["a", "b"] if isinstance(expected[0], list) else ["score"])
    assert found.dtype == torch.float32 and found.tolist() == expected


@pytest.mark.parametrize(
    ("label", "row", "said"),
    [
        (None, {"label": "insult"}, "found 'insult' in row 2; allowed: a list of classes, or of several columns"),
        (None, {"label": None}, "found None in row 2; allowed: a list of classes"),
        (None, {"label": ["insult", "rude"]}, "found label 'rude' in row 2; the model has 3: toxic, insult, threat"),
        (["a", "b", "label"], {"a": 1, "b": 0.5, "label": 0}, "found 0.5 in row 2; allowed: 0 or 1, for each class"),
        (["a", "b"], {"a": 1, "b": 0}, "found 2: a, b; the model has 3: toxic, insult, threat; allowed: a column for"),
        (["a", "b", "a"], {"a": 1, "b": 0}, "found 3: a, b, a; the model has 3"),
        (["toxic", "a", "b"], {"toxic": 1, "a": 0, "b": 0}, "found 3: toxic, a, b; the model has 3"),
        (["a", "b", "c"], {"a": 1, "b": 0}, "found no column 'c'; there are a, b"),
    ],
)
def test_classes_that_do_not_fit_are_named(tmp_path, label, row, said):
    good = {name: ["toxic"] if label is None else 1 for name in row}
    source = DataSource(write_rows(tmp_path / "rows.jsonl", [good, row]), label=label, key="data.train")
    with pytest.raises(JointoptError, match=rf"^data.train.label: {said}"):
        multi_labels(read_columns(source), source, TAGS)


@pytest.mark.parametrize(
    ("outputs", "value", "said"),
    [
        (1, "good", "found 'good' in row 2; allowed: a number"),
        (1, None, "found None in row 2; allowed: a number"),
        (1, "nan", "found 'nan' in row 2; allowed: a number"),
        (1, 1e39, r"found 1e\+39 in row 2; allowed: a number"),
        (2, [1, 2, 3], r"found \[1, 2, 3\] in row 2; allowed: a list of 2 numbers"),
        (2, [1, "x"], "found 'x' in row 2; allowed: a number"),
        (2, 3, "found 3 in row 2; allowed: a list of 2 numbers, or of several columns, a list of their names"),
    ],
)
def test_values_that_do_not_fit_are_named(tmp_path, outputs, value, said):
    rows = [{"label": 1.0 if outputs == 1 else [1, 2]}, {"label": value}]
    source = DataSource(write_rows(tmp_path / "rows.jsonl", rows), key="data.evaluate")
    with pytest.raises(JointoptError, match=rf"^data.evaluate.label: {said}"):
        value_labels(read_columns(source), source, ["a", "b"][:outputs])


def write_tagged(path: Path, count: int = 24, seed: int = 0) -> str:
    """Texts in json lines, each with lists of classes (`tags`) and a number (`score`)."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = random.choice(WORDS, size=random.integers(1, 9)).tolist()
        tags = [tag for tag, word in zip(TAGS, ("bad", "poor", "not"), strict=True) if word in words]
        rows.append({"text": " ".join(words), "tags": tags, "score": float(words.count("good"))})
    return write_rows(path, rows)


@pytest.mark.parametrize(("problem", "label", "metric"), [(MULTI_LABEL, "tags", "loss"), (REGRESSION, "score", "mse")])
def test_batches_are_what_transformers_has_a_loss_for(tmp_path, problem, label, metric):
    folder, table = save_bert(tmp_path / "bert", **SAVED[problem]), write_tagged(tmp_path / "rows.jsonl")
    loaded = load_model(str(folder), None, "cpu")
    source = DataSource(table, label=label)
    (batch,) = batches_of(loaded, "text-classification", source, 99)
    found = quality_of(folder, "text-classification", source)
    with torch.no_grad():
        assert found[metric] == pytest.approx(float(loaded.model(**batch).loss), rel=1e-5)
    assert found.get("kl", 0) == 0


def test_images_have_several_classes_too(tmp_path):
    folder = save_vit(tmp_path / "vit", **SAVED[MULTI_LABEL])
    images = write_images(tmp_path / "images")
    rows = [
        {"image": f"images/{name}/0.png", "label": tags} for name, tags in zip(("cat", "dog"), LISTED, strict=False)
    ]
    found = quality_of(folder, "image-classification", DataSource(write_rows(tmp_path / "rows.jsonl", rows)))
    assert list(found) == ["f1", "accuracy", "loss", "kl"]
    with pytest.raises(JointoptError, match="data.label: found 'cat' in row 1; allowed: a list of classes"):
        quality_of(folder, "image-classification", DataSource(str(images)))


def write_config(place: Path, problem: str, **changes: object) -> str:
    save_bert(place / "bert", **SAVED[problem])
    label = "tags" if problem == MULTI_LABEL else "score"
    parts = {}
    for seed, part in enumerate(("train", "evaluate", "test")):
        parts[part] = {"path": write_tagged(place / f"{part}.jsonl", seed=seed), "label": label}
    content = {
        "model": str(place / "bert"),
        "task": "text-classification",
        "data": {**parts, "batch_size": 12},
        "space": {"depth": [1, 2], "mlp": [64, 128], "schemes": ["none", "W8A8"]},
        "search": {"evaluations": 8},
        "device": "cpu",
        "output": str(place / "run"),
        **changes,
    }
    (place / "config.yaml").write_text(json.dumps(content))
    return str(place / "config.yaml")


def done(*words: object, cwd: Path) -> str:
    """What the command printed in a process of its own."""
    found = command(*words, cwd=cwd)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_model_of_several_classes_goes_from_training_to_a_verified_export(tmp_path):
    config = write_config(tmp_path, MULTI_LABEL, train={"steps": 6}, finish={"steps": 2, "top": 1})
    assert done("run", config, cwd=tmp_path).splitlines()[-1].startswith(f"verified: {tmp_path / 'run/export'}: f1 ")
    assert "f1 " in done("verify", tmp_path / "run/export", "--config", config, cwd=tmp_path)
    assert "f1, unseen data" in done("report", tmp_path / "run", cwd=tmp_path)
    study = Study.open(tmp_path / "run/study.db")
    assert (study.quality.name, study.quality.direction) == ("f1", "max")
    assert all(set(each["errors"]) == {"f1", "accuracy", "loss"} for each in study.fact("unseen"))
    assert json.loads((tmp_path / "run/export/config.json").read_text())["problem_type"] == MULTI_LABEL


def test_a_regression_goes_from_a_config_to_a_verified_export(tmp_path, capsys):
    assert main(["run", write_config(tmp_path, REGRESSION, objectives=["pearson", "mse", "size"])]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"verified: {tmp_path / 'run/export'}: pearson ")


@pytest.mark.parametrize(
    ("changes", "objective", "said"),
    [
        (
            SAVED[MULTI_LABEL],
            "pearson",
            "found pearson; allowed: what is measured of this model, f1, accuracy, loss, kl,",
        ),
        (
            SAVED[REGRESSION],
            "loss",
            "found loss; allowed: what is measured of this model, pearson, mse, and costs, size",
        ),
        ({}, "f1", "found f1; allowed: what is measured of this model, accuracy, loss, kl, and costs, size"),
        (
            named("score"),  # transformers takes one output for a measured value where it says nothing
            "accuracy",
            "found accuracy; allowed: what is measured of this model, pearson, mse, and costs, size",
        ),
    ],
)
def test_what_a_model_is_not_scored_by_is_refused_with_what_it_is(tmp_path, capsys, changes, objective, said):
    config = write_config(tmp_path, MULTI_LABEL, objectives=[objective, "size"])
    save_bert(tmp_path / "bert", **changes)
    assert main(["run", config]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_several_columns_are_refused_of_a_model_that_says_one_class(tmp_path):
    source = DataSource(write_tagged(tmp_path / "rows.jsonl"), label=["tags", "score"])
    with pytest.raises(
        JointoptError, match="data.label: found 2: tags, score, and the model says one class of several"
    ):
        quality_of(save_bert(tmp_path / "bert"), "text-classification", source)


@pytest.mark.parametrize(
    ("problem", "objectives", "rows"),
    [
        (MULTI_LABEL, "[f1, size]  # also accuracy, loss, kl, macs", "text and label, a list of classes"),
        (REGRESSION, "[pearson, size]  # also mse, macs", "text and label, a number"),
    ],
)
def test_the_config_that_init_writes_is_of_the_models_problem(tmp_path, problem, objectives, rows):
    text = starter_config(str(save_bert(tmp_path / "bert", **SAVED[problem])))
    assert f"objectives: {objectives}" in text and f"parquet with columns {rows}" in text


@pytest.mark.parametrize(("kind", "outputs"), [(MULTI_LABEL, 5), (MULTI_LABEL, 1), (REGRESSION, 1), (REGRESSION, 5)])
def test_a_warm_start_is_told_what_choices_do_to_such_outputs(kind, outputs):
    """Of values that is half the squared change: the divergence of normal distributions of variance 1."""
    supernet = supernet_for(kind, outputs)
    inputs, space = batches("bert"), supernet.space
    estimates = estimated_losses(supernet, inputs)
    with supernet.original() as whole:
        labels = [whole(**batch).logits.detach() for batch in inputs]
    pairs = [{**batch, "labels": each} for batch, each in zip(inputs, labels, strict=True)]
    foreseen, real = [], []
    for at, gene in enumerate(space.genes):
        for choice in set(range(len(gene.choices))) - {space.largest[at]}:
            genome = space.largest
            genome[at] = choice
            with supernet.active(genome) as view, supernet.original() as whole, torch.no_grad():
                score = CLASSIFICATION[kind].quality(pairs, whole)(view)
            foreseen.append(estimates[gene.name][choice])
            real.append(score["kl"] if kind == MULTI_LABEL else score["mse"] * outputs / 2)
    assert spearmanr(foreseen, real)[0] > 0.9
    assert 0.5 < np.median(np.array(foreseen) / np.array(real)) < 2


@pytest.mark.parametrize("rows", [[[1, 0, 0], []], [[1, 0, 0], [0, 1]], [[1, 0, 0, 0], [0, 0, 0, 1]], [[True], []]])
def test_lists_that_are_neither_classes_nor_a_number_for_each_are_refused_by_row(rows, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "a", "label": row}) + "\n" for row in rows))
    source = DataSource(str(path), key="data.evaluate")
    with pytest.raises(
        JointoptError, match=r"data.evaluate.label: found .* in row 1; allowed: each class once, .* 3: "
    ):
        multi_labels(read_columns(source), source, TAGS)


def test_numbers_that_a_data_set_has_names_for_are_classes(tmp_path):
    classes = datasets.ClassLabel(names=["insult", "toxic"])
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Sequence(classes)})
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [[0, 1], [1, 0]]}, features=features).to_parquet(path)
    source = DataSource(str(path))
    assert multi_labels(read_columns(source), source, ("toxic", "insult")).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("problem", [MULTI_LABEL, REGRESSION])
def test_a_problem_type_of_what_is_no_classifier_means_nothing(problem):
    model = make("llama_tied")
    model.config.problem_type = problem
    assert problem_of(model) is None
    assert TASKS["causal-lm"].problem(model) is NEXT_TOKEN


def test_divergence_is_never_below_zero():
    logits, labels = drawn(SEVERAL_CLASSES, 200, 3, 0)
    found = SEVERAL_CLASSES.quality([{"logits": logits, "labels": labels}], Shifted(torch.full((3,), 1e-7)))(Given())
    assert 0 <= found["kl"] < 1e-6
