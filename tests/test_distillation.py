"""Soft labels: divergence and gradient are those of the formula in higher precision, however rows are grouped."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from jointopt.outputs import MULTI_LABEL, REGRESSION
from jointopt.supernet.subnetwork import Plan
from jointopt.training.distillation import (
    Distillation,
    ModelOutputs,
    loss_of,
    model_outputs,
    soft_labels,
    teacher_outputs,
)
from search_spaces.family import Block, Branch, Family, Part, Width
from search_spaces.stand_ins import SkipBranch


def formula(student: Tensor, teacher: Tensor, weights: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(loss, its gradient) in double precision by torch's own operations."""
    own = student.detach().double().requires_grad_()
    logs = (each / temperature for each in (own, teacher.double()))
    own_logs, teacher_logs = (each.log_softmax(-1) for each in logs)
    rows = nn.functional.kl_div(own_logs, teacher_logs, reduction="none", log_target=True).sum(-1)
    loss = temperature**2 * (rows * weights.double()).sum() / weights.double().sum()
    loss.backward()
    assert own.grad is not None
    return loss.detach(), own.grad


def logits(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def check(student: Tensor, teacher: Tensor, mask: Tensor | None, weights: Tensor, temperature: float) -> None:
    student = student.requires_grad_()
    loss = soft_labels(student, teacher, mask, temperature)
    (3 * loss).backward()
    expected, gradient = formula(student, teacher, weights, temperature)
    assert student.grad is not None
    # Terms of a row cancel, and are then multiplied by the temperature's square.
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6 * max(1.0, temperature**2))
    torch.testing.assert_close(student.grad.double(), 3 * gradient, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        assert soft_labels(student, teacher, mask, temperature) == loss


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), classes=st.integers(2, 300), temperature=st.floats(0.3, 5.0), seed=st.integers(0, 2**16))
def test_soft_labels_of_samples(rows, classes, temperature, seed):
    student, teacher = logits(rows, classes, seed=seed), logits(rows, classes, seed=seed + 1)
    check(student, teacher, None, torch.ones(rows), temperature)


def test_soft_labels_of_a_vocabulary_whose_rows_go_in_groups():
    student, teacher = logits(2, 3, 100_000, seed=0), logits(2, 3, 100_000, seed=1)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    check(student, teacher, mask, mask, 2.0)
    check(student.detach(), teacher, None, torch.ones(2, 3), 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gradient_comes_in_the_type_of_its_logits(dtype):
    student, teacher = logits(4, 50, seed=0).to(dtype), logits(4, 50, seed=1).to(dtype)
    student.requires_grad_()
    loss = soft_labels(student, teacher)
    loss.backward()
    expected, gradient = formula(student, teacher, torch.ones(4), 1.0)
    assert loss.dtype == torch.float32 and student.grad is not None and student.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(student.grad.double(), gradient, rtol=2**-7, atol=1e-4)


def test_a_student_like_its_teacher_has_nothing_to_learn():
    student = logits(5, 7, seed=0).requires_grad_()
    loss = soft_labels(student, student.detach())
    loss.backward()
    assert abs(float(loss)) < 1e-6 and student.grad is not None and student.grad.abs().max() < 1e-6


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 9), classes=st.integers(1, 40), temperature=st.floats(0.3, 5.0), seed=st.integers(0, 2**16))
def test_of_several_classes_at_once_each_is_a_choice_of_two(rows, classes, temperature, seed):
    student, teacher = logits(rows, classes, seed=seed).requires_grad_(), logits(rows, classes, seed=seed + 1)
    mask = torch.ones(rows, classes, dtype=torch.long).tril()  # of as many tokens, which are not classes
    loss = soft_labels(student, teacher, mask, temperature, MULTI_LABEL)
    right, own = (torch.distributions.Bernoulli(logits=z.double() / temperature) for z in (teacher, student))
    expected = temperature**2 * torch.distributions.kl_divergence(right, own).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6 * max(1.0, temperature**2))
    gradient = torch.autograd.grad(loss, student)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, student)[0].float(), rtol=1e-4, atol=1e-6)


def test_of_a_regression_the_values_are_learned():
    student, teacher = logits(5, 1, seed=0), logits(5, 1, seed=1)
    assert soft_labels(student, teacher, problem=REGRESSION) == (student - teacher).square().mean()


def compared(distillation: Distillation, own: ModelOutputs, other: ModelOutputs, mask: Tensor | None) -> float:
    """What `distillation` adds to the divergence of the logits."""
    batch = {} if mask is None else {"attention_mask": mask}
    teacher = teacher_outputs(other, 1.0, None)
    losses = [loss_of(own, teacher, batch, each, None) for each in (distillation, Distillation())]
    return float(losses[0] - losses[1])


MASKS = [None, torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])]


@pytest.mark.parametrize("mask", MASKS, ids=["whole", "masked"])
def test_hidden_states_differ_by_their_mean_square_relative_to_the_teachers(mask):
    """Averaged over the blocks that both have, of tokens that are no padding."""
    both = [logits(2, 4, 6, seed=seed) for seed in range(2)]
    students, teachers = ({name: (1 + shift) * each for name, each in zip("ab", both, strict=True)} for shift in (1, 0))
    students["a"] = both[0] + logits(2, 4, 6, seed=2)
    own = ModelOutputs(logits(2, 3, seed=3), {**students, "gone": both[0]})
    found = compared(Distillation(hidden=5.0), own, ModelOutputs(logits(2, 3, seed=4), teachers), mask)
    kept = torch.ones(2, 4, dtype=torch.bool) if mask is None else mask.bool()
    each = [
        ((students[name] - teachers[name])[kept].square().mean() / teachers[name][kept].square().mean()).item()
        for name in "ab"
    ]
    assert each[1] == pytest.approx(1) and found == pytest.approx(5 * sum(each) / 2, rel=1e-5)


@pytest.mark.parametrize("mask", MASKS, ids=["whole", "masked"])
def test_attention_differs_by_the_divergence_of_its_relations_over_tokens_that_are_no_padding(mask):
    """MiniLMv2's, for any two widths: softmax(x x^T / sqrt(channels)) of queries, keys and values."""
    widths = [(6, 8), (3, 4), (3, 4)]
    of_student, of_teacher = ([logits(2, 4, w[at], seed=w[at] + at) for w in widths] for at in range(2))
    own, other = ModelOutputs(logits(2, 3, seed=3), attention=of_student), ModelOutputs(logits(2, 3, seed=4))
    other.attention = of_teacher
    found = compared(Distillation(attention=2.0), own, other, mask)
    lengths, expected = [4, 4] if mask is None else mask.sum(1).tolist(), []
    for pair in zip(of_student, of_teacher, strict=True):
        rows = []
        for sample, length in enumerate(lengths):
            parts = (each[sample, :length].double() for each in pair)
            scores = [(x @ x.T / x.shape[1] ** 0.5).softmax(-1) for x in parts]
            rows.append((scores[1] * (scores[1] / scores[0]).log()).sum(-1))
        expected.append(torch.cat(rows).mean().item())
    assert found == pytest.approx(2 * sum(expected) / 3, rel=1e-4)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.mixer, self.out = SkipBranch(), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mixer(x + self.mix(x)))


def test_attention_stays_where_a_branch_of_a_like_name_left():
    attention = Width("block0.heads", "heads", 6, (Part("0.mixer"),), (Part("0.out"),), block="block0", attention=True)
    block = Block("block0", "0", branches=(Branch("mlp", {"0.mix": SkipBranch}),))
    plan = Plan((block,), block.branches)
    found = model_outputs(
        nn.Sequential(Mixed()),
        {"input": torch.ones(2, 4)},
        Family("own", (block,), (attention,), ()),
        plan,
        Distillation(attention=1.0),
    )
    assert [each.shape for each in found.attention] == [(2, 6)]
