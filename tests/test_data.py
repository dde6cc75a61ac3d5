"""Data as a config names them: tables and texts are read to the batches of a task, and bad ones are refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForSequenceClassification

from jointopt import JointoptError, rows
from jointopt.config.config import Config
from jointopt.config.sections import Data, Source
from jointopt.models import load_model
from jointopt.rows import DataSource, read_columns, read_text, some
from jointopt.tasks import TASKS
from jointopt.tasks.labels import class_indices
from tests.saved import LABELS, batches_of, quality_of, save_each, save_llama, write_images, write_reviews


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_each(tmp_path_factory)


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
    batch = batches_of(loaded, "causal-lm", DataSource(str(tmp_path / "text.txt"), length=16), 100)[0]
    assert batch["input_ids"].shape == (6, 16)
    with torch.no_grad():
        assert found["loss"] == pytest.approx(float(loaded.model(**batch).loss), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))


def test_rows_of_text_become_pieces_parted_by_the_end_token(folders, tmp_path):
    pd.DataFrame({"text": ["good film", "bad film"] * 8}).to_parquet(tmp_path / "t.parquet")
    loaded = load_model(str(folders["llama"]), None, "cpu")
    source = DataSource(str(tmp_path / "t.parquet"), length=6, samples=2)
    (batch,) = batches_of(loaded, "causal-lm", source, 8)
    end = loaded.processor.eos_token_id
    assert batch["input_ids"].shape == (2, 6)
    assert batch["input_ids"][0, 2] == end == batch["input_ids"][0, 5]


@pytest.mark.parametrize(("said", "cut"), [(5, 5), (10**30, 32), (1e30, 32)])
def test_texts_are_as_long_as_the_tokenizer_and_the_model_take_where_the_config_does_not_say(
    folders, said, cut, tmp_path
):
    pd.DataFrame({"text": ["good film " * 50], "label": [1]}).to_csv(tmp_path / "t.csv", index=False)
    for name, task in (("bert", "text-classification"), ("llama", "causal-lm")):
        loaded = load_model(str(folders[name]), task, "cpu")
        loaded.processor.model_max_length = said
        for wanted, length in ((None, cut), (7, 7)):
            source = DataSource(str(tmp_path / "t.csv"), length=wanted)
            batch = batches_of(loaded, task, source, 1)[0]
            assert batch["input_ids"].shape == (1, length), (name, wanted)


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
    (batch,) = batches_of(loaded, task, DataSource(str(tmp_path / "t.csv")), 2)
    order = [1, 0] if name == "bert" else [0, 1]  # texts by length
    assert batch["labels"][order].tolist() == [1, 0]
    assert not torch.equal(*batch["input_ids" if name == "bert" else "pixel_values"])


def test_a_second_text_is_read_where_its_column_has_the_usual_name(folders, tmp_path):
    (tmp_path / "t.csv").write_text("text,text_pair,label\ngood film,bad,1\n")
    loaded = load_model(str(folders["bert"]), "text-classification", "cpu")
    (batch,) = batches_of(loaded, "text-classification", DataSource(str(tmp_path / "t.csv")), 1)
    assert batch["input_ids"][0].tolist() == loaded.processor("good film", "bad")["input_ids"]
    (tmp_path / "t.jsonl").write_text('{"text": "good film", "text_pair": null, "label": 1}\n')
    (batch,) = batches_of(loaded, "text-classification", DataSource(str(tmp_path / "t.jsonl")), 1)
    assert batch["input_ids"][0].tolist() == loaded.processor("good film")["input_ids"]


@pytest.mark.parametrize(
    ("first", "second"),
    [("question", "sentence"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2")],
)
def test_pairs_are_found_by_the_names_of_well_known_data_sets(folders, tmp_path, first, second):
    (tmp_path / "t.csv").write_text(f"idx,{second},{first},label\n0,bad,good film,1\n")
    loaded = load_model(str(folders["bert"]), "text-classification", "cpu")
    (batch,) = batches_of(loaded, "text-classification", DataSource(str(tmp_path / "t.csv")), 1)
    assert batch["input_ids"][0].tolist() == loaded.processor("good film", "bad")["input_ids"]


def test_a_named_column_of_texts_is_read_alone(folders, tmp_path):
    (tmp_path / "t.csv").write_text("question,sentence,label\nbad,good film,1\n")
    loaded = load_model(str(folders["bert"]), "text-classification", "cpu")
    (batch,) = batches_of(loaded, "text-classification", DataSource(str(tmp_path / "t.csv"), text="sentence"), 1)
    assert batch["input_ids"][0].tolist() == loaded.processor("good film")["input_ids"]


@pytest.mark.parametrize("column", ["text", "sentence", "snippet", "review", "content"])
def test_a_language_model_takes_a_column_of_a_usual_name(folders, tmp_path, column):
    (tmp_path / "t.csv").write_text(f"label,{column}\n1,good film\n0,bad film\n")
    loaded = load_model(str(folders["llama"]), None, "cpu")
    (batch,) = batches_of(loaded, "causal-lm", DataSource(str(tmp_path / "t.csv"), length=5), 2)
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
    (batch,) = batches_of(loaded, task, config.source("calibrate"), 32)
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


@pytest.mark.parametrize("samples", [None, 7, 40])
@pytest.mark.parametrize("group", [1, 16, 100])
def test_rows_of_a_parquet_are_those_that_pandas_has_of_all(samples, group, tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "PARQUET_ROWS", 9)
    numbers = range(40)
    frame = pd.DataFrame(
        {
            "image": [{"bytes": bytes([at]), "path": None} for at in numbers],
            "tags": [list(range(at % 4)) for at in numbers],
            "text": pd.Series([None if at % 3 == 0 else f"film {at}" for at in numbers]),
            "label": pd.Categorical([f"class {at % 11}" for at in numbers]),
            "count": pd.array([None if at % 5 == 0 else at for at in numbers], dtype="Int64"),
            "day": pd.date_range("2026-01-01", periods=40, tz="UTC"),
            "a.b": [at / 3 for at in numbers],
            7: [at % 2 == 0 for at in numbers],
        },
        index=pd.Index([at * 2 for at in numbers], name="number"),
    )
    with pytest.warns(UserWarning, match="mixed"):
        frame.to_parquet(tmp_path / "a.parquet", row_group_size=group)
    whole, kept = pd.read_parquet(tmp_path / "a.parquet"), some(40, samples)
    found = read_columns(DataSource(str(tmp_path / "a.parquet"), samples=samples))
    assert list(found) == list(map(str, whole.columns)) and "number" not in found
    for name in whole.columns:
        assert list(map(repr, found[str(name)])) == [repr(whole[name].tolist()[index]) for index in kept], name


def test_columns_that_nobody_asks_for_are_not_read(tmp_path, monkeypatch):
    read = []
    plain = rows._parquet_rows
    monkeypatch.setattr(rows, "_parquet_rows", lambda path, name, kept: read.append(name) or plain(path, name, kept))
    pd.DataFrame({"image": [b"x"] * 3, "text": ["a", "b", "c"]}).to_parquet(tmp_path / "a.parquet")
    columns = read_columns(DataSource(str(tmp_path / "a.parquet"), samples=2))
    assert "image" in columns and not read
    assert columns["text"] == columns["text"] == [["a", "b", "c"][index] for index in some(3, 2)]
    assert read == ["text"]


def test_columns_of_a_parquet_are_told_apart_and_read_in_every_type(tmp_path):
    count = 600
    views = pyarrow.array([f"film {at}" for at in range(count)], pyarrow.string_view())
    fields = [{"b": at} for at in range(count)]
    table = pyarrow.table({"a": fields, "a.b": [f"c{at}" for at in range(count)], "text": views})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for samples in (None, 5):
        columns = read_columns(DataSource(str(tmp_path / "a.parquet"), samples=samples))
        for at, row in enumerate(some(count, samples)):
            assert (columns["text"][at], columns["a.b"][at]) == (f"film {row}", f"c{row}")


def test_a_parquet_that_is_damaged_where_its_rows_are_is_told(tmp_path):
    path = tmp_path / "a.parquet"
    pd.DataFrame({"text": [f"film {at}" for at in range(500)]}).to_parquet(path)
    content = path.read_bytes()
    path.write_bytes(content[:4] + bytes(600) + content[604:])
    with pytest.raises(JointoptError, match=r"data: .*a.parquet' cannot be read: "):
        read_columns(DataSource(str(path)))["text"]


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


def test_a_split_of_a_file_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\ngood,1\n")
    with pytest.raises(JointoptError, match=r"data.split: found 'train', but .* is here; allowed: of a hub id"):
        read_columns(DataSource(str(tmp_path / "a.csv"), split="train"))
