"""The gradients' estimate of what each choice costs, against real changes, one at a time; and what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet
from jointopt.sensitivity import estimated_losses, quality_prior
from tests import zoo

TRANSFORMERS = {"keep": True, "heads": [0.5, 1.0], "mlp": [0.5, 1.0], "attention_keep": True, "mlp_keep": True}
CONVOLUTIONS = {"depth": [0.5, 1.0], "bottleneck": [0.5, 1.0], "stage": [0.75, 1.0]}
CACHES = ["none", "INT8", "INT4", "FP4", "X_INT8", "X_INT4"]


def prepared(name: str, dtype: torch.dtype = torch.float32, schemes=zoo.SCHEMES, **options) -> tuple[Supernet, list]:
    """A super-network and what it was calibrated with; BatchNorm's statistics are those of that data."""
    model, batches = zoo.make(name), zoo.batches(name, count=2, size=24)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
    if norms:
        model.train()
        for batch in batches:
            zoo.logits(model, batch)
    model.eval().to(dtype)
    batches = [{k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]
    elastic = CONVOLUTIONS if norms else TRANSFORMERS
    caches = {"caches": CACHES} if "llama" in name or name == "qwen3" else {}
    space = SearchSpace.for_model(model, schemes=schemes, **elastic, **caches)
    supernet = Supernet(model, space, **options)
    supernet.calibrate(batches)
    return supernet, batches


def divergence(supernet: Supernet, batches: list, genome: np.ndarray) -> float:
    """Real KL divergence from the largest, in nats a label."""
    total, labels = 0.0, 0
    with supernet.active(supernet.space.largest) as whole, supernet.active(genome) as changed:
        for batch in batches:
            reference, scores = (zoo.logits(model, batch).float().log_softmax(-1) for model in (whole, changed))
            each = nn.functional.kl_div(scores, reference, log_target=True, reduction="none").sum(-1)
            mask = batch.get("attention_mask")
            counted = each[mask.bool()] if mask is not None and mask.shape == each.shape else each.flatten()
            total, labels = total + float(counted.sum()), labels + len(counted)
    return total / labels


def single_changes(supernet: Supernet, most: int = 30) -> list[tuple[str, int, np.ndarray]]:
    """Gene, choice and genome of changes of one gene of the largest genome, drawn from all."""
    found = []
    for at, gene in enumerate(supernet.space.genes):
        for choice in range(len(gene.choices)):
            genome = supernet.space.largest
            if genome[at] != choice:
                genome[at] = choice
                found.append((gene.name, choice, genome))
    return [found[at] for at in np.random.default_rng(0).permutation(len(found))[:most]]


@pytest.mark.parametrize("name", [*zoo.MODELS, "mistral", "qwen2", "qwen3", "roberta", "timm_resnet_basic"])
def test_estimates_rank_the_real_losses_of_single_changes(name):
    supernet, batches = prepared(name, schemes=("none", "W8A8", "W4A16", "FP8_DYNAMIC", "NVFP4"))
    estimates = estimated_losses(supernet, batches)
    changes = single_changes(supernet)
    foreseen = [estimates[gene][choice] for gene, choice, _ in changes]
    real = [divergence(supernet, batches, genome) for _, _, genome in changes]
    assert spearmanr(foreseen, real)[0] > 0.95
    assert 0.5 < np.median(np.array(foreseen) / np.array(real)) < 2


@pytest.mark.parametrize("name", ["llama_tied", "timm_vit"])
def test_bfloat16_models_have_nearly_the_same_estimates(name):
    full, half = (
        np.concatenate(list(estimated_losses(*prepared(name, dtype)).values()))
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert np.isfinite(half).all()
    assert spearmanr(full, half)[0] > 0.97


def test_every_gene_has_an_array_and_the_whole_unquantized_choice_costs_nothing():
    supernet, batches = prepared("llama_tied")
    estimates = estimated_losses(supernet, batches)
    assert list(estimates) == list(supernet.space.names)
    for at, gene in enumerate(supernet.space.genes):
        assert estimates[gene.name].shape == (len(gene.choices),)
        assert estimates[gene.name][supernet.space.largest[at]] == 0
        assert (estimates[gene.name] >= 0).all() and estimates[gene.name].max() > 0


def test_a_tied_head_counts_with_its_embedding():
    tied, batches = prepared("llama_tied")
    losses = estimated_losses(tied, batches)["embedding.precision"]
    at = tied.space.names.index("embedding.precision")
    genome = tied.space.largest
    genome[at] = zoo.SCHEMES.index("W4A16")
    assert losses[genome[at]] == pytest.approx(divergence(tied, batches, genome), rel=0.5)


def test_repaired_widths_are_estimated_as_they_are_repaired():
    plain, batches = prepared("llama_untied")
    repaired, _ = prepared("llama_untied", repair=True)
    before, after = (estimated_losses(each, batches) for each in (plain, repaired))
    widths = [gene for gene in before if gene.endswith((".heads", ".mlp"))]
    assert sum(after[gene][0] for gene in widths) < 0.95 * sum(before[gene][0] for gene in widths)


def test_one_seed_gives_the_same_estimates_twice():
    supernet, batches = prepared("bert")
    first, second = (estimated_losses(supernet, batches, seed=3) for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)


def test_labels_in_the_batches_make_no_difference():
    supernet, batches = prepared("bert")
    labelled = [{**batch, "labels": torch.zeros(24, dtype=torch.long)} for batch in batches]
    without, with_labels = estimated_losses(supernet, batches), estimated_losses(supernet, labelled)
    assert all((without[name] == with_labels[name]).all() for name in without)


def test_padding_makes_no_difference():
    supernet, _ = prepared("llama_tied")
    ids = zoo.batches("llama_tied", size=1)[0]["input_ids"]
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.long)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, 9, dtype=torch.long)], 1)
    alone = estimated_losses(supernet, [{"input_ids": ids}])
    found = estimated_losses(supernet, [{"input_ids": padded, "attention_mask": mask}])
    for name, losses in alone.items():
        np.testing.assert_allclose(found[name], losses, rtol=1e-3, atol=1e-9, err_msg=name)


def state(supernet: Supernet) -> tuple:
    modules = dict(supernet.model.named_modules())
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks), m.training) for name, m in modules.items()}
    gradients = {name: (p.grad is None, p.requires_grad) for name, p in supernet.model.named_parameters()}
    return supernet.fingerprint(), hooks, gradients


@pytest.mark.parametrize("name", ["bert", "resnet", "llama_tied"])
def test_the_super_network_is_left_as_it_was(name):
    supernet, batches = prepared(name)
    supernet.model.train()
    before = state(supernet)
    with torch.no_grad():
        estimated_losses(supernet, batches)
    assert state(supernet) == before


def test_it_is_left_as_it_was_by_a_pass_that_fails_too():
    supernet, batches = prepared("bert")
    before = state(supernet)
    with pytest.raises(IndexError):
        estimated_losses(supernet, [{"input_ids": batches[0]["input_ids"] + 1000}])
    assert state(supernet) == before


def test_frozen_weights_are_no_obstacle():
    supernet, batches = prepared("timm_vit")
    trainable = estimated_losses(supernet, batches)
    supernet.model.requires_grad_(False)
    frozen = estimated_losses(supernet, batches)
    assert all(np.allclose(frozen[name], trainable[name]) for name in frozen)


def test_what_it_cannot_do_is_said():
    supernet, batches = prepared("bert")
    with pytest.raises(JointoptError, match="no batch"):
        estimated_losses(supernet, [])
    supernet.calibrated = False
    with pytest.raises(JointoptError, match="not calibrated"):
        estimated_losses(supernet, batches)


def test_a_prior_is_for_objectives_that_tell_quality():
    supernet, _ = prepared("timm_vit")
    objectives = [
        jointopt.Objective("accuracy", "max"),
        jointopt.Objective("latency", "min"),
        jointopt.Objective("size", "min", lambda genomes: np.zeros(len(genomes))),
    ]
    assert list(quality_prior(supernet, objectives)) == ["accuracy"]
    with pytest.raises(JointoptError, match="no objective tells quality"):
        quality_prior(supernet, objectives[1:])


def accuracy(model: nn.Module) -> dict[str, float]:
    return {"accuracy": float((zoo.logits(model, zoo.batches("bert")[0]).argmax(-1) == 0).float().mean())}


def test_a_search_with_a_warm_start_begins_elsewhere_and_goes_on_as_if_never_stopped(tmp_path):
    supernet, _ = prepared("bert", schemes=("none", "W8A8", "W4A16"))

    def genomes(evaluations: int, **options) -> list:
        study = jointopt.search(supernet, accuracy, ["accuracy", "size"], evaluations, batch=4, **options)
        found = study.evaluations()["genome"].tolist()
        study.close()
        return found

    whole = genomes(12, warm_start=True)
    genomes(2, warm_start=True, storage=tmp_path / "study.db")  # in the middle of a batch
    genomes(8, warm_start=True, storage=tmp_path / "study.db")
    assert genomes(12, warm_start=True, storage=tmp_path / "study.db") == whole
    assert genomes(12) != whole
    with pytest.raises(JointoptError, match="warm_start was true"):
        genomes(12, storage=tmp_path / "study.db")


def test_a_study_keeps_what_its_warm_start_was_told(tmp_path):
    supernet, _ = prepared("bert")
    options = {"evaluations": 2, "storage": tmp_path / "study.db", "warm_start": True}
    study = jointopt.search(supernet, accuracy, ["accuracy", "size"], **options)
    assert study.fact("prior") == {
        "accuracy": [each.tolist() for each in estimated_losses(supernet, supernet.samples).values()]
    }
    told = {"accuracy": [[0.5] * int(size) for size in supernet.space.sizes]}
    study.note("prior", told)
    study.close()
    again = jointopt.search(supernet, accuracy, ["accuracy", "size"], **options)
    assert again.fact("prior") == told


def test_a_warm_start_is_for_guided_alone():
    supernet, _ = prepared("bert")
    with pytest.raises(JointoptError, match="random strategy, which takes no estimates; allowed: guided"):
        jointopt.search(supernet, accuracy, ["accuracy"], 3, strategy="random", warm_start=True)


def test_a_warm_start_that_nothing_tells_quality_to_begins_no_study(tmp_path):
    supernet, _ = prepared("bert")
    with pytest.raises(JointoptError, match="warm_start: no objective tells quality"):
        jointopt.search(supernet, accuracy, ["size"], 3, storage=tmp_path / "study.db", warm_start=True)
    assert not (tmp_path / "study.db").exists()


def test_a_warm_start_that_fails_leaves_no_study_that_another_search_would_have_to_keep_to(tmp_path):
    model = zoo.make("bert")
    model.classifier = nn.Linear(model.config.hidden_size, 1)
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8"]))
    supernet.calibrate(zoo.batches("bert"))
    options = {"objectives": ["accuracy"], "evaluations": 3, "storage": tmp_path / "study.db"}
    with pytest.raises(JointoptError, match="single output"):
        jointopt.search(supernet, accuracy, **options, warm_start=True)
    assert not (tmp_path / "study.db").exists()
    assert len(jointopt.search(supernet, accuracy, **options)) == 3
    with pytest.raises(JointoptError, match="warm_start was null"):
        jointopt.search(supernet, accuracy, **options, warm_start=True)
    assert len(jointopt.Study.open(tmp_path / "study.db")) == 3
