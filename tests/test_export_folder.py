"""The folder of an export: whole or not at all, readable, and never at the cost of what is there."""

from __future__ import annotations

import os
import resource
import signal
from contextlib import closing
from pathlib import Path

import pytest

import jointopt
from jointopt import JointoptError
from jointopt.checkpoint.exporting import LOCK, REPLACED
from jointopt.config.config import Config
from jointopt.files import locked
from jointopt.run_folder import EXPORT, taken
from tests.zoo import supernet_of


@pytest.mark.parametrize("target", ["transformers", "vllm", "onnxruntime", "gguf"])
def test_all_files_of_an_export_are_readable_to_whom_the_umask_says(target, tmp_path):
    pytest.importorskip({"onnxruntime": "onnxruntime", "gguf": "gguf"}.get(target, "torch"))
    supernet = supernet_of("llama_tied", ["none", "W8A16_G32" if target == "gguf" else "W8A8"], preset="fixed")
    genome = supernet.space.largest
    before = os.umask(0o027)
    try:
        folder = jointopt.export(supernet, genome, tmp_path / "out", target=target)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_an_existing_folder_is_kept_unless_told_otherwise(tmp_path):
    supernet = supernet_of("bert", schemes=["none", "W8A8"])
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(JointoptError, match="exists"):
        jointopt.export(supernet, supernet.space.largest, folder)
    assert (folder / "notes.txt").exists()
    jointopt.export(supernet, supernet.space.largest, folder, overwrite=True)
    assert not (folder / "notes.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_path_in_place_of_a_study_and_no_folder_are_refused(tmp_path):
    supernet = supernet_of("bert", schemes=["none", "W8A8"])
    with pytest.raises(JointoptError, match="export: found study 'study.db'; allowed: a study, such as Study.open"):
        jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", study="study.db")
    with pytest.raises(JointoptError, match="export: folder: found None; allowed: a path"):
        jointopt.export(supernet, supernet.space.smallest, None)


def test_a_processor_that_cannot_be_saved_is_refused_before_anything_is_made(tmp_path):
    supernet = supernet_of("timm_vit", schemes=["none", "W8A8"])
    with pytest.raises(JointoptError, match="processor: found function, which has no save_pretrained; allowed: a tok"):
        jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", processor=lambda image: image)
    assert not list(tmp_path.iterdir())


class Processor:
    """A tokenizer of the user's, which does something while it is saved."""

    def __init__(self, act):
        self.save_pretrained = act


def test_what_a_killed_export_left_is_cleared_by_the_next_and_a_living_ones_is_not(tmp_path):
    supernet = supernet_of("bert", schemes=["none", "W8A8"])
    folder, genome = tmp_path / "small", supernet.space.smallest
    child = os.fork()
    if not child:
        jointopt.export(supernet, genome, folder, processor=Processor(lambda at: os.kill(os.getpid(), signal.SIGKILL)))
    os.waitpid(child, 0)
    assert len(list(tmp_path.iterdir())) == 1 and not folder.exists()
    (tmp_path / ".small-mine-own").mkdir()

    def export_too(at: Path) -> None:
        jointopt.export(supernet, genome, folder)
        assert at.is_dir()

    jointopt.export(supernet, genome, folder, processor=Processor(export_too), overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".small-mine-own", "small"]
    assert not list(folder.glob("*.lock"))


def test_an_export_leaves_what_came_into_its_place_while_it_was_written(tmp_path):
    supernet = supernet_of("bert", schemes=["none", "W8A8"])
    folder = tmp_path / "small"

    def somebody(at: Path) -> None:
        folder.mkdir()
        (folder / "thesis.txt").write_text("mine")

    with pytest.raises(JointoptError, match=r"small' exists; choose another folder"):
        jointopt.export(supernet, supernet.space.smallest, folder, processor=Processor(somebody))
    assert [path.name for path in tmp_path.rglob("*")] == ["small", "thesis.txt"]


def test_a_run_leaves_to_an_export_in_its_folder_what_that_writes_and_what_it_has_put_aside(tmp_path):
    config = Config(model="bert", quality="my.function", data={"calibrate": "rows.csv"}, output=str(tmp_path / "run"))
    writing, aside = (tmp_path / "run" / f".{EXPORT}-{name}" for name in ("abcdefgh", "ijklmnop"))
    with taken(config):
        writing.mkdir()
        (aside / REPLACED).mkdir(parents=True)  # by an export that was killed between its two renames
        (aside / LOCK).touch()
    with closing(locked(writing / LOCK, "export")), taken(config):
        assert writing.is_dir() and (aside / REPLACED).is_dir()
    with taken(config):
        assert not writing.exists() and (aside / REPLACED).is_dir()


@pytest.mark.parametrize("mine", ["study.db", "config.json"])
def test_overwriting_replaces_exports_alone(tmp_path, mine):
    supernet = supernet_of("bert", schemes=["none", "W8A8"])
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / mine).write_text("mine")
    for place in (folder, folder / mine):
        with pytest.raises(JointoptError, match=r"holds no jointopt.json, so that it is no export"):
            jointopt.export(supernet, supernet.space.smallest, place, overwrite=True)
    assert (folder / mine).read_text() == "mine"


def test_an_export_that_cannot_be_put_into_place_leaves_the_old_one(tmp_path, monkeypatch):
    supernet = supernet_of("bert", schemes=["none", "W8A8"])
    folder = jointopt.export(supernet, supernet.space.smallest, tmp_path / "small")
    before = (folder / "model.safetensors").read_bytes()
    rename = os.rename

    def only_aside(source, target) -> None:
        if Path(target) == folder and Path(source).name != "replaced":
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", only_aside)
    with pytest.raises(JointoptError, match="Input/output error"):
        jointopt.export(supernet, supernet.space.largest, folder, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_a_full_disk_is_named_in_one_line_and_leaves_nothing_behind(tmp_path):
    supernet = supernet_of("bert", schemes=["none", "W8A8"])

    def full(at: Path) -> None:  # as tokenizers says it
        raise Exception("No space left on device (os error 28)")

    with pytest.raises(JointoptError, match=r"export: the Processor cannot be written: No space left on device"):
        jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", processor=Processor(full))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(JointoptError, match=r"export: '.*small' cannot be written: .*File too large"):
            jointopt.export(supernet, supernet.space.smallest, tmp_path / "small")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_what_fails_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    supernet = supernet_of("bert", schemes=["none", "W8A8"])

    class Broken:
        def save_pretrained(self, place: Path) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(JointoptError, match="No space left on device"):
        jointopt.export(supernet, supernet.space.smallest, tmp_path / "small", processor=Broken())
    assert not list(tmp_path.iterdir())
    with pytest.raises(JointoptError, match="does not exist"):
        jointopt.export(supernet, supernet.space.smallest, tmp_path / "no" / "small")
    with pytest.raises(JointoptError, match="is no export"):
        jointopt.verify(tmp_path)
