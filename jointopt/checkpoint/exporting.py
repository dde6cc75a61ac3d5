"""Writes a sub-network as a folder that its target loads (`writers.WRITERS`): whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from contextlib import closing
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import safe_open
from torch import nn

from jointopt import targets
from jointopt.arithmetic import own_arithmetic
from jointopt.checkpoint import card, gguf_writer
from jointopt.checkpoint.onnx.writer import MODEL, onnx_bytes
from jointopt.checkpoint.probe import example_of, probe_of
from jointopt.checkpoint.writers import WRITERS
from jointopt.evaluation.evaluation import check_supernet
from jointopt.files import check_path, locked, reading, writing
from jointopt.finishing.finishing import Finished
from jointopt.names import NEAREST
from jointopt.objectives import COSTS
from jointopt.rebuilding.structure import flat_inputs_noted, quantized_layers
from jointopt.study.rescoring import scored_again
from jointopt.study.study import Study
from jointopt.tokenizer_settings import settings_of_its_files
from quant.errors import JointoptError, check_kind
from quant.formats import dtype_name

if TYPE_CHECKING:
    from jointopt.supernet.supernet import Supernet

RECORD = "jointopt.json"
LOCK, REPLACED = "jointopt.lock", "replaced"
"""In the folder beside its own that an export is written in: locked while it lives; what was there before."""
UNCHANGED = "what export wrote, unchanged"


@own_arithmetic()
def export(
    supernet: Supernet,
    genome: Any,
    folder: str | Path,
    *,
    study: Study | None = None,
    processor: Any = None,
    base_model: str | None = None,
    overwrite: bool = False,
    target: str = "transformers",
) -> Path:
    """Writes the sub-network of a genome, or a finished one, as a checkpoint folder.

    Weights are written as the very codes and scales that the sub-network was scored with. A sub-network that its
    stock class and compressed-tensors can hold loads by `from_pretrained` as it is; others bring a modelling file and
    need `trust_remote_code=True`; timm models bring one with a `load` function.

    Args:
        supernet: calibrated.
        genome: a genome of its space, or what `finish` made of one, with the metrics that it measured.
        folder: to be made; its parent must exist.
        study: where the genome was scored (default: what this super-network's searches found); recorded for `verify`.
        processor: tokenizer, image processor, or None; saved along by its save_pretrained, a tokenizer with the
            truncation and padding of the tokenizer.json that it was loaded from, which calls of it change.
        base_model: name or folder of the original, for the model card.
        overwrite: whether an export that is there is replaced, whole. Nothing else is.
        target: "transformers" (and timm); or "onnxruntime": model.onnx, with the same codes and scales, in operators
            that stock ONNX Runtime has kernels for; or "gguf": model.gguf for llama.cpp, of LLaMAs whose blocks are
            all of one size, in W8A16_G32 (Q8_0), W4A16_G32 (Q4_0) or unquantized; or "vllm": the folder of
            transformers, of LLaMAs whose fused layers (q, k, v; gate, up) share a format that vLLM computes as it was
            scored; a DeciLM, with `trust_remote_code`, where widths of FFNs differ or parts of blocks are left out.

    Raises:
        JointoptError: the folder exists, it cannot be written, a package that the target needs is missing, the model is
            of no class that can be loaded, or has a number format that the target does not compute; weights were
            trained since the calibration that it needs; the study searched another super-network; the processor has no
            save_pretrained.
    """
    targets.check_installed(targets.target(target))
    check_supernet("export", supernet)
    check_kind("export: folder", folder, (str, Path), "a path")
    _check_study(study, supernet)
    if processor is not None and not hasattr(processor, "save_pretrained"):
        raise JointoptError(
            f"export: processor: found {type(processor).__name__}, which has no save_pretrained; allowed: a tokenizer "
            "or an image processor of transformers, or None (a timm model's folder says how its images are prepared)"
        )
    folder = Path(folder)
    check_place(folder, overwrite)
    if not folder.parent.is_dir():
        raise JointoptError(f"export: the folder {str(folder.parent)!r} does not exist")
    finished = genome if isinstance(genome, Finished) else None
    genome = supernet.space.canonical(genome if finished is None else finished.genome)
    model = (supernet.extract(genome) if finished is None else finished.model).eval()
    with flat_inputs_noted(model):
        record = _record(supernet, genome, finished, model, study, base_model)
    with writing(f"export: {str(folder)!r}"):
        clear_killed(folder)
        with (
            tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as place,
            closing(locked(Path(place) / LOCK, f"export: {place!r}")),
        ):
            whole = Path(place) / folder.name
            whole.mkdir()
            noted, loading = WRITERS[target].write(whole, model, processor, example_of(supernet))
            record |= noted
            if "stored" not in record:
                _weigh(whole, model, record["costs"]["size"])
            _write_beside(whole, record, processor, loading)
            _move(whole, folder, Path(place), overwrite)
    return folder


def _check_study(study: Any, supernet: Supernet) -> None:
    """Raises JointoptError for what is no study, and for one that scored another super-network's genomes."""
    if not isinstance(study, Study | None):
        raise JointoptError(f"export: found study {study!r}; allowed: a study, such as Study.open(path)")
    searched = None if study is None else study.config.get("supernet")
    if searched and searched != supernet.fingerprint():
        raise JointoptError(
            "export: the super-network, or what it was calibrated on, is no longer what the study searched, so that "
            "its scores are of others; allowed: the very one (weights, space, calibration, version of jointopt), or no "
            "study"
        )


def clear_killed(folder: Path) -> None:
    """Removes the temporary folders of killed exports to this folder: those that no running export has locked."""
    for left in folder.parent.glob(f".{escape(folder.name)}-????????"):
        alone = (left / REPLACED).exists() and not folder.exists()  # killed between two renames: the only one there is
        if (left / LOCK).is_file() and not alone:
            try:
                locked(left / LOCK, "export").close()
            except JointoptError:
                continue  # another export writes there
            shutil.rmtree(left, ignore_errors=True)


def check_place(folder: Path, overwrite: bool) -> None:
    """Raises JointoptError where a folder exists, unless it is an export that is to be replaced."""
    check_path(folder, "export")
    if folder.exists() and not overwrite:
        raise JointoptError(f"export: {str(folder)!r} exists; choose another folder, or overwrite it explicitly")
    empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not empty and not (folder / RECORD).is_file():
        raise JointoptError(
            f"export: {str(folder)!r} holds no {RECORD}, so that it is no export and is not overwritten; "
            "allowed: another folder"
        )


def _move(whole: Path, folder: Path, aside: Path, overwrite: bool) -> None:
    """The finished folder into place; an old one is put aside first, and goes with the temporary folder. What came
    there meanwhile is refused like what was there before."""
    check_place(folder, overwrite)
    replaced = aside / REPLACED
    if folder.exists():
        os.rename(folder, replaced)
    try:
        os.rename(whole, folder)
    except OSError:
        if replaced.exists():
            os.rename(replaced, folder)
        raise


def told_apart_by(
    supernet: Supernet, genome: np.ndarray, finished: Finished | None, study: Study | None
) -> dict[str, Any]:
    """The part of an export's record that is another one where anything else was exported, or it has other scores."""
    metrics = supernet.scores.get(genome.tobytes()) if study is None else study.results(genome[None])[0]
    if finished is not None:
        metrics = finished.metrics
    return {
        "supernet": supernet.fingerprint(),
        "genome": genome.tolist(),
        "rounding": NEAREST if finished is None else finished.rounding,
        "metrics": {name: value for name, value in (metrics or {}).items() if name not in COSTS},
    }


def _record(
    supernet: Supernet,
    genome: np.ndarray,
    finished: Finished | None,
    model: nn.Module,
    study: Study | None,
    base_model: str | None,
) -> dict[str, Any]:
    unseen = scored_again(study, genome, finished.rounding if finished else NEAREST) if study is not None else {}
    return {
        "base_model": card.model_name(base_model or getattr(getattr(model, "config", None), "name_or_path", "") or ""),
        "family": supernet.family.name,
        "dtype": dtype_name(next(model.parameters()).dtype),
        **told_apart_by(supernet, genome, finished, study),
        "choices": supernet.space.decode(genome),
        "costs": supernet.costs(genome),
        **({"latency": supernet.latency.described()} if supernet.latency else {}),
        "original": study.original if study is not None else supernet.original_costs(),
        **({"unseen": unseen} if unseen else {}),
        "layers": supernet.layout(genome),
        "probe": probe_of(supernet, model),
        "software": {name: version(name) for name in ("torch", "transformers", "timm", "compressed-tensors")},
    }


def _write_beside(place: Path, record: dict[str, Any], processor: Any, loading: str) -> None:
    """What any folder has beside the model: the processor, the record, the card."""
    if processor is not None:
        try:
            with settings_of_its_files(processor):
                processor.save_pretrained(place)
        except Exception as error:  # tokenizers tells of a full disk by this very class
            raise JointoptError(
                f"export: the {type(processor).__name__} cannot be written: {error or repr(error)}"
            ) from error
    (place / RECORD).write_text(json.dumps(record, indent=1))
    (place / "README.md").write_text(card.model_card(record, loading))


def _weigh(place: Path, model: nn.Module, size: int) -> None:
    """Raises where the file does not weigh what was reported, or a layer is not stored as it was meant to be."""
    found = stored_bytes(place)
    if found != size:
        raise AssertionError(f"export: the tensors have {found} bytes, {size} were reported")
    with safe_open(str(place / "model.safetensors"), framework="pt") as file:
        stored = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - safetensors' own
    for path, layer in quantized_layers(model).items():
        if stored.get(f"{path}.weight") in ("F32", "BF16"):
            raise AssertionError(f"export: {path} was meant to be {layer.scheme} and is not")


def stored_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors files, or in its ONNX or GGUF model. Raises JointoptError for a
    file that is none of these."""
    if (path := folder / gguf_writer.MODEL).is_file():
        with reading(repr(str(path)), UNCHANGED):
            return gguf_writer.gguf_bytes(path)
    if (path := folder / MODEL).is_file():
        from google.protobuf.message import DecodeError

        with reading(repr(str(path)), UNCHANGED, DecodeError):
            return onnx_bytes(path)
    return sum(_safetensors_bytes(path) for path in sorted(folder.glob("*.safetensors")))


def _safetensors_bytes(path: Path) -> int:
    with reading(repr(str(path)), UNCHANGED), open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length < path.stat().st_size:
            raise ValueError("it is cut short, or no file of safetensors")
        entries = json.loads(file.read(length)).items()
        spans = [entry["data_offsets"] for name, entry in entries if name != "__metadata__"]
        return sum(end - start for start, end in spans)
