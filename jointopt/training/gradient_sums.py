"""The gradients of sub-networks, summed as they come: each sub-network's are of slices of the parameters, or of a few
words of an embedding, and take no more memory and time than that."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from jointopt.batches import Batch

Leaf = tuple[Tensor, int]
"""A tensor that gets a gradient of its own, and the place of the parameter to whose leading block it is added."""


class GradientSums:
    """For each of `parameters` the sum of its gradients, in `gradients`; None where there was none."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = parameters
        self.gradients: list[Tensor | None] = [None] * len(parameters)
        self._places = {id(each): at for at, each in enumerate(parameters)}

    def leaves_of(self, view: nn.Module, batch: Batch) -> list[Leaf]:
        """Puts leaves in the place of parameters of which the training view, on this batch, reads parts alone."""
        modules = list(view.modules())
        return self._slices(modules) + self._words(modules, batch)

    def add(self, loss: Tensor, leaves: Sequence[Leaf]) -> None:
        """Adds the gradients of a loss of the view that these leaves are of."""
        if not loss.requires_grad:  # what is trained is not in this sub-network
            return
        whole = len(self.parameters)
        wanted = [*self.parameters, *(leaf for leaf, _ in leaves)]
        found = _in_memory_of_their_own(torch.autograd.grad(loss, wanted, allow_unused=True))
        for at, new in enumerate(found[:whole]):
            self.gradients[at] = _sum(self.gradients[at], new, self.parameters[at])
        for (leaf, at), new in zip(leaves, found[whole:], strict=True):
            held = self.gradients[at]
            if held is None:
                held = self.gradients[at] = torch.zeros_like(self.parameters[at])
            if new is not None:
                held[tuple(map(slice, leaf.shape))].add_(new)

    def _slices(self, modules: Sequence[nn.Module]) -> list[Leaf]:
        """Detaches slices of parameters: autograd would fill up their gradients with zeros to the whole size."""
        found = []
        for module in modules:
            for name, part in module.__dict__.items():
                if type(part) is Tensor and part._is_view() and id(part._base) in self._places:
                    module.__dict__[name] = leaf = part.detach().requires_grad_()
                    found.append((leaf, self._places[id(part._base)]))
        return found

    def _words(self, modules: Sequence[nn.Module], batch: Batch) -> list[Leaf]:
        """Likewise the weights of embeddings of which a batch has few words, whose gradients hold these words alone:
        dense ones would be filled with zeros for each sub-network, and a tied head's would be copied to add them."""
        inputs = [each for each in batch.values() if isinstance(each, Tensor) and not each.is_floating_point()]
        words = max((each.numel() for each in inputs), default=0)
        found = []
        for module in modules:
            if type(module) is nn.Embedding and module.num_embeddings > words and not module.scale_grad_by_freq:
                weight = module.weight
                known = weight.is_leaf and id(weight) in self._places
                if known and weight.device.type in ("cpu", "cuda"):
                    del module._parameters["weight"]
                    leaf = weight.detach().requires_grad_()
                    module.__dict__.update(sparse=True, weight=leaf)
                    found.append((leaf, self._places[id(weight)]))
        return found


def _sum(held: Tensor | None, new: Tensor | None, whole: Tensor) -> Tensor | None:
    """Of gradients of `whole`, dense whatever they are, in the memory of the first."""
    if new is None or (held is None and not new.is_sparse):
        return held if new is None else new
    return (torch.zeros_like(whole) if held is None else held).add_(new)


def _in_memory_of_their_own(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What may be added to in place: autograd gives views of one tensor where parameters were added to each other."""
    taken: set[int] = set()
    found = []
    for each in gradients:
        if each is not None and each.is_sparse:
            each = each.coalesce()  # the same bits in whichever order a device would add up repeated rows
        elif each is not None:
            storage = each.untyped_storage()
            if storage.data_ptr() in taken or storage.nbytes() != each.numel() * each.element_size():
                each = each.clone()
            taken.add(storage.data_ptr())
        found.append(each)
    return found
