"""Models, data and quality by the names that a config gives them."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import datasets
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, LlamaForSequenceClassification

from jointopt import JointoptError
from jointopt.cli import main
from jointopt.config.config import Config
from jointopt.config.sections import Data, Distill, Source, Train
from jointopt.config.starter import starter_config
from jointopt.models import chosen_device, empty_model, find_source, import_function, load_model, model_task
from jointopt.prepared import stay_offline
from jointopt.rows import DataSource, looks_like_hub_id, read_columns, read_text, some
from jointopt.tasks import TASKS
from jointopt.tasks.labels import class_indices, label_indices
from tests.saved import (
    LABELS,
    quality_of,
    save_bert,
    save_llama,
    save_timm,
    save_tokenizer,
    save_vit,
    write_images,
    write_reviews,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    makers = {"bert": save_bert, "llama": save_llama, "vit": save_vit, "timm": save_timm}
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in makers.items()}


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("bert", "text-classification"),
        ("llama", "causal-lm"),
        ("vit", "image-classification"),
        ("timm", "image-classification"),
    ],
)
def test_the_task_is_read_off_the_model(folders, name, task):
    source = find_source(str(folders[name]))
    assert model_task(source) == task
    assert next(empty_model(source, task).parameters()).is_meta


def test_quality_of_texts_is_that_of_a_plain_loop(folders, tmp_path):
    source = DataSource(str(write_reviews(tmp_path / "reviews.csv")))
    loaded = load_model(str(folders["bert"]), "text-classification", "cpu")
    columns = read_columns(source)
    right, loss = 0, 0.0
    for text, label in zip(columns["text"], columns["label"], strict=True):
        with torch.no_grad():
            logits = loaded.model(**loaded.processor(text, return_tensors="pt")).logits[0]
        right += int(logits.argmax() == LABELS.index(label))
        loss -= float(logits.log_softmax(-1)[LABELS.index(label)])
    found = quality_of(folders["bert"], "text-classification", source)
    assert found["accuracy"] == right / 40
    assert found["loss"] == pytest.approx(loss / 40, rel=1e-5)
    assert found["kl"] == 0


def test_perplexity_is_that_of_transformers_own_loss(folders, tmp_path):
    (tmp_path / "text.txt").write_text("the film was very good " * 20)
    found = quality_of(folders["llama"], "causal-lm", DataSource(str(tmp_path / "text.txt"), length=16), 100)
    loaded = load_model(str(folders["llama"]), "causal-lm", "cpu")
    batch = TASKS["causal-lm"].batches(
        DataSource(str(tmp_path / "text.txt"), length=16), loaded.processor, loaded.model, 100
    )[0]
    assert batch["input_ids"].shape == (6, 16)
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(loaded.model(**batch).loss), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_rows_of_text_become_pieces_parted_by_the_end_token(folders, tmp_path):
    pd.DataFrame({"text": ["good film", "bad film"] * 8}).to_parquet(tmp_path / "t.parquet")
    loaded = load_model(str(folders["llama"]), None, "cpu")
    source = DataSource(str(tmp_path / "t.parquet"), length=6, samples=2)
    (batch,) = TASKS["causal-lm"].batches(source, loaded.processor, loaded.model, 8)
    end = loaded.processor.eos_token_id
    assert batch["input_ids"].shape == (2, 6)
    assert batch["input_ids"][0, 2] == end == batch["input_ids"][0, 5]


def test_an_epoch_has_every_sample_once_and_an_order_of_its_own(folders, tmp_path):
    loaded = load_model(str(folders["vit"]), None, "cpu")
    source = DataSource(str(write_images(tmp_path / "images")))
    samples = TASKS["image-classification"].samples(source, loaded.processor, loaded.model)
    first, again, second = ([b["labels"] for b in samples.epoch(n, 6, seed=0)] for n in (0, 0, 1))
    assert sorted(torch.cat(first).tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(torch.cat(first), torch.cat(again))
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert [len(labels) for labels in (b["labels"] for b in samples.epoch(0, 5, seed=0))] == [5, 5]
    assert [len(b["labels"]) for b in samples.epoch(0, 50, seed=0)] == [12]


def test_tables_of_every_kind_hold_the_same_rows(tmp_path):
    rows = [{"text": "NA", "label": 1}, {"text": 'a, "b"', "label": 0}]
    (tmp_path / "a.csv").write_text('text,label\nNA,1\n"a, ""b""",0\n')
    (tmp_path / "a.tsv").write_text('text\tlabel\nNA\t1\n"a, ""b"""\t0\n')
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    for path in tmp_path.iterdir():
        found = read_columns(DataSource(str(path)))
        assert found["text"] == ["NA", 'a, "b"'], path
        assert class_indices(found["label"], ["x", "y"], "k") == [1, 0], path


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_text("good film", encoding="utf-8-sig")
    (tmp_path / "a.csv").write_text("text\ngood film\n", encoding="utf-8-sig")
    assert read_text(DataSource(str(tmp_path / "a.txt"))) == "good film"
    assert read_columns(DataSource(str(tmp_path / "a.csv"))) == {"text": ["good film"]}


@pytest.mark.parametrize("label", ["label", "labels", "class", "target"])
@pytest.mark.parametrize(
    ("name", "task", "column"),
    [
        *(("bert", "text-classification", column) for column in ("text", "sentence", "snippet", "review", "content")),
        *(("vit", "image-classification", column) for column in ("image", "img", "path", "file", "file_name")),
    ],
)
def test_columns_are_found_by_their_usual_names(folders, tmp_path, name, task, column, label):
    images = write_images(tmp_path / "images")
    values = ["good film", "bad"] if name == "bert" else [f"{images}/cat/0.png", f"{images}/dog/0.png"]
    (tmp_path / "t.csv").write_text(f"other,{label},{column}\n7,1,{values[0]}\n7,0,{values[1]}\n")
    loaded = load_model(str(folders[name]), task, "cpu")
    (batch,) = TASKS[task].batches(DataSource(str(tmp_path / "t.csv")), loaded.processor, loaded.model, 2)
    order = [1, 0] if name == "bert" else [0, 1]  # texts by length
    assert batch["labels"][order].tolist() == [1, 0]
    assert not torch.equal(*batch["input_ids" if name == "bert" else "pixel_values"])


@pytest.mark.parametrize("column", ["text", "sentence", "snippet", "review", "content"])
def test_a_language_model_takes_a_column_of_a_usual_name(folders, tmp_path, column):
    (tmp_path / "t.csv").write_text(f"label,{column}\n1,good film\n0,bad film\n")
    loaded = load_model(str(folders["llama"]), None, "cpu")
    (batch,) = TASKS["causal-lm"].batches(
        DataSource(str(tmp_path / "t.csv"), length=5), loaded.processor, loaded.model, 2
    )
    assert loaded.processor.decode(batch["input_ids"][0]) == "good film [END] bad film"


def test_a_tables_suffix_may_be_in_capitals(tmp_path):
    (tmp_path / "A.CSV").write_text("text,label\ngood,1\n")
    assert read_columns(DataSource(str(tmp_path / "A.CSV"))) == {"text": ["good"], "label": ["1"]}


def test_a_field_of_a_csv_may_be_a_whole_document(tmp_path):
    (tmp_path / "a.csv").write_text(f"text,label\n{'good ' * 30_000},1\n")
    assert read_columns(DataSource(str(tmp_path / "a.csv")))["text"] == ["good " * 30_000]


def test_a_line_separator_inside_a_row_of_json_lines_is_text(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028two\x85three", "label": 1}\r\n', encoding="utf-8", newline="")
    found = read_columns(DataSource(str(tmp_path / "a.jsonl")))
    assert found == {"text": ["one\u2028two\x85three"], "label": [1]}


@given(st.integers(1, 200), st.integers(1, 300))
@settings(max_examples=50)
def test_some_rows_are_different_rows_and_the_same_each_time(count, samples):
    kept = some(count, samples)
    assert len(set(kept)) == len(kept) == min(count, samples)
    assert all(0 <= index < count for index in kept)
    assert kept == some(count, samples)


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
    return label_indices(read_columns(source), source, names)


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


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("text,label\n", "holds no row"),
        ("text,label,label\ngood,1,0\n", "the header has 'label' twice"),
        ("text,label\ngood\n", "row 1 has 1 fields, the header 2"),
        ("text,label\ngood,1\n,0\n", "data.train.text: row 2 has no token; allowed: texts of one token or more"),
        ("snippets,label\ngood,1\n", "data.train.text: found none of the columns text, .*; there are snippets, label"),
        ("text,stars\ngood,1\n", "data.train.label: found none of the columns label, .*; there are text, stars"),
    ],
)
def test_a_table_that_does_not_fit_is_named(folders, tmp_path, content, said):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(JointoptError, match=said):
        quality_of(folders["bert"], "text-classification", DataSource(str(tmp_path / "t.csv"), key="data.train"))


@pytest.mark.parametrize("found", [None, 3])
def test_a_decoder_that_takes_another_token_for_padding_than_its_tokenizer_is_not_scored(tmp_path, found):
    """transformers refuses the first batch, or classifies each text by a token that is its padding."""
    folder = save_llama(tmp_path / "llama", LlamaForSequenceClassification, pad_token_id=found)
    said = rf"found pad_token_id {found} in its config.json, and its tokenizer pads with 0 \('\[PAD\]'\); allowed: that"
    with pytest.raises(JointoptError, match=said):
        quality_of(folder, "text-classification", DataSource(str(write_reviews(tmp_path / "reviews.csv"))))


def calibration_batch(folder: Path, task: str, data: Path) -> dict[str, torch.Tensor]:
    sources = Data(calibrate=Source(path=str(data)), evaluate=Source(path="unseen"))
    config = Config(model=str(folder), task=task, data=sources, output="out")
    loaded = load_model(str(folder), task, "cpu")
    (batch,) = TASKS[task].batches(config.source("calibrate"), loaded.processor, loaded.model, 32)
    return dict(batch)


@pytest.mark.parametrize("rows", ["text\ngood film\nbad\n", "text,label\ngood film,-1\nbad,-1\n"])
def test_texts_to_calibrate_with_need_no_labels(folders, tmp_path, rows):
    (tmp_path / "t.csv").write_text(rows)
    batch = calibration_batch(folders["bert"], "text-classification", tmp_path / "t.csv")
    assert batch["input_ids"].shape == (2, 2) and "labels" not in batch


def test_images_to_calibrate_with_need_no_folders_of_their_class(folders, tmp_path):
    images = write_images(tmp_path / "images")
    for folder, count in ((images, 12), (images / "owl", 4)):
        batch = calibration_batch(folders["vit"], "image-classification", folder)
        assert batch["pixel_values"].shape == (count, 1, 8, 8) and "labels" not in batch
    with pytest.raises(JointoptError, match="owl' has no images in folders of their class"):
        read_columns(DataSource(str(images / "owl")))


def test_half_a_surrogate_pair_is_named_with_its_row(folders, tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "good", "label": 1}\n{"text": "so \\ud83d", "label": 1}\n')
    with pytest.raises(JointoptError, match=r"data.text: found '.ud83d' at character 4 of row 2; allowed: text"):
        quality_of(folders["bert"], "text-classification", DataSource(str(tmp_path / "t.jsonl")))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none.csv", "data.train: no file or folder 'none.csv', and it is no hub id"),
        ("./none", "no file or folder './none', and it is no hub id"),
        ("someone/something", "is taken for a hub id: give its split"),
    ],
)
def test_a_source_that_is_not_there_is_named(path, said):
    with pytest.raises(JointoptError, match=said):
        read_columns(DataSource(path, key="data.train"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"text": "a", "label": 0}\n{"text": }', "line 2, column 10: Expecting value"),
        ('[{"text": "a", "label": 0}]', "row 1 is a list; allowed: an object"),
        ('{"data": [\n{"text": "a"}\n]}', "found one dict over several lines; allowed: an object a line, or in a"),
        ('[\n{"text": "a", "label": 0}\n]', "found one list over several lines; allowed: an object a line"),
    ],
)
def test_a_line_of_json_that_is_none_is_named(tmp_path, content, said):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(JointoptError, match=said):
        read_columns(DataSource(str(tmp_path / "t.jsonl")))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[]", "AttributeError: 'list' object has no attribute 'get'"),
        ('{"info": {"features": {"label": {"_type": "ClassLabel"}}}}', "KeyError: 'names'"),
    ],
)
def test_classes_of_a_parquet_that_cannot_be_made_out_are_told(said, told, tmp_path):
    table = pyarrow.table({"text": ["a"], "label": [0]}).replace_schema_metadata({"huggingface": said})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(JointoptError, match=f"t.parquet' cannot be read: {told}"):
        read_columns(DataSource(str(tmp_path / "t.parquet")))


def test_json_that_is_nested_too_deeply_is_told(tmp_path):
    (tmp_path / "t.json").write_text("[" * 100_000)
    with pytest.raises(JointoptError, match=r"t.json' cannot be read: RecursionError"):
        read_columns(DataSource(str(tmp_path / "t.json")))


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": {"0": "good " * 5000}, "label": 1}],
        [{"text": "good", "label": "good " * 5000}],
        [{"good " * 5000: "text", "label": 1}],
        [{"text": "good", "label": 1, "good " * 5000: 1}, {"text": "bad"}],
    ],
)
def test_what_is_said_of_a_long_value_is_short(folders, tmp_path, rows):
    (tmp_path / "t.json").write_text(json.dumps(rows))
    with pytest.raises(JointoptError) as raised:
        quality_of(folders["bert"], "text-classification", DataSource(str(tmp_path / "t.json")))
    assert len(str(raised.value).replace(str(tmp_path), "")) < 500


def test_a_name_among_which_one_is_missing_is_the_one_that_is_named():
    with pytest.raises(JointoptError, match="found label '' in row 3; the model has 2: negative, positive"):
        class_indices(["positive", "negative", ""], ["negative", "positive"], "data.evaluate.label")


def test_other_bad_data_is_named(folders, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "t.txt").write_text("good film")
    (tmp_path / "bad.csv").write_text("image,label\nnone.png,1\n")
    (tmp_path / "pair.csv").write_text("text,label\n" + "good film,0\n")
    wrong = [
        ("vit", "image-classification", DataSource(str(tmp_path / "empty")), "no images in folders of their class"),
        ("vit", "image-classification", DataSource(str(tmp_path / "bad.csv")), "'none.png' cannot be opened"),
        ("bert", "text-classification", DataSource(str(tmp_path / "t.txt")), "has no columns"),
        ("bert", "text-classification", DataSource(str(tmp_path / "pair.csv"), length=99), "takes 32 tokens at most"),
        ("bert", "text-classification", DataSource(str(tmp_path / "pair.csv"), text_pair="b"), "found no column 'b'"),
        ("llama", "causal-lm", DataSource(str(tmp_path / "t.txt")), "has 2 tokens; allowed: one piece of 32"),
    ]
    for name, task, source, said in wrong:
        with pytest.raises(JointoptError, match=said):
            quality_of(folders[name], task, source)


def test_a_column_that_the_task_does_not_read_is_refused(folders, tmp_path):
    (tmp_path / "t.txt").write_text("good film")
    table = str(write_reviews(tmp_path / "reviews.csv"))
    wrong = [
        ("bert", "text-classification", DataSource(table, image="text"), "image: found 'text', which is not read here"),
        ("llama", "causal-lm", DataSource(table, label="label"), "label: found 'label', .*; allowed: text"),
        ("llama", "causal-lm", DataSource(str(tmp_path / "t.txt"), text="text"), "allowed: no column, of running text"),
        ("vit", "image-classification", DataSource(table, text="text"), "text: found 'text', .* allowed: image, label"),
        ("vit", "image-classification", DataSource(table, length=9), "data.length: found 9; allowed for images: none"),
    ]
    for name, task, source, said in wrong:
        with pytest.raises(JointoptError, match=said):
            quality_of(folders[name], task, source)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("./none", "no folder './none', and it is no hub id"),
        ("here/none", "no folder 'here/none', and it is no hub id"),
        ("here", "holds no config.json"),
        ("here/file", "is a file"),
        ("timm/vit_tiny_patch16_225", "timm has no .*; did you mean 'vit_tiny_patch16_224"),
    ],
)
def test_a_model_that_is_not_there_is_named(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "here/file").write_text("x")
    with pytest.raises(JointoptError, match=said):
        find_source(name)


def test_a_broken_model_folder_is_one_line(tmp_path):
    folder = save_bert(tmp_path / "bert")
    with pytest.raises(JointoptError, match="cannot be loaded: Unrecognized"):
        load_model(str(folder), "image-classification", "cpu")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(JointoptError, match="cannot be loaded: .*header"):
        load_model(str(folder), None, "cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(JointoptError, match="cannot be loaded: Error no file named model.safetensors"):
        load_model(str(folder), None, "cpu")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "initializer_range": "two"}))
    with pytest.raises(JointoptError, match="cannot be loaded: Strict.* Field 'initializer_range' expected float"):
        load_model(str(folder), None, "cpu")
    (folder / "config.json").write_text("{")
    with pytest.raises(JointoptError, match="config.json cannot be read"):
        load_model(str(folder), None, "cpu")


@pytest.mark.parametrize(
    ("key", "found", "told"),
    [
        ("num_hidden_layers", 0, "num_hidden_layers: found 0; allowed: whole numbers from 1"),
        ("num_attention_heads", 0, "num_attention_heads: found 0; allowed: whole numbers from 1"),
        ("vocab_size", "many", "vocab_size: found 'many'; allowed: whole numbers from 1"),
        ("architectures", 3, "architectures: found 3; allowed: a list of names"),
    ],
)
def test_a_config_of_an_impossible_model_is_one_line_that_names_its_key(key, found, told, tmp_path):
    folder = save_llama(tmp_path / "llama")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, key: found}))
    for read in (starter_config, lambda name: load_model(name, "causal-lm", "cpu")):
        with pytest.raises(JointoptError, match=f"model: .*llama/config.json: {told}"):
            read(str(folder))


def test_a_missing_tokenizer_is_named(tmp_path):
    folder = save_bert(tmp_path / "bert")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(JointoptError, match="holds no tokenizer; allowed: one of tokenizer.json"):
        load_model(str(folder), None, "cpu")


def save_headless_bert(folder: Path) -> Path:
    config = BertConfig(vocab_size=16, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_a_model_without_a_head_is_asked_for_a_task_in_words_that_init_can_be_given(tmp_path, capsys):
    assert main(["init", str(save_headless_bert(tmp_path))]) == 2
    assert "names BertModel, which is no model of text-classification, image-class" in capsys.readouterr().err


def test_weights_that_a_checkpoint_lacks_are_told(tmp_path):
    loaded = load_model(str(save_headless_bert(tmp_path)), "text-classification", "cpu")
    assert loaded.untrained == ("classifier.bias", "classifier.weight")


def test_weights_that_a_checkpoint_lacks_are_the_same_whenever_it_is_loaded(tmp_path):
    folder, heads, drawn = save_headless_bert(tmp_path), [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(load_model(str(folder), "text-classification", "cpu").model.classifier.weight)
        drawn.append(torch.rand(1))
    assert torch.equal(*heads)
    assert not torch.equal(*drawn)


def test_a_split_of_a_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\ngood,1\n")
    with pytest.raises(JointoptError, match=r"data.split: found 'train', but .* is here; allowed: of a hub id"):
        read_columns(DataSource(str(tmp_path / "a.csv"), split="train"))


def test_dtype_is_the_checkpoints_own_or_what_is_asked_for(tmp_path, folders):
    load_model(str(folders["bert"]), None, "cpu").model.to(torch.float16).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.warns(UserWarning, match="stored as float16 and read as float32, so that sizes, the original's too"):
        assert load_model(str(tmp_path), None, "cpu").model.dtype == torch.float32
    assert load_model(str(tmp_path), None, "cpu", "bfloat16").model.dtype == torch.bfloat16
    with pytest.raises(JointoptError, match="dtype: found 'float16'"):
        load_model(str(tmp_path), None, "cpu", "float16")


def without_dtype(folder: Path, to: Path, stored: torch.dtype) -> Path:
    """A copy whose weights are stored so, and whose config does not say it."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "dtype"}))
    weights = {name: weight.to(stored) for name, weight in load_file(to / "model.safetensors").items()}
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


@pytest.mark.parametrize("name", ["bert", "timm"])
def test_dtype_is_that_of_the_weights_where_the_config_says_none(tmp_path, folders, name):
    folder = without_dtype(folders[name], tmp_path / "half", torch.bfloat16)
    loaded = load_model(str(folder), None, "cpu")
    assert next(loaded.model.parameters()).dtype == torch.bfloat16
    assert next(empty_model(loaded.source, loaded.task).parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["bert", "timm"])
def test_float16_that_the_config_does_not_say_is_told(tmp_path, folders, name):
    folder = without_dtype(folders[name], tmp_path / "half", torch.float16)
    with pytest.warns(UserWarning, match="stored as float16 and read as float32, so that sizes, the original's too"):
        load_model(str(folder), None, "cpu")


def test_a_device_that_is_not_here_is_named():
    if not torch.cuda.is_available():
        with pytest.raises(JointoptError, match="device: cuda is not available here; there is cpu"):
            chosen_device("cuda")
    with pytest.raises(JointoptError, match="device: found 'tpu'"):
        chosen_device("tpu")


@pytest.mark.parametrize("name", ["bert-base-uncased", "google/vit-base-patch16-224", "a/b.c_d"])
def test_a_hub_id_looks_like_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert looks_like_hub_id(name)


def offline(folder: Path, monkeypatch, model: str = "", teacher: str = "", **data: Source) -> dict[str, str]:
    """What `stay_offline` sets for a config of a local model, teacher and data, where not told other."""
    local = str(folder)
    named = {entry: Source(path=f"{entry}.csv") for entry in ("train", "calibrate", "evaluate", "test")} | data
    train = Train(steps=1, distill=Distill(teacher=teacher or local))
    config = Config(model=model or local, task="text-classification", data=Data(**named), train=train, output="out")
    monkeypatch.setattr(os, "environ", {})
    stay_offline(config)
    return dict(os.environ)


def test_where_all_that_is_named_is_here_nothing_is_looked_up_on_the_hub(folders, monkeypatch):
    found = offline(folders["bert"], monkeypatch)
    assert found == {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.mark.parametrize(
    "named",
    [
        {"model": "google-bert/bert-base-uncased"},
        {"model": "timm/vit_tiny_patch16_224"},
        {"teacher": "google-bert/bert-large-uncased"},
        {"teacher": "timm/vit_base_patch16_224"},
        *({entry: Source(path="owner/name", split="train")} for entry in ("train", "calibrate", "evaluate", "test")),
    ],
    ids=lambda named: " ".join(named),
)
def test_what_is_on_the_hub_may_be_looked_up_there(folders, monkeypatch, named):
    assert offline(folders["bert"], monkeypatch, **named) == {}


def test_a_teacher_that_is_gone_after_training_is_in_nobody_s_way(folders, monkeypatch):
    assert offline(folders["bert"], monkeypatch, teacher="./none") == {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
    }


def test_a_function_is_imported_from_the_current_directory_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_package_for_quality.py").write_text("def score(model): return 1.0\nnothing = 3\n")
    assert import_function("my_package_for_quality.score")(None) == 1.0
    with pytest.raises(JointoptError, match="has no function 'nothing'"):
        import_function("my_package_for_quality.nothing")
    for name, text, said in (
        ("torn_package", "def score(", "importing 'torn_package' raised SyntaxError"),
        ("ending_package", "import sys; sys.exit(0)", "importing 'ending_package' raised SystemExit"),
    ):
        (tmp_path / f"{name}.py").write_text(text)
        with pytest.raises(JointoptError, match=said):
            import_function(f"{name}.score")
    with pytest.raises(JointoptError, match="No module named 'no_such_package'"):
        import_function("no_such_package.score")
