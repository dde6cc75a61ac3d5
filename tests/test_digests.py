"""What the digest of tensors tells apart, and what it does not."""

from __future__ import annotations

import pytest
import torch

from jointopt.digests import digest_of

TENSOR = torch.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize(
    "other",
    [
        [{"a": TENSOR.clone().index_fill_(0, torch.tensor(2), 0.0)}],
        [{"b": TENSOR}],
        [{"a": TENSOR.reshape(4, 3)}],
        [{"a": TENSOR.view(torch.int32)}],
        [{"a": TENSOR}, {"a": TENSOR}],
        [{"a": TENSOR, "b": torch.empty(0, 4)}],
        [],
    ],
    ids=["a number", "a name", "a shape", "a type", "another group", "an empty tensor", "nothing"],
)
def test_another_content_has_another_digest(other):
    assert digest_of(other) != digest_of([{"a": TENSOR}])


def test_neither_strides_nor_the_order_of_names_matter():
    turned = {"b": torch.tensor(True), "a": TENSOR.T.contiguous().T.requires_grad_()}
    assert digest_of([turned]) == digest_of([{"a": TENSOR, "b": torch.tensor(True)}])
