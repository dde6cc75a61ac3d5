"""Parameters, bytes, MACs and BOPs of sub-networks: those of the models that they are, counted one by one."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from jointopt import JointoptError, SearchSpace, Supernet
from jointopt.batches import lengths, of_average_length
from tests.zoo import MODELS, RELATIVES, SCHEMES, batches, make, supernet_of, unquantized


@pytest.fixture(scope="module", params=[*MODELS, *RELATIVES])
def named(request) -> tuple[str, Supernet]:
    return request.param, supernet_of(request.param, SCHEMES)


def test_parameters_and_bytes_are_those_of_the_extracted_model(named):
    name, supernet = named
    for genome in supernet.space.sample(4, seed=1):
        costs = supernet.costs(genome)
        model = supernet.extract(unquantized(supernet, genome))
        assert costs["parameters"] == sum(p.numel() for p in model.parameters())
        plain = supernet.costs(unquantized(supernet, genome))
        stored = {id(t): t for t in [*model.parameters(), *persistent_buffers(model)]}
        assert plain["size"] == sum(t.numel() * t.element_size() for t in stored.values())


def persistent_buffers(model: nn.Module) -> list[torch.Tensor]:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return [tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in parameters]


def test_macs_are_half_the_counted_operations_of_a_forward_pass(named):
    name, supernet = named
    tokens = [length for batch in batches(name) for length in lengths(batch)]
    batch = of_average_length(batches(name)[0], tokens)
    for genome in [supernet.space.largest, *supernet.space.sample(3, seed=2)]:
        model = supernet.extract(unquantized(supernet, genome))
        if hasattr(model, "set_attn_implementation"):
            model.set_attn_implementation("eager")
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch)
        rotary = 2 * 16 * 16 if "num_key_value_heads" in repr(getattr(model, "config", "")) else 0
        counted = counter.get_total_flops() / 2
        samples = len(next(iter(batch.values())))
        assert abs(counted - samples * supernet.costs(genome)["macs"]) <= samples * rotary


def test_macs_of_texts_are_those_of_a_text_of_average_length_in_whichever_batches_they_come():
    ids, mask = torch.full((4, 12), 7), torch.zeros(4, 12, dtype=torch.long)
    for row, length in enumerate((2, 4, 6, 12)):
        mask[row, :length] = 1
    counted = []
    for sizes in ([4], [1, 1, 1, 1], [2, 2]):
        supernet = Supernet(make("bert"), SearchSpace.for_model(make("bert"), schemes=["none", "W8A8"], preset="fixed"))
        parts = zip(ids.split(sizes), mask.split(sizes), strict=True)
        supernet.calibrate(
            [{"input_ids": each[:, : m.sum(1).max()], "attention_mask": m[:, : m.sum(1).max()]} for each, m in parts]
        )
        counted.append(supernet.original_costs()["macs"])
    whole = Supernet(make("bert"), SearchSpace.for_model(make("bert"), schemes=["none", "W8A8"], preset="fixed"))
    whole.calibrate([{"input_ids": ids[:1, :6], "attention_mask": torch.ones(1, 6, dtype=torch.long)}])
    assert counted == [whole.original_costs()["macs"]] * 3


@pytest.mark.parametrize("given", ["input_ids", "inputs_embeds"])
def test_macs_of_texts_without_a_mask_are_those_with_one_of_ones(given):
    costs = []
    for masked in (False, True):
        supernet = supernet_of("llama_tied", ["none", "W8A8"], preset="fixed")
        size = supernet.model.config.hidden_size
        texts: list[dict] = []
        for length in (4, 30, 28, 31, 29):
            ids = torch.full((1, length), 7)
            values = ids if given == "input_ids" else torch.ones(1, length, size)
            texts.append({given: values, **({"attention_mask": torch.ones_like(ids)} if masked else {})})
        supernet.calibrate(texts)
        costs.append(supernet.costs(supernet.space.largest))
    assert costs[0] == costs[1]


def test_positions_that_all_texts_have_in_common_are_cut_with_them():
    ids, mask = torch.full((2, 8), 7), torch.ones(2, 8, dtype=torch.long)
    mask[1, 4:] = 0
    macs = []
    for positions in ({}, {"position_ids": torch.arange(8)[None]}):
        supernet = supernet_of("llama_tied", ["none", "W8A8"], preset="fixed")
        supernet.calibrate([{"input_ids": ids, "attention_mask": mask, **positions}])
        macs.append(supernet.costs(supernet.space.largest)["macs"])
    assert macs[0] == macs[1]


@pytest.mark.parametrize(("name", "bits"), [("W8A8", 8 * 8), ("W4A16", 4 * 32), ("W4A8", 4 * 8), ("MXFP4", 4 * 4)])
def test_bops_are_macs_times_the_bits_of_weights_and_activations(name, bits):
    supernet = supernet_of("vit", schemes=["none", name], preset="fixed")
    whole = supernet.costs(unquantized(supernet, supernet.space.largest))
    assert whole["bops"] == whole["macs"] * 32 * 32
    layers = supernet.plan(supernet.space.smallest).schemes
    assert len(layers) >= 3 * 6
    for part in supernet.breakdown(supernet.space.smallest):
        quantized = part["path"] in layers and part["kind"] != "attention"  # its products are of floats
        assert part["bops"] == part["macs"] * (bits if quantized else 32 * 32)


def test_costs_are_those_of_one_genome_alone():
    supernet = supernet_of("vit")
    for told in (supernet.costs, supernet.breakdown):
        with pytest.raises(JointoptError, match=r"found shape \(3, \d+\); allowed: \(\d+,\), one genome"):
            told(supernet.space.sample(3, seed=0))


def test_costs_of_many_genomes_are_those_of_each(named):
    _, supernet = named
    genomes = supernet.space.sample(5, seed=4)
    columns = supernet.cost_columns(genomes)
    for row, genome in enumerate(genomes):
        assert supernet.costs(genome) == {measure: values[row] for measure, values in columns.items()}
