"""Exports for llama.cpp: blocks that hold the search's codes, read back by transformers' own GGUF reader."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet, load_config
from jointopt.checkpoint.gguf_writer import check
from jointopt.config.starter import starter_config
from jointopt.models import load_model
from tests import zoo
from tests.zoo import batches, logits, make, mean_square

gguf = pytest.importorskip("gguf")
SCHEMES = ["none", "W8A16_G32", "W4A16_G32"]


def supernet_of(name: str, schemes=SCHEMES, **options) -> Supernet:
    return zoo.supernet_of(name, schemes, **{"depth": [2, 3], **options})


@pytest.mark.parametrize("name", ["llama_tied", "llama_untied"])
def test_transformers_reads_back_the_sub_network_that_was_scored(name, tmp_path):
    supernet = supernet_of(name)
    genome = supernet.space.sample(1, seed=4)[0]
    folder = jointopt.export(supernet, genome, tmp_path / "out", target="gguf")
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file="model.gguf", dtype=torch.float32).eval()
    batch = batches(name, seed=2)[0]
    torch.testing.assert_close(logits(model, batch), logits(supernet.extract(genome), batch), rtol=1e-4, atol=1e-4)


def test_what_rotates_positions_is_the_model_s_own(tmp_path):
    config = make("llama_tied").config
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500000.0}
    model = LlamaForCausalLM(config).eval()
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=SCHEMES, depth=[2, 3]))
    supernet.calibrate(batches("llama_tied"))
    folder = jointopt.export(supernet, supernet.space.largest, tmp_path / "out", target="gguf")
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    assert fields["llama.rope.freq_base"].contents() == 500000.0


@pytest.mark.parametrize("scheme", ["W8A16_G32", "W4A16_G32"])
def test_a_block_s_values_are_the_layer_s_to_the_bit(scheme, tmp_path):
    supernet = supernet_of("llama_tied", [scheme])
    genome = supernet.space.largest
    folder = jointopt.export(supernet, genome, tmp_path / "out", target="gguf")
    tensors = {each.name: each for each in gguf.GGUFReader(folder / "model.gguf").tensors}
    kept = tensors["blk.1.ffn_up.weight"]
    assert kept.tensor_type.name == {"W8A16_G32": "Q8_0", "W4A16_G32": "Q4_0"}[scheme]
    values = gguf.quants.dequantize(kept.data, kept.tensor_type)
    expected = supernet.extract(genome).model.layers[1].mlp.up_proj.weight.detach().numpy()
    assert np.array_equal(values, expected)


def test_a_disk_that_is_full_is_told_and_nothing_is_left_on_it(tmp_path):
    supernet = supernet_of("llama_untied")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(JointoptError, match=r"^export: '.*out' cannot be written: .* as on a full disk$"):
            jointopt.export(supernet, supernet.space.largest, tmp_path / "out", target="gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_an_export_weighs_what_was_reported_and_verifies(tmp_path):
    supernet = supernet_of("llama_tied")
    genome = supernet.space.sample(1, seed=4)[0]
    folder = jointopt.export(supernet, genome, tmp_path / "out", target="gguf")
    quality = mean_square("llama_tied", seed=2)
    verification = jointopt.verify(folder, quality=quality)
    assert verification.ok, verification.differences
    quantized = sum(layer["scheme"] != "none" for layer in supernet.layout(genome))
    assert 0 <= supernet.costs(genome)["size"] - verification.size <= 16 * quantized
    assert verification.metrics["quality"] == pytest.approx(quality(supernet.extract(genome)), rel=1e-4)


def test_beside_the_file_are_the_sizes_that_it_has_and_how_it_generates(tmp_path):
    model = make("llama_tied")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"], depth=[2], mlp=[0.5, 1.0]))
    supernet.calibrate(batches("llama_tied"))
    genome = supernet.space.smallest
    folder = jointopt.export(supernet, genome, tmp_path / "out", target="gguf")
    found = AutoConfig.from_pretrained(folder)
    assert found.intermediate_size == supernet.extract(genome).model.layers[0].mlp.up_proj.out_features
    assert found.intermediate_size < model.config.intermediate_size
    assert (folder / "generation_config.json").is_file()


def test_a_bfloat16_model_is_verified_though_it_reloads_in_float32(tmp_path):
    model = make("llama_tied").to(torch.bfloat16)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none"], depth=[1, 2]))
    supernet.calibrate(batches("llama_tied"))
    genome, quality = supernet.space.largest, mean_square("llama_tied", seed=2)
    with supernet.active(genome) as view:
        supernet.scores[genome.tobytes()] = {"quality": quality(view)}
    folder = jointopt.export(supernet, genome, tmp_path / "out", target="gguf")
    found = jointopt.verify(folder, quality=quality)
    assert found.ok, found.differences
    assert not jointopt.verify(folder, quality=lambda model: 1.1 * quality(model)).ok


def test_scales_that_float16_holds_below_its_normal_numbers_are_the_same_in_the_file(tmp_path):
    model = make("llama_tied")
    with torch.no_grad():
        for scale, name in ((2.0**-16, "gate_proj"), (2.0**-30, "up_proj")):
            weight = model.model.layers[0].mlp.get_submodule(name).weight
            weight.mul_(127 * scale / weight.view(weight.shape[0], -1, 32).abs().amax(-1).repeat_interleave(32, 1))
    supernet = supernet_of("llama_tied", ["W8A16_G32"], model=model, preset="fixed")
    with pytest.raises(JointoptError, match=r"up_proj: a scale of .*e-10 is none of float16"):
        jointopt.export(supernet, supernet.space.largest, tmp_path / "out", target="gguf")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2.0**14)
    supernet = supernet_of("llama_tied", ["W8A16_G32"], model=model, preset="fixed")
    found = jointopt.verify(jointopt.export(supernet, supernet.space.largest, tmp_path / "out", target="gguf"))
    assert found.ok, found.differences


LETTERS = {letter: at for at, letter in enumerate(["<end>", *"abcdefgh", "ab", "cd"])}


def letters():
    """A tokenizer of these."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(LETTERS, [("a", "b"), ("c", "d")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.mark.parametrize(("template", "ends"), [("<end> $A", (True, False)), ("$A <end>", (False, True))])
def test_a_file_says_whether_texts_begin_and_end_with_a_token(template, ends, tmp_path):
    from tokenizers.processors import TemplateProcessing

    processor = letters()
    processor.bos_token = "<end>"
    processor.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[("<end>", 0)])
    supernet = supernet_of("llama_tied")
    folder = jointopt.export(supernet, supernet.space.largest, tmp_path / "out", target="gguf", processor=processor)
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    assert tuple(bool(fields[f"tokenizer.ggml.add_{end}_token"].contents()) for end in ("bos", "eos")) == ends


def test_a_tokenizer_goes_into_the_file(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    processor = letters()
    processor.chat_template = "{{ messages[0]['content'] }}<end>"
    supernet = supernet_of("llama_tied")
    folder = jointopt.export(supernet, supernet.space.largest, tmp_path / "out", target="gguf", processor=processor)
    fields = gguf.GGUFReader(folder / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"]
    named = [bytes(tokens.parts[at]).decode() for at in tokens.data]
    rows = supernet.model.config.vocab_size
    assert named == [*LETTERS, *(f"[PAD{number}]" for number in range(len(LETTERS), rows))]
    assert fields["tokenizer.ggml.token_type"].contents()[-1] == gguf.TokenType.UNUSED
    assert int(fields["tokenizer.ggml.eos_token_id"].parts[-1][0]) == 0
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert not fields["tokenizer.ggml.add_bos_token"].contents()
    assert fields["tokenizer.chat_template"].contents() == processor.chat_template
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(JointoptError, match="WordLevel tokenizer; allowed: byte-level BPE"):
        jointopt.export(
            supernet,
            supernet.space.largest,
            tmp_path / "other",
            target="gguf",
            processor=PreTrainedTokenizerFast(tokenizer_object=words),
        )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("name", ["model.gguf", "."])
def test_what_was_written_is_read_as_a_model_of_a_config(name, tmp_path):
    supernet = supernet_of("llama_tied")
    genome = supernet.space.sample(1, seed=4)[0]
    folder = jointopt.export(supernet, genome, tmp_path / "out", target="gguf", processor=letters())
    with pytest.warns(UserWarning, match="^dtype: the weights are stored as GGUF and read as float32"):
        loaded = load_model(str(folder / name), None, "cpu")
        assert "task: causal-lm" in starter_config(str(folder / name))
    assert (loaded.task, loaded.source.kind, loaded.model.dtype) == ("causal-lm", "gguf", torch.float32)
    assert loaded.processor("abcd")["input_ids"] == letters()("abcd")["input_ids"]
    batch = batches("llama_tied", seed=2)[0]
    scored = logits(supernet.extract(genome), batch)
    torch.testing.assert_close(logits(loaded.model, batch), scored, rtol=1e-4, atol=1e-4)
    again = Supernet(loaded.model, SearchSpace.for_model(loaded.model, schemes=["none", "W8A8"]))
    again.calibrate(batches("llama_tied"))
    found = jointopt.verify(jointopt.export(again, again.space.largest, tmp_path / "again"))
    assert found.ok, found.differences


WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("parted", ["smollm", "llama-bpe", "qwen2", "alone", "prefix"])
def test_how_a_tokenizer_parts_texts_goes_into_the_file_or_is_refused(parted, tmp_path):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = {"llama-bpe": WORDS, "qwen2": WORDS.replace("{1,3}", ""), "alone": r"\s+"}
    steps = {
        "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        "prefix": [pre_tokenizers.ByteLevel(add_prefix_space=True)],
        **{name: [pre_tokenizers.Split(Regex(each), "isolated"), whole] for name, each in split.items()},
    }[parted]
    model = models.BPE({"<end>": 0, "a": 1}, [], ignore_merges=parted == "llama-bpe")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    processor = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    supernet = supernet_of("llama_tied")

    def exported():
        return jointopt.export(supernet, supernet.space.largest, tmp_path / "out", target="gguf", processor=processor)

    if parted in ("alone", "prefix"):
        with pytest.raises(JointoptError, match="parts texts in a way of its own; allowed: gpt-2, smollm"):
            exported()
    else:
        fields = gguf.GGUFReader(exported() / "model.gguf").fields
        assert fields["tokenizer.ggml.pre"].contents() == parted


def test_what_gguf_has_no_place_for_is_refused(tmp_path):
    uneven = supernet_of("llama_tied", mlp=[128, 256])
    genome = uneven.space.encode({**dict(uneven.space.decode(uneven.space.largest)), "block0.mlp": 128})
    biased = make("llama_tied")
    biased.model.layers[0].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(128))
    gelu, turned = make("llama_tied"), make("llama_tied")
    gelu.config.hidden_act = "gelu"
    turned.config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    for model, match in (
        (biased, r"layers\.0\..*q_proj\.bias"),
        (gelu, "hidden_act gelu"),
        (turned, "rope_type linear"),
    ):
        with pytest.raises(JointoptError, match=match):
            check(model)
    vit = Supernet(make("vit"), SearchSpace.for_model(make("vit"), schemes=["none"]))
    vit.calibrate(batches("vit"))
    for match, given in {
        "blocks differ in size": (uneven, genome),
        "W8A8 has no form there; allowed: none, W8A16_G32": (supernet_of("llama_tied", ["W8A8"]), None),
        "W4A16_G128 has no form": (supernet_of("llama_tied", ["W4A16"]), None),
        "found a sliding window": (supernet_of("mistral"), None),
        "found a vit; allowed: language models of llama": (vit, None),
    }.items():
        supernet, wanted = given
        with pytest.raises(JointoptError, match=match):
            jointopt.export(
                supernet, supernet.space.smallest if wanted is None else wanted, tmp_path / "out", target="gguf"
            )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("space", "match"),
    [
        ("{mlp: [0.5, 1.0]}", r"space\.mlp with target gguf.*allowed: depth"),
        ("{preset: llama}", r"space\.preset llama with target gguf"),
        ("{schemes: [none, W8A8]}", r"target gguf: W8A8 has no form there"),
        ("{caches: [INT8]}", r"space\.caches with target gguf"),
    ],
)
def test_a_space_that_gguf_has_no_place_for_is_refused_at_once(space, match, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model: ./llama\ntask: causal-lm\ndata: {{calibrate: a.txt, evaluate: b.txt}}\nspace: {space}\n"
        "target: gguf\noutput: runs/x\n"
    )
    with pytest.raises(JointoptError, match=match):
        load_config(path)


def test_a_space_that_says_nothing_is_narrowed_to_the_target(tmp_path: Path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: ./llama\ntask: causal-lm\ndata: {calibrate: a.txt, evaluate: b.txt}\ntarget: gguf\noutput: runs/x\n"
    )
    options = load_config(path).space_options()
    space = SearchSpace.for_model(make("llama_tied"), **options)
    assert {choice for gene in space.genes for choice in gene.choices} == set(SCHEMES)
