"""Models and functions as a config names them: found here or on the hub, loaded in their dtype, or told why not."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertLMHeadModel,
    BertModel,
    ElectraForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForCausalLM,
    RobertaForSequenceClassification,
)

from jointopt import JointoptError, export
from jointopt.cli import main
from jointopt.config.config import Config
from jointopt.config.sections import Data, Distill, Source, Train
from jointopt.config.starter import starter_config
from jointopt.models import chosen_device, empty_model, find_source, load_model, model_task
from jointopt.prepared import import_function, prepare, stay_offline
from jointopt.rows import looks_like_hub_id
from tests.saved import SMALL, save_bert, save_each, save_llama, save_tokenizer
from tests.zoo import supernet_of


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return save_each(tmp_path_factory)


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


@pytest.mark.parametrize("kind", [BertForMaskedLM, BertLMHeadModel, RobertaForCausalLM, ElectraForCausalLM, "llama"])
def test_a_model_that_reads_later_tokens_is_no_causal_one(kind, tmp_path):
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SMALL, is_causal=False))
    else:
        model = kind(kind.config_class(**SMALL))
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    (tmp_path / "t.txt").write_text("the film was good " * 40)
    data = Data(calibrate=str(tmp_path / "t.txt"), evaluate=str(tmp_path / "t.txt"))
    config = Config(model=str(tmp_path), task="causal-lm", data=data, device="cpu", output=str(tmp_path / "out"))
    said = "task: found causal-lm, and .* reads each token before it says which it is; allowed: .* or quality: "
    with pytest.raises(JointoptError, match=said):
        prepare(config)
    if kind is not BertForMaskedLM:  # whose name says so
        with pytest.raises(JointoptError, match=said):
            starter_config(str(tmp_path))


def test_a_function_of_ones_own_may_score_a_model_that_is_not_causal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("scoring.py").write_text("def by_tokens(model):\n    return 1.0\n")
    BertForMaskedLM(BertConfig(**SMALL)).save_pretrained("bert")
    save_tokenizer(Path("bert"))
    Path("t.txt").write_text("the film was good " * 40)
    data = Data(calibrate="t.txt")
    config = Config(model="bert", task="causal-lm", quality="scoring.by_tokens", data=data, device="cpu", output="out")
    assert prepare(config).inputs


def test_weights_that_a_checkpoint_lacks_are_told(tmp_path):
    loaded = load_model(str(save_headless_bert(tmp_path)), "text-classification", "cpu")
    assert loaded.untrained == ("classifier.bias", "classifier.weight")


def test_the_head_of_another_task_is_not_taken_in_part(tmp_path):
    LlamaForTokenClassification(LlamaConfig(**SMALL, pad_token_id=0)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    said = r"holds score.bias \(its config names LlamaForTokenC.*\), .* allowed: weights of a LlamaForSequenceC"
    with pytest.raises(JointoptError, match=said):
        load_model(str(tmp_path), "text-classification", "cpu")


def with_weights(folder: Path, **more: torch.Tensor) -> str:
    """The folder, with more in its file."""
    save_file({**load_file(folder / "model.safetensors"), **more}, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


def test_weights_of_a_layer_that_the_model_would_leave_out_are_refused(tmp_path):
    name = with_weights(save_llama(tmp_path / "llama"), **{"model.layers.0.mlp.up_proj.bias": torch.ones(128)})
    with pytest.raises(JointoptError, match=r"holds model.layers.0.mlp.up_proj.bias, without which LlamaForCausalLM "):
        load_model(name, None, "cpu")


def test_other_weights_that_a_model_leaves_out_are_told(tmp_path):
    name = with_weights(save_llama(tmp_path / "llama"), **{"v_head.summary.weight": torch.ones(1, 64)})
    with pytest.warns(UserWarning, match="holds v_head.summary.weight, which LlamaForCausalLM leaves out"):
        load_model(name, None, "cpu")


@pytest.mark.filterwarnings("error")
def test_what_is_left_out_for_a_new_head_or_as_ever_is_not_told(tmp_path):
    BertForPreTraining(BertConfig(**SMALL)).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    assert load_model(str(tmp_path / "bert"), "text-classification", "cpu").untrained
    RobertaForSequenceClassification(RobertaConfig(**SMALL)).save_pretrained(tmp_path / "roberta")
    save_tokenizer(tmp_path / "roberta")
    unused = {"roberta.pooler.dense.weight": torch.ones(64, 64), "roberta.embeddings.position_ids": torch.ones(1, 32)}
    assert not load_model(with_weights(tmp_path / "roberta", **unused), None, "cpu").untrained


def test_a_model_whose_body_has_no_weights_is_refused(tmp_path, folders):
    weights = load_file(folders["bert"] / "model.safetensors")
    copied = Path(shutil.copytree(folders["bert"], tmp_path / "bert"))
    save_file(
        {f"module.{name}": each for name, each in weights.items()}, copied / "model.safetensors", {"format": "pt"}
    )
    said = (
        r"no weights for bert.embeddings.LayerNorm.bias and \d+ more \(it holds module.bert.*allowed: all but .* a head"
    )
    with pytest.raises(JointoptError, match=said):
        load_model(str(copied), None, "cpu")


def test_weights_of_other_shapes_than_the_config_says_are_named(tmp_path, folders):
    copied = shutil.copytree(folders["bert"], tmp_path / "bert")
    name = with_weights(Path(copied), **{"classifier.bias": torch.zeros(7)})
    with pytest.raises(JointoptError, match=r"holds classifier.bias of shape \(7,\); allowed by its config: \(\d+,\)"):
        load_model(name, None, "cpu")


def test_an_export_that_only_its_own_file_loads_is_refused(tmp_path):
    supernet = supernet_of("bert", ["none"])
    export(supernet, supernet.space.smallest, tmp_path / "export")
    assert (tmp_path / "export" / "modeling_jointopt.py").exists()
    with pytest.raises(JointoptError, match="is an export that only its own modeling_jointopt.py loads; allowed"):
        load_model(str(tmp_path / "export"), None, "cpu")


def test_weights_that_a_checkpoint_lacks_are_the_same_whenever_it_is_loaded(tmp_path):
    folder, heads, drawn = save_headless_bert(tmp_path), [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        heads.append(load_model(str(folder), "text-classification", "cpu").model.classifier.weight)
        drawn.append(torch.rand(1))
    assert torch.equal(*heads)
    assert not torch.equal(*drawn)


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
