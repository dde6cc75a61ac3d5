"""What tells a super-network from another, restores it from a file, or sends it to other processes."""

from __future__ import annotations

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from safetensors import safe_open
from torch import Tensor, nn

from jointopt.batches import on_device
from jointopt.digests import digest_of
from jointopt.files import reading, write_tensors, writing
from jointopt.names import LEARNED_RANGES
from jointopt.supernet.range_factors import INPUTS, LearnedRanges, settle
from quant.errors import JointoptError
from quant.formats import own_definition

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet


def fingerprint(supernet: Supernet) -> str:
    """See `Supernet.fingerprint`."""
    choices: list[Any] = [
        supernet.space.to_dict(),
        supernet.leaving,
        supernet.weight_calibration,
        supernet.activation_calibration,
    ]
    choices += supernet.transforms
    choices += _own_schemes(supernet)
    if supernet._measured_constants or supernet._repaired or supernet._has_batch_norm:
        # Not the constants themselves: another kind of CPU, or another number of threads, finds other last bits.
        choices += [supernet.repair, supernet.samples_digest]
    tensors = dict(supernet.model.state_dict())
    if supernet.learned is not None:
        tensors |= supernet.learned.tensors()
    digest = xxhash.xxh3_128(json.dumps(choices, sort_keys=True, default=str).encode())
    digest.update(digest_of([tensors]).encode())
    return digest.hexdigest()


def _own_schemes(supernet: Supernet) -> list[dict[str, Any]]:
    """What the user's own schemes are: the space has but their names, under which others may be put tomorrow."""
    defined = {each.name: own_definition(each) for each in supernet.schemes.values()}
    return [each for _, each in sorted(defined.items()) if each is not None]


def save(supernet: Supernet, path: str | Path) -> None:
    """See `Supernet.save`."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in distinct_tensors(supernet.model).items()}
    if supernet.learned is not None:
        tensors |= {name: tensor.detach().cpu() for name, tensor in supernet.learned.tensors().items()}
    record = {"leaving": supernet.leaving, "trained": supernet.trained}
    if supernet.transforms:
        record |= {"transforms": supernet.transforms, "scaled": supernet._scaled}
    with writing(f"{path}:"):
        write_tensors(Path(path), tensors, {"supernet": json.dumps(record)})


def load(supernet: Supernet, path: str | Path) -> None:
    """See `Supernet.load`."""
    with reading(f"{path}:", "what `save` wrote"):
        record, tensors = read_tensors(path, "supernet")
        if record is None:
            raise JointoptError(f"{path}: not a saved super-network of this model")
        made, leaving = tuple(record.get("transforms", ())), record["leaving"]
        trained, scaled = record["trained"], record.get("scaled", False)
        members = {stage: sorted(names) for stage, names in leaving.items()}
        told = [", ".join(each) or "none" for each in (made, supernet.transforms)]
    if made != supernet.transforms:
        raise JointoptError(f"{path}: saved with transforms {told[0]}; this super-network has {told[1]}")
    own = {name: each for name, each in distinct_tensors(supernet.model).items() if name != LEARNED_RANGES}
    learned = LearnedRanges(supernet, INPUTS in tensors) if LEARNED_RANGES in tensors else None
    if learned is not None:
        own |= learned.tensors()
    if tensors.keys() != own.keys() or members != {stage: sorted(each) for stage, each in supernet.leaving.items()}:
        raise JointoptError(f"{path}: not a saved super-network of this model")
    for name, tensor in tensors.items():
        if tensor.shape != own[name].shape:
            found, wanted = tuple(tensor.shape), tuple(own[name].shape)
            raise JointoptError(f"{path}: {name} has shape {found}; this model's has {wanted}")
    settle(supernet)
    supernet.learned = learned
    for name, tensor in tensors.items():
        own[name].data.copy_(tensor)
    supernet.leaving, supernet.trained, supernet.calibrated, supernet._scaled = leaving, trained, False, scaled
    supernet._measured_constants, supernet._repaired = {}, {}
    supernet._condition_space()
    supernet._forget()
    supernet._stamp = stamp(supernet.model)


def read_tensors(path: str | Path, key: str) -> tuple[Any, dict[str, Tensor]]:
    """What a file of safetensors has under a key of its metadata, JSON (None where it has none), and its tensors."""
    with safe_open(str(path), framework="pt") as file:
        record = json.loads((file.metadata() or {}).get(key, "null"))
        return record, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safetensors' own


def follow(supernet: Supernet) -> None:
    """Brings what calibration measured to where the model is, and forgets what another dtype gave: a Trainer,
    accelerate or the user may have moved it."""
    weight = next(supernet.model.parameters())
    place, dtype = found = weight.device, weight.dtype
    if supernet._place == found:
        return
    supernet._place, supernet._stamp = found, stamp(supernet.model)
    supernet._measured_constants = {key: on_device(each, place) for key, each in supernet._measured_constants.items()}
    supernet._repaired = {
        key: (weight.to(place, dtype), None if bias is None else bias.to(place, dtype))
        for key, (weight, bias) in supernet._repaired.items()
    }
    supernet.samples = [on_device(batch, place) for batch in supernet.samples]
    if supernet.learned is not None:
        supernet.learned.move(place)
    supernet._forget()


def stamp(model: nn.Module) -> tuple[int, int]:
    """What differs once a parameter was written to in place: by an optimizer, or by `load_state_dict`. Not so one whose
    `.data` was."""
    return id(model), sum(0 if each.is_inference() else each._version for each in model.parameters())


def notice(supernet: Supernet) -> None:
    """Finds out whether someone has changed the weights, as a loop of one's own or averaged weights do."""
    found = stamp(supernet.model)
    if found != supernet._stamp and found[0] == supernet._stamp[0]:  # else it is a copy, whose counts begin anew
        supernet.weights_changed()
    supernet._stamp = found


def for_workers(supernet: Supernet, count: int) -> Supernet:
    """The same, to be sent to `count` other processes for evaluations alone: without the model that was given.

    Up to half of the bank is filled before, for all of them to share; each may fill an equal part of the rest.
    """
    bank = supernet._bank
    for (path, _), wanted in supernet.schemes.items():
        if wanted.weights is not None and 2 * bank.nbytes < bank.limit:
            # What cannot be quantized is the failure of the genomes that ask for it.
            with suppress(JointoptError):
                supernet._banked(path, wanted, None)
    sent = copy.copy(supernet)
    sent._given, sent.scores = supernet.model, {}
    sent._bank = bank.for_workers(count)
    return sent


def distinct_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters and buffers by name, tied ones once."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
