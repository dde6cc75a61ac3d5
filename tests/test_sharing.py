"""Shared evaluation: what one by one gives, to the bit, whatever the quality function does with the model."""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from jointopt import Supernet
from jointopt.evaluation.evaluation import evaluate
from jointopt.evaluation.sharing import (
    HiddenStates,
    SharedEvaluator,
    block_signatures,
    can_share,
    evaluation_order,
    parts_of,
)
from search_spaces.clones import structural_clone
from tests import zoo
from tests.zoo import batches, logits

SEQUENTIAL = (
    "vit",
    "timm_vit",
    "deit",
    "bert",
    "roberta",
    "electra",
    "distilbert",
    "llama_tied",
    "llama_untied",
    "mistral",
    "qwen2",
    "qwen3",
)


@cache
def supernet_of(name: str) -> Supernet:
    caches = {"caches": ["none", "INT8", "INT4"]} if name.startswith("llama") else {}
    return zoo.supernet_of(name, ["none", "W8A8", "W4A16", "FP8"], **caches)


def relatives(supernet: Supernet, count: int = 10, seed: int = 0) -> np.ndarray:
    """Genomes that differ from one another in a few genes, some in those of the first block, one of them twice."""
    space, random = supernet.space, np.random.default_rng(seed)
    genomes = [space.sample(1, seed)[0], space.largest]
    while len(genomes) < count - 1:
        genome = genomes[random.integers(len(genomes))].copy()
        for gene in random.choice(len(space), 2):
            genome[gene] = random.integers(space.sizes[gene])
        genomes.append(space.canonical(genome))
    return np.array([*genomes, genomes[0]])


def bits(tensor: Tensor) -> int:
    return zlib.crc32(tensor.detach().float().contiguous().numpy().tobytes())


def scored(name: str) -> Callable[[nn.Module], dict[str, float]]:
    """All bits of the logits of two batches."""
    given = batches(name, seed=1)
    return lambda model: {f"batch{n}": bits(logits(model, batch)) for n, batch in enumerate(given)}


def one_by_one(supernet: Supernet, genomes: np.ndarray, quality) -> list[tuple]:
    found = [evaluate(supernet, genome, quality) for genome in genomes]
    return [(each.metrics, each.failed) for each in found]


def shared(supernet: Supernet, genomes: np.ndarray, quality, **options) -> list[tuple]:
    found = dict(SharedEvaluator(supernet, quality, **options).evaluate(genomes))
    return [(found[index].metrics, found[index].failed) for index in range(len(genomes))]


@pytest.fixture
def block_runs(monkeypatch) -> Callable[[Supernet], list[int]]:
    """Counts how often any block of a super-network's class is really run."""

    def counted(supernet: Supernet) -> list[int]:
        runs = [0]
        kind = type(supernet.model.get_submodule(supernet.family.blocks[0].path))
        forward = kind.forward

        def counting(self, *args, **kwargs):
            runs[0] += 1
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", counting)
        return runs

    return counted


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_shared_results_are_those_of_one_by_one_to_the_bit_and_each_prefix_is_run_once(name, block_runs):
    supernet = supernet_of(name)
    genomes = relatives(supernet)
    expected = one_by_one(supernet, genomes, scored(name))
    runs = block_runs(supernet)
    assert shared(supernet, genomes, scored(name)) == expected
    prefixes = [block_signatures(supernet.family, supernet.plan(genome)) for genome in genomes]
    distinct = {prefix[:depth] for prefix in prefixes for depth in range(1, len(prefix) + 1)}
    assert runs[0] == 2 * len(distinct) < 2 * sum(map(len, prefixes))


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_genomes_with_the_same_genes_in_the_first_parts_have_the_same_first_blocks(name):
    supernet = supernet_of(name)
    genomes, parts, names = relatives(supernet, 40), parts_of(supernet), [b.name for b in supernet.family.blocks]
    assert len(parts) == 1 + len(names)
    chosen = np.where(supernet.space.active(genomes), genomes, -1)
    plans = [supernet.plan(genome) for genome in genomes]
    signatures = [block_signatures(supernet.family, plan) for plan in plans]
    agreed = 0
    for one, other in itertools.combinations(range(len(genomes)), 2):
        differ = [at for at, part in enumerate(parts) if (chosen[one, part] != chosen[other, part]).any()]
        alike = names[: min(differ, default=len(parts)) - 1] if 0 not in differ else []
        first, second = (
            [found for block, found in zip(plans[at].blocks, signatures[at], strict=True) if block.name in alike]
            for at in (one, other)
        )
        assert first == second
        agreed += len(first)
    assert agreed > 0


@pytest.mark.parametrize("name", ["resnet", "timm_resnet"])
def test_a_family_whose_statistics_are_estimated_anew_is_evaluated_plainly(name):
    supernet = supernet_of(name)
    genomes = relatives(supernet, 4)
    assert not can_share(supernet) and not parts_of(supernet)
    assert evaluation_order(supernet, genomes).tolist() == [0, 1, 2, 3]
    assert shared(supernet, genomes, scored(name)) == one_by_one(supernet, genomes, scored(name))


@settings(max_examples=20, deadline=None)
@given(limit=st.integers(0, 300_000), seed=st.integers(0, 3))
def test_whatever_the_memory_the_results_are_the_same_and_it_is_kept_to(limit, seed):
    supernet = supernet_of("vit")
    genomes = relatives(supernet, 6, seed)
    most = []
    original = HiddenStates.put

    def watched(self, *args):
        original(self, *args)
        most.append(self.nbytes)
        assert self.nbytes == sum(state.nbytes for state in self._held.values()) <= limit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HiddenStates, "put", watched)
        found = shared(supernet, genomes, scored("vit"), memory_bytes=limit)
    assert most and found == one_by_one(supernet, genomes, scored("vit"))


def test_nothing_is_held_when_the_last_genome_has_been_evaluated(monkeypatch):
    supernet = supernet_of("bert")
    made = []
    monkeypatch.setattr(HiddenStates, "__init__", _noted(HiddenStates.__init__, made))
    list(SharedEvaluator(supernet, scored("bert")).evaluate(relatives(supernet)))
    assert [(held.nbytes, held._held) for held in made] == [(0, {})]


def _noted(function, made: list):
    def noting(self, *args):
        made.append(self)
        function(self, *args)

    return noting


@settings(max_examples=30, deadline=None)
@given(kept=st.permutations(range(10)), count=st.integers(1, 10))
def test_some_genomes_come_in_the_order_they_have_among_all(kept, count):
    supernet = supernet_of("bert")
    genomes = np.unique(relatives(supernet), axis=0)
    kept = [index for index in kept if index < len(genomes)][:count]
    whole = [genomes[index].tobytes() for index in evaluation_order(supernet, genomes)]
    part = [genomes[kept][index].tobytes() for index in evaluation_order(supernet, genomes[kept])]
    assert part == [genome for genome in whole if genome in set(part)]


BATCH = batches("llama_tied", seed=1)[0]


def with_hooks(model: nn.Module) -> float:
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: seen.append(bits(output)))
    found = logits(model, BATCH)
    handle.remove()
    return sum(seen) + bits(found)


def with_hidden_states(model: nn.Module) -> float:
    output = model(**BATCH, output_hidden_states=True)
    return sum(map(bits, output.hidden_states)) + bits(logits(model, BATCH))


def with_generation(model: nn.Module) -> float:
    made = model.generate(BATCH["input_ids"], max_new_tokens=3, do_sample=False, pad_token_id=0)
    return int(made.sum()) + bits(logits(model, BATCH))


def with_the_cache_of_a_call(model: nn.Module) -> float:
    first = model(**BATCH)
    return bits(model(input_ids=BATCH["input_ids"][:, :1], past_key_values=first.past_key_values).logits)


def with_a_cache_that_is_missed_in_silence(model: nn.Module) -> float:
    first = model(**BATCH)
    try:
        return bits(first.past_key_values.layers[0].keys)
    except Exception:
        return 0.0


def with_a_cache_of_its_own(model: nn.Module) -> float:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    model(**BATCH, past_key_values=cache)
    return bits(model(input_ids=BATCH["input_ids"][:, :1], past_key_values=cache).logits)


def with_autocast(model: nn.Module) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        first = bits(logits(model, BATCH))
    return first + bits(logits(model, BATCH))


def with_inference_mode(model: nn.Module) -> float:
    with torch.inference_mode():
        first = bits(model(**BATCH).logits)
    return first + bits(logits(model, BATCH))


def with_gradients(model: nn.Module) -> float:
    embedded = model.get_input_embeddings()(BATCH["input_ids"]).detach().requires_grad_()
    with torch.enable_grad():
        model(inputs_embeds=embedded).logits.sum().backward()
    return bits(embedded.grad) + bits(logits(model, BATCH))


def with_a_copy(model: nn.Module) -> float:
    copied = copy.deepcopy(model)
    first = bits(logits(copied, BATCH))
    for block in copied.model.layers:
        block.input_layernorm.weight = nn.Parameter(block.input_layernorm.weight * 2)
    return first + bits(logits(copied, BATCH)) + bits(logits(model, BATCH))


def with_a_clone_of_its_modules(model: nn.Module) -> float:
    clone = structural_clone(model)
    clone.model.layers[0].mlp = nn.Identity()
    return bits(logits(clone, BATCH)) + bits(logits(model, BATCH))


def with_a_copy_in_half_precision(model: nn.Module) -> float:
    return bits(logits(copy.deepcopy(model).to(torch.bfloat16), BATCH)) + bits(logits(model, BATCH))


def with_changed_weights(model: nn.Module) -> float:
    first = bits(logits(model, BATCH))
    layer = model.model.layers[0].input_layernorm
    layer.weight = nn.Parameter(layer.weight * 2)
    return first + bits(logits(model, BATCH))


def with_an_exchanged_module(model: nn.Module) -> float:
    first = bits(logits(model, BATCH))
    model.model.layers[0].mlp = nn.Identity()
    return first + bits(logits(model, BATCH))


def with_a_buffer_that_is_written_again(model: nn.Module) -> float:
    buffer = np.zeros((6, 16), dtype=np.int64)
    given, total = torch.from_numpy(buffer), 0
    for batch in batches("llama_tied", seed=3):
        buffer[:] = batch["input_ids"].numpy()
        total += bits(logits(model, {"input_ids": given}))
    return total


def with_outputs_that_are_written_to(model: nn.Module) -> float:
    total = 0
    for _ in range(2):
        hidden = model.model(**BATCH).last_hidden_state
        found = logits(model, BATCH)
        total += bits(hidden) + bits(found)
        hidden.zero_(), found.zero_()
    return total


def with_parts_of_the_model(model: nn.Module) -> float:
    hidden = model.get_input_embeddings()(BATCH["input_ids"])
    positions = torch.arange(16)[None]
    embedded = model.model.rotary_emb(hidden, positions)
    return bits(model.model.layers[0](hidden, position_embeddings=embedded)) + bits(logits(model, BATCH))


def with_another_thread(model: nn.Module) -> float:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: bits(logits(model, BATCH))).result() + bits(logits(model, BATCH))


def with_tuples(model: nn.Module) -> float:
    first, *_ = model(**BATCH, return_dict=False)
    return bits(first)


def with_other_attention(model: nn.Module) -> float:
    first = bits(logits(model, BATCH))
    mask = torch.ones(6, 16, dtype=torch.long)
    mask[:, :4] = 0
    return first + bits(logits(model, {**BATCH, "attention_mask": mask}))


def with_other_settings(model: nn.Module) -> float:
    first = bits(logits(model, BATCH))
    block = model.model.layers[0]
    block.self_attn.scaling *= 2
    second = bits(logits(model, BATCH))
    block.post_attention_layernorm.variance_epsilon = 1.0
    return first + second + bits(logits(model, BATCH))


def with_a_forward_of_its_own(model: nn.Module) -> float:
    first, mlp = bits(logits(model, BATCH)), model.model.layers[0].mlp
    before = mlp.forward
    mlp.forward = lambda x: before(x) * 0.5
    return first + bits(logits(model, BATCH))


def with_one_kernel_of_attention(model: nn.Module) -> float:
    with sdpa_kernel(SDPBackend.MATH):
        first = bits(logits(model, BATCH))
    return first + bits(logits(model, BATCH))


class Counting(TorchDispatchMode):
    """How many operations ran."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += 1
        return operation(*args, **(kwargs or {}))


def with_counted_operations(model: nn.Module) -> float:
    with Counting() as counting:
        first = bits(logits(model, BATCH))
    return first + counting.count + bits(logits(model, BATCH))


class Doubling(TorchFunctionMode):
    """Makes something else of an activation function."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        return found * 2 if function is nn.functional.silu else found


def with_an_exchanged_function(model: nn.Module) -> float:
    with Doubling():
        first = bits(logits(model, BATCH))
    return first + bits(logits(model, BATCH))


def with_a_profiler(model: nn.Module) -> float:
    with torch.autograd.profiler.profile() as profiler:
        first = bits(logits(model, BATCH))
    multiplied = sum(event.count for event in profiler.key_averages() if "mm" in event.key)
    return first + multiplied + bits(logits(model, BATCH))


QUALITIES = [value for name, value in list(globals().items()) if name.startswith("with_")]


@pytest.mark.parametrize("quality", QUALITIES, ids=lambda quality: quality.__name__)
def test_whatever_the_quality_function_does_it_finds_what_it_would_one_by_one(quality):
    supernet = supernet_of("llama_tied")
    genomes = relatives(supernet, 6)
    expected = one_by_one(supernet, genomes, quality)
    assert all(failed is None for _, failed in expected)
    assert shared(supernet, genomes, quality) == expected


def test_a_failure_has_its_own_reason():
    supernet = supernet_of("vit")
    genomes = relatives(supernet, 6)

    def quality(model: nn.Module) -> float:
        logits(model, batches("vit")[0])
        raise ValueError(f"{len(model.vit.layers)} blocks")

    found = shared(supernet, genomes, quality)
    assert found == one_by_one(supernet, genomes, quality) and found[0][1].startswith("ValueError: ")


def test_what_memory_is_held_for_sharing_fails_no_evaluation(monkeypatch):
    supernet, held = supernet_of("vit"), []

    def noted(self: HiddenStates, *arguments: Any) -> None:
        begin(self, *arguments)
        held.append(self)

    def quality(model: nn.Module) -> float:
        found = logits(model, batches("vit")[0]).sum().item()
        if held and held[-1].nbytes:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    begin = HiddenStates.__init__
    monkeypatch.setattr(HiddenStates, "__init__", noted)
    genomes = relatives(supernet, 6)
    found = shared(supernet, genomes, quality)
    assert held and all(failed is None for _, failed in found)


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_what_memory_quantized_weights_of_others_take_fails_no_evaluation_either(name):
    supernet = supernet_of(name)
    genomes = relatives(supernet, 6)
    needed = []
    for genome in genomes:
        supernet.make_room()
        supernet.view(supernet.plan(genome))
        needed.append(supernet._bank.nbytes)

    def quality(model: nn.Module) -> float:
        found = logits(model, batches(name)[0]).sum().item()
        if supernet._bank.nbytes > max(needed):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    found = shared(supernet, genomes, quality)
    assert all(failed is None for _, failed in found)


def test_sharing_leaves_the_super_network_as_it_was():
    supernet = supernet_of("bert")
    before = supernet.fingerprint()
    shared(supernet, relatives(supernet), scored("bert"))
    assert supernet.fingerprint() == before
    assert not any("_shared" in module.__dict__ for module in supernet.model.modules())


def test_genomes_that_differ_before_the_first_block_share_nothing():
    supernet = supernet_of("bert")
    space = supernet.space
    chosen = space.decode(space.largest)
    genomes = np.array([space.encode({**chosen, "embedding.precision": each}) for each in ("none", "W4A16")])
    found = shared(supernet, genomes, scored("bert"))
    assert found == one_by_one(supernet, genomes, scored("bert")) and found[0] != found[1]


def test_what_is_held_does_not_change_with_what_is_done_to_the_tensors():
    held = HiddenStates(100, [("a",), ("a",)])
    given = torch.ones(2)
    held.put(b"", ("a",), given)
    given.zero_()
    held.get(b"", ("a",)).zero_()
    assert held.get(b"", ("a",)).tolist() == [1, 1]


def test_beyond_the_memory_what_saves_most_is_held():
    held = HiddenStates(8, [("a", "b"), ("a", "b"), ("a", "c"), ("d",)])
    held.put(b"", ("d",), torch.ones(2))
    held.put(b"", ("a",), torch.ones(2))
    assert held.deepest(b"", ("d",)) == 0 and held.deepest(b"", ("a", "b")) == 1
    held.put(b"", ("a", "b"), torch.ones(2))
    held.put(b"", ("a", "c"), torch.ones(2))
    assert held.deepest(b"", ("a", "b")) == 2 and held.deepest(b"", ("a", "c")) == 0
