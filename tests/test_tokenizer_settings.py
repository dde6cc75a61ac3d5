"""An export's tokenizer truncates and pads as the original's, whatever it was called with on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import jointopt
from jointopt.checkpoint.processors import processor_differences
from jointopt.models import load_model
from jointopt.rows import DataSource
from jointopt.tasks import TASKS
from tests.saved import batches_of, save_bert, save_llama, write_reviews
from tests.zoo import supernet_of


def settings(folder: Path) -> tuple[object, object]:
    content = json.loads((folder / "tokenizer.json").read_text())
    return content["truncation"], content["padding"]


def bake(folder: Path) -> None:
    """Truncates and pads in its tokenizer.json, as those of sentence-transformers do."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(24)
    tokenizer.enable_padding(length=24, pad_token=tokenizer.id_to_token(0))
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize(("save", "task"), [(save_bert, "text-classification"), (save_llama, "causal-lm")])
def test_preparing_data_leaves_the_tokenizer_as_it_was(save, task, baked, tmp_path):
    folder = save(tmp_path)
    if baked:
        bake(folder)
    loaded = load_model(str(folder), task, "cpu")
    source = DataSource(str(write_reviews(tmp_path / "reviews.csv")), length=5)
    assert batches_of(loaded, task, source, 8)
    loaded.saved_processor.save_pretrained(tmp_path / "saved")
    assert settings(tmp_path / "saved") == settings(folder)
    assert (settings(folder)[0] is None) is not baked


@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize("target", ["transformers", "onnxruntime", "gguf"])
def test_an_export_has_the_settings_of_the_file_that_a_tokenizer_was_loaded_from(target, baked, tmp_path):
    if target != "transformers":
        pytest.importorskip({"gguf": "gguf", "onnxruntime": "onnx"}[target])
    words = Tokenizer(models.BPE({letter: at for at, letter in enumerate(["<end>", *"abcdefgh", "ab"])}, [("a", "b")]))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(tmp_path)
    if baked:
        bake(tmp_path)
    processor = AutoTokenizer.from_pretrained(tmp_path)
    processor("abba", truncation=True, max_length=3)
    called = processor.backend_tokenizer.truncation
    supernet = supernet_of("llama_tied", ["none", "W8A16_G32" if target == "gguf" else "W8A8"], preset="fixed")
    genome = supernet.space.largest
    folder = jointopt.export(supernet, genome, tmp_path / "out", target=target, processor=processor)
    assert settings(folder) == settings(tmp_path)
    assert processor.backend_tokenizer.truncation == called


def swap_words(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"good"', '"x"').replace('"bad"', '"good"').replace('"x"', '"bad"'))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: None, []),
        (swap_words, ["input_ids that the export's TokenizersBackend makes of the calibration data are others"]),
        (bake, ["truncation {", "padding {"]),
        (lambda folder: (folder / "tokenizer.json").unlink(), ["the folder '"]),
    ],
)
def test_a_tokenizer_that_is_another_or_gone_is_told(damage, said, tmp_path):
    loaded = load_model(str(save_bert(tmp_path)), None, "cpu")
    source = DataSource(str(write_reviews(tmp_path / "reviews.csv")))

    def prepare(processor):
        return TASKS["text-classification"].samples(source, processor, loaded.model).batches(8)

    loaded.processor.save_pretrained(tmp_path / "export")
    damage(tmp_path / "export")
    found = processor_differences(tmp_path / "export", loaded, prepare(loaded.processor), prepare)
    assert len(found) == len(said)
    assert all(line.startswith(f"processor: {start}") for line, start in zip(found, said, strict=True)), found
