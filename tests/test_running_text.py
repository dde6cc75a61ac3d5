"""Running text is tokenized a part at a time, as far as it is asked for, into the tokens that all of it has at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from unittest.mock import patch

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jointopt.models import load_model
from jointopt.rows import DataSource
from jointopt.tasks import TASKS, running_text
from jointopt.tasks.running_text import token_parts
from tests.saved import save_llama

SHARED = 256
WINDOW = SHARED + 509  # a prime, as of the real ones
WORDS = ["film", "films", "filming", "the", "then", "other", "banana", "ananas", "café", "été", "naïve", "don't"]
LETTERS = ["a", "n", "é", "e\u0301", "東京", "🙂", "\u00a0", "<end>", "ﬁ", "=", ".", "\r\n"]


def bytes_of_words() -> tuple[Tokenizer, trainers.Trainer]:
    """As GPT-2's, LLaMA 3's and SmolLM's."""
    found = Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.post_processor = processors.ByteLevel(trim_offsets=True)
    found.decoder = decoders.ByteLevel()
    return found, trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def whole_lines() -> tuple[Tokenizer, trainers.Trainer]:
    """As LLaMA 2's and Gemma's: merges cross the borders of words. Many spaces are one, as in XLM-RoBERTa's."""
    found = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    found.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(" +"), " "), normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return found, trainers.BpeTrainer(vocab_size=150, special_tokens=["<unk>"])


def likeliest() -> tuple[Tokenizer, trainers.Trainer]:
    """As T5's and XLM-RoBERTa's, but without borders of words."""
    found = Tokenizer(models.Unigram())
    found.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" ", "▁")])
    return found, trainers.UnigramTrainer(vocab_size=80, special_tokens=["<unk>"], unk_token="<unk>")


def pieces_of_words() -> tuple[Tokenizer, trainers.Trainer]:
    """As BERT's."""
    found = Tokenizer(models.WordPiece(unk_token="[UNK]", max_input_chars_per_word=30))
    found.normalizer, found.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    return found, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"])


@cache
def trained(kind: Callable[[], tuple[Tokenizer, trainers.Trainer]]) -> PreTrainedTokenizerFast:
    tokenizer, trainer = kind()
    lines = [" ".join(WORDS[at:] + WORDS[:at]) for at in range(len(WORDS))]
    tokenizer.train_from_iterator([*lines, "= = == ==== aaaa"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


KINDS = pytest.mark.parametrize("kind", [bytes_of_words, whole_lines, likeliest, pieces_of_words])


def small_windows():
    return patch.multiple(running_text, SHARED=SHARED, WINDOW=WINDOW)


def parts_of(tokenizer, rows: list[str], end: list[int]) -> list[int]:
    return [token for part in token_parts(tokenizer, rows, end) for token in part]


@KINDS
@settings(max_examples=40, deadline=None)
@given(
    spans=st.lists(
        st.tuples(
            st.lists(st.sampled_from([*WORDS, *LETTERS]), min_size=1, max_size=20),
            st.sampled_from([" ", " ", "  ", "\n", "\n\n", "", " " * 40]),
            st.integers(1, 120),
        ),
        min_size=1,
        max_size=6,
    )
)
def test_tokens_of_windows_are_those_of_the_text(kind, spans):
    text = "".join((between.join(words) + between) * times for words, between, times in spans)
    tokenizer = trained(kind)
    with small_windows():
        assert parts_of(tokenizer, [text], []) == tokenizer(text, add_special_tokens=False)["input_ids"]


@KINDS
@pytest.mark.parametrize("filler", ["=", "a", " ", "🙂", "\n", "e\u0301", "an"])
@pytest.mark.parametrize("length", [800, 1531, 4096])
def test_a_run_longer_than_what_windows_share_is_tokenized_as_in_the_text(kind, filler, length):
    text = "the film " + filler * length + " then " + "other films " * 200
    tokenizer = trained(kind)
    with small_windows():
        assert parts_of(tokenizer, [text], []) == tokenizer(text, add_special_tokens=False)["input_ids"]


@KINDS
@given(
    rows=st.lists(
        st.builds(lambda word, times: f"{word} " * times, st.sampled_from(WORDS), st.sampled_from([0, 1, 5, 400]))
    )
)
@settings(max_examples=30, deadline=None)
def test_rows_are_parted_by_the_end_whatever_part_they_are_in(kind, rows):
    tokenizer = trained(kind)
    expected: list[int] = []
    for row in rows:
        found = tokenizer(row, add_special_tokens=False)["input_ids"]
        expected += [-1, *found] if expected else found
    with small_windows():
        assert parts_of(tokenizer, rows, [-1]) == expected


@pytest.mark.parametrize("name", ["text.txt", "text.parquet"])
def test_as_much_text_is_tokenized_as_pieces_are_asked_for(name, tmp_path):
    rows = [f"the film {'was very good ' * (at % 7)} and bad" for at in range(4000)]
    if name == "text.txt":
        (tmp_path / name).write_text("\n".join(rows))
    else:
        pd.DataFrame({"text": rows}).to_parquet(tmp_path / name)
    loaded = load_model(str(save_llama(tmp_path)), "causal-lm", "cpu")
    given: list[int] = []
    called = running_text._called

    def counted(processor, texts, **also):
        given.append(sum(map(len, [texts] if isinstance(texts, str) else texts)))
        return called(processor, texts, **also)

    def pieces(samples: int | None) -> torch.Tensor:
        given.clear()
        source = DataSource(str(tmp_path / name), length=16, samples=samples)
        found = TASKS["causal-lm"].samples(source, loaded.processor, loaded.model)
        return found.collate(range(found.count))["input_ids"]

    with small_windows(), patch.object(running_text, "_called", counted):
        some, used = pieces(12), sum(given)
        whole = pieces(None)
    assert torch.equal(some, whole[:12]) and some.dtype == torch.long
    assert used <= 4 * WINDOW < sum(given)
