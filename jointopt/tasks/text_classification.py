"""Text classification: rows of a text, or a pair of texts, and a label, or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from jointopt.rows import PAIRS, TEXT, TEXT_PAIR, Columns, DataSource, check_named, name_of, read_columns, texts
from jointopt.tasks.problems import CLASSIFICATION
from jointopt.tasks.task import Samples, Task, picked_labels, place_of, read_labels, text_length
from jointopt.tokenizer_settings import settings_kept
from quant.errors import JointoptError


def samples(source: DataSource, processor: Any, model: nn.Module) -> Samples:
    """Tokenized once, padded to the longest of each batch."""
    _check_padding(processor, model)
    check_named(source, ("text", "text_pair", "label"))
    columns = read_columns(source)
    keys = (f"{source.key}.text", f"{source.key}.text_pair")
    given = [texts(columns[name], key) for name, key in zip(_names(source, columns), keys, strict=False)]
    labels = read_labels(columns, source, model)
    with settings_kept(processor):
        encoded = processor(*given, truncation=True, max_length=text_length(source, processor, model))
    for row, tokens in enumerate(encoded["input_ids"], 1):
        if not tokens:
            raise JointoptError(f"{source.key}.text: row {row} has no token; allowed: texts of one token or more")

    def collate(indices: Sequence[int]) -> Mapping[str, Tensor]:
        picked = {name: [many[index] for index in indices] for name, many in encoded.items()}
        padded = processor.pad(picked, return_tensors="pt")
        return {**padded, **picked_labels(labels, indices)}

    def mark(index: int) -> bytes:
        label = [] if labels is None else [labels[index].tolist()]
        return repr([*(column[index] for column in given), *label]).encode()

    order = sorted(range(len(given[0])), key=lambda index: len(encoded["input_ids"][index]))
    return Samples(len(order), collate, order, place_of(model), mark)


def _names(source: DataSource, columns: Columns) -> list[str]:
    """The column of texts, and the one of the texts that belong to them if there is one."""
    if source.text is None and source.text_pair is None and "text" not in columns:
        for first, second in PAIRS:
            if first in columns and second in columns:
                return [first, second]
    names = [name_of(columns, source.text, TEXT, f"{source.key}.text")]
    if source.text_pair is not None or any(_all_texts(columns, name) for name in TEXT_PAIR):
        names.append(name_of(columns, source.text_pair, TEXT_PAIR, f"{source.key}.text_pair"))
    return names


def _all_texts(columns: Columns, name: str) -> bool:
    found = columns.get(name, [])
    return len(found) > 0 and all(isinstance(each, str) and each.strip() for each in found)


def _check_padding(processor: Any, model: Any) -> None:
    """A decoder is classified by each text's last token that is no padding, which its own config has to tell."""
    from transformers.modeling_layers import GenericForSequenceClassification

    if processor.pad_token is None:
        raise JointoptError("model: its tokenizer has no padding token; set one and save it beside the model")
    if not isinstance(model, GenericForSequenceClassification):
        return
    found = model.config.get_text_config().pad_token_id
    if found != processor.pad_token_id:
        raise JointoptError(
            f"model: found pad_token_id {found} in its config.json, and its tokenizer pads with "
            f"{processor.pad_token_id} ({processor.pad_token!r}); allowed: that"
        )


TASK = Task("text-classification", "AutoModelForSequenceClassification", CLASSIFICATION, 32, 128, samples)
