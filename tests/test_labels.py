"""Labels: names, numbers and folders of a data set are the model's classes, or are refused by their row."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import pandas as pd
import pytest

from jointopt import JointoptError
from jointopt.rows import Columns, DataSource, read_columns
from jointopt.tasks.labels import class_indices, class_labels, multi_labels


def test_labels_are_names_or_indices_in_numbers_or_text():
    names = ["negative", "positive"]
    assert class_indices(["positive", "negative"], names, "k") == [1, 0]
    assert class_indices([1.0, 0], names, "k") == class_indices(["1", "0"], names, "k") == [1, 0]
    assert class_indices(["b", "a"], ["LABEL_0", "LABEL_1"], "k", ["a", "b"]) == [1, 0]


def test_folders_0_to_11_are_the_indices_of_classes_without_names():
    folders = sorted(map(str, range(12)))
    with pytest.warns(UserWarning, match="^folders 0 to 11 are taken for the indices of the model's classes"):
        assert class_indices(["10", "2"], [f"LABEL_{index}" for index in range(12)], "k", folders) == [10, 2]
    assert class_indices(["10", "2"], list(map(str, range(12))), "k", folders) == [10, 2]


def test_folders_1_to_10_of_classes_without_names_are_refused_and_01_to_10_count_from_there():
    labels = [f"LABEL_{index}" for index in range(10)]
    with pytest.raises(JointoptError, match="^k: found folders 1 to 10, .* in one order alphabetically and in another"):
        class_indices(["10", "2"], labels, "k", sorted(map(str, range(1, 11))))
    with pytest.raises(JointoptError, match="^k: found folders 1 to 10, "):
        class_indices(["2"], list(map(str, range(10))), "k", sorted(map(str, range(1, 11))))
    assert class_indices(["10", "02"], labels, "k", [f"{number:02}" for number in range(1, 11)]) == [9, 1]


@pytest.mark.parametrize("written", [[1, 3], [1.0, 3.0], ["1.0", "3.0"], [" 1", "3 "], ["01", "03"]])
def test_numbers_are_the_classes_called_so_however_they_are_written(written):
    assert class_indices(written, ["1", "2", "3", "4"], "k") == [0, 2]
    assert class_indices(written, ["3.0", "2.0", "1.0"], "k") == [2, 0]
    lists = Columns({"label": [[value] for value in written]})
    assert multi_labels(lists, DataSource("x"), ["1", "2", "3"]).tolist() == [[1, 0, 0], [0, 0, 1]]


def test_a_class_that_is_listed_twice_in_other_words_is_refused():
    with pytest.raises(JointoptError, match=r"found \[2, '2.0'\] in row 1; allowed: each class once"):
        multi_labels(Columns({"label": [[2, "2.0"], [1]]}), DataSource("x"), ["1", "2", "3"])


def test_an_index_among_numbers_that_are_names_is_refused():
    with pytest.raises(JointoptError, match="k: found label 0.0 in row 2; the model has 3: 1, 2, 3"):
        class_indices([1.0, 0.0], ["1", "2", "3"], "k")
    assert class_indices([1.0, 0.0], ["10", "20", "30"], "k") == [1, 0]


def test_folders_01_to_09_are_no_classes_0_to_9():
    with pytest.raises(JointoptError, match="^k: found 9 folders, and the model has 10 classes without names"):
        class_indices(["01"], list(map(str, range(10))), "k", [f"{number:02}" for number in range(1, 10)])


@pytest.mark.parametrize("missing", [None, float("nan"), np.float32("nan"), pd.NA])
def test_a_missing_label_is_no_class_of_its_name(missing):
    with pytest.raises(JointoptError, match="k: found label .* in row 2; the model has 3: none, nan, <NA>, or 0 to 2"):
        class_indices(["none", missing], ["none", "nan", "<NA>"], "k")
    assert class_indices(["None", "NaN"], ["none", "nan"], "k") == [0, 1]


def test_names_of_classes_match_in_capitals_unless_there_is_a_closer_one():
    assert class_indices(["TOXIC", "Insult"], ["Toxic", "insult"], "k") == [0, 1]
    assert class_indices(["a", "A"], ["A", "a"], "k") == [1, 0]
    with pytest.raises(JointoptError, match="which several classes of the model are called"):
        class_indices(["TOXIC"], ["Toxic", "toxic"], "k")


@pytest.mark.parametrize(("folder", "label"), [("cafe\u0301", "caf\u00e9"), ("CAF\u00c9", "cafe\u0301")])
def test_names_of_classes_match_whether_their_accents_are_apart_or_not(folder, label):
    assert class_indices(["tea", folder], [label, "tea"], "k") == [1, 0]


def test_a_name_that_two_classes_have_is_refused():
    labels = ["crane", "maillot", "crane"]
    assert class_indices([2, 0], labels, "k") == [2, 0]
    assert class_indices(["maillot"], labels, "k") == [1]
    with pytest.raises(
        JointoptError, match="found label 'crane' in row 2, which several classes of the model are called"
    ):
        class_indices(["maillot", "crane"], labels, "k")


def labels_of(source: DataSource, names: Sequence[str]) -> list[int]:
    return class_labels(read_columns(source), source, names).tolist()


def classified(*names: str) -> datasets.Dataset:
    """Three texts of the classes 0, 1, 0, which have names."""
    found = datasets.Dataset.from_dict({"text": ["good", "bad", "fine"], "label": [0, 1, 0]})
    return found.cast_column("label", datasets.ClassLabel(names=list(names)))


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (("positive", "negative"), ("negative", "positive"), [1, 0, 1]),
        (("positive", "negative"), ("neutral", "NEGATIVE", "POSITIVE"), [2, 1, 2]),
        (("positive", "negative"), ("LABEL_0", "LABEL_1"), [0, 1, 0]),
        (("0", "1"), ("negative", "positive"), [0, 1, 0]),
    ],
)
def test_numbers_that_a_data_set_has_names_for_are_the_models_classes_of_these_names(tmp_path, names, labels, expected):
    """Where either has no names, a number is an index."""
    classified(*names).to_parquet(tmp_path / "a.parquet")
    assert labels_of(DataSource(str(tmp_path / "a.parquet")), labels) == expected


def test_numbers_of_a_hub_data_set_are_classes_by_its_names(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: classified("positive", "negative"))
    assert labels_of(DataSource("owner/name", split="train"), ["negative", "positive"]) == [1, 0, 1]


def test_a_class_whose_name_the_model_lacks_is_refused(tmp_path):
    classified("pos", "negative").to_parquet(tmp_path / "a.parquet")
    with pytest.raises(JointoptError, match="found label 0 in row 1, which the data set calls 'pos'; the model has 2:"):
        labels_of(DataSource(str(tmp_path / "a.parquet")), ["negative", "positive"])


@pytest.mark.parametrize(("bad", "row"), [("neutral", 2), (2, 2), (-1, 2), (0.5, 2), (None, 2), (float("nan"), 2)])
def test_a_label_that_the_model_lacks_is_named_with_its_row(bad, row):
    with pytest.raises(JointoptError, match=f"data.evaluate.label: found label .* in row {row}; the model has 2: neg"):
        class_indices([0, bad], ["negative", "positive"], "data.evaluate.label")


def test_a_name_among_which_one_is_missing_is_the_one_that_is_named():
    with pytest.raises(JointoptError, match="found label '' in row 3; the model has 2: negative, positive"):
        class_indices(["positive", "negative", ""], ["negative", "positive"], "data.evaluate.label")
