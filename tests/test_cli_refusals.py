"""What the command refuses: one line that says what is allowed, exit code 2, and nothing begun."""

from __future__ import annotations

import shutil
import sys

import pytest
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessor

from jointopt import Gene, Objective, SearchSpace, Study
from jointopt.cli import main
from tests.commands import at_once, refused, write_config
from tests.saved import save_vit, write_images


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objektives": ["accuracy"]}, "did you mean 'objectives'"),
        ({"search": {"evaluations": "many"}}, "search.evaluations"),
        ({"model": "gone"}, "model: "),
        ({"data": {"calibrate": "images", "evaluate": "gone.csv"}}, "data.evaluate: no file or folder 'gone.csv'"),
        ({"space": {"heads": [3], "schemes": ["none"]}}, "space.heads (block0.heads): found 3; allowed: 1 to 2"),
        ({"space": {"mlp": [129]}}, "space.mlp (block0.mlp): found 129; allowed: 1 to 128"),
        ({"space": {"schemes": ["W3A3"]}}, "scheme 'W3A3': unknown"),
        ({"space": {"preset": "fixed", "schemes": ["none"]}}, "space: nothing is elastic"),
        ({"space": {"depth": [1], "schemes": ["none"]}}, "space: holds one genome"),
        ({"objectives": ["perplexity", "size"]}, "objectives: found perplexity; allowed: "),
        ({"quality": "mine.nothing", "task": None}, "quality: "),
        ({"device": "cuda:9"}, "device: cuda:9 is not available here"),
        ({"output": "images"}, "output: 'images' exists and is no run"),
        ({"output": "a\0b"}, r"output: 'a\x00b' cannot be looked up: "),
        ({"choose": {"size_mb": 1, "drop": 1}}, "allowed: one of size_mb, drop, knee"),
        ({"target": "vllm"}, "target vllm: found a vit; allowed: language models of llama"),
        ({"target": "gguf", "space": None}, "target gguf: found a vit; allowed: language models of llama"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_code_2(changes, said, place, capsys, monkeypatch):
    write_config(place, **{"output": "runs/bad", **changes})
    assert said in refused(capsys, place, monkeypatch, "run", "config.yaml")
    assert not (place / "runs/bad/study.db").exists()


def test_finishing_knows_its_keys(place, capsys, monkeypatch):
    write_config(place, finish={"rounding": "gptqq"})
    assert "finish.rounding: found 'gptqq'" in refused(capsys, place, monkeypatch, "run", "config.yaml")
    write_config(place, finish={"top": 0})
    assert "finish.top: found 0; allowed: more than 0" in refused(capsys, place, monkeypatch, "run", "config.yaml")


def test_a_model_of_an_unknown_family_is_named(place, capsys, monkeypatch):
    from transformers import ViTImageProcessor, ViTMAEConfig

    (place / "other").mkdir()
    ViTMAEConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(place / "other")
    ViTImageProcessor().save_pretrained(place / "other")
    write_config(place, model="other", output="runs/bad")
    assert "model: 'other'" in refused(capsys, place, monkeypatch, "run", "config.yaml")


def test_labels_that_the_model_lacks_are_named(place, capsys, monkeypatch):
    write_images(place / "birds", classes=("crow", "jay", "owl", "tit"))
    write_config(place, data={"calibrate": "images", "evaluate": "birds"}, output="runs/bad")
    assert "data.evaluate.label: found 4 folders, and the model has 3 classes" in refused(
        capsys, place, monkeypatch, "run", "config.yaml"
    )


@pytest.mark.parametrize(
    ("labels", "mean", "said"),
    [
        (("dog", "cat", "owl"), 0.5, "label 0 is 'dog', the model's 'cat'"),
        (("cat", "dog", "owl"), 0.4, "image_mean is [0.4], the model's [0.5]"),
    ],
)
def test_a_teacher_of_other_labels_or_images_is_refused_before_training(
    labels, mean, said, tmp_path, capsys, monkeypatch
):
    save_vit(tmp_path / "pupil", id2label=dict(enumerate(("cat", "dog", "owl"))))
    save_vit(tmp_path / "teacher", id2label=dict(enumerate(labels)))
    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[mean], image_std=[0.5])
    processor.save_pretrained(tmp_path / "teacher")
    write_images(tmp_path / "images")
    train = {"steps": 2, "batch_size": 4, "distill": {"teacher": "teacher"}}
    data = {"train": "images", "evaluate": "images"}
    write_config(tmp_path, model="pupil", output="run", data=data, train=train)
    assert f"train.distill.teacher: {said}" in refused(capsys, tmp_path, monkeypatch, "run", "config.yaml")
    assert not (tmp_path / "run/training.safetensors").exists()


def test_a_teacher_without_a_trained_head_is_refused(tmp_path, capsys, monkeypatch):
    save_vit(tmp_path / "pupil", id2label=dict(enumerate(("cat", "dog", "owl"))))
    folder = save_vit(tmp_path / "teacher", id2label=dict(enumerate(("cat", "dog", "owl"))))
    weights = load_file(folder / "model.safetensors")
    body = {name: each for name, each in weights.items() if not name.startswith("classifier.")}
    save_file(body, folder / "model.safetensors", {"format": "pt"})
    write_images(tmp_path / "images")
    train = {"steps": 2, "batch_size": 4, "distill": {"teacher": "teacher"}}
    write_config(tmp_path, model="pupil", output="run", data={"train": "images", "evaluate": "images"}, train=train)
    said = refused(capsys, tmp_path, monkeypatch, "run", "config.yaml")
    assert "train.distill.teacher: 'teacher' has no weights for classifier.bias, classifier.weight; allowed" in said


def test_a_cluster_without_ray_is_told_before_anything_is_read(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    write_config(place, model="gone", search={"ray": "auto"}, output="runs/bad")
    said = refused(capsys, place, monkeypatch, "run", "config.yaml")
    assert "search.ray: found 'auto', and no ray; pip install 'jointopt[ray]'" in said


def test_a_function_that_always_fails_stops_the_run_after_the_first_batch(place, capsys, monkeypatch):
    (place / "broken.py").write_text(
        "calls = []\n\ndef quality(model):\n    calls.append(1)\n    return 1.0 if len(calls) == 1 else float('nan')\n"
    )
    own = {"task": None, "objectives": ["quality", "size"], "data": {"calibrate": "images"}}
    write_config(place, output="runs/nan", quality="broken.quality", **own)
    monkeypatch.syspath_prepend(str(place))
    assert "all 5 evaluations failed" in refused(capsys, place, monkeypatch, "run", "config.yaml")
    assert len(Study.open(place / "runs/nan/study.db")) == 5


def test_where_nothing_keeps_to_a_constraint_what_was_searched_can_still_be_exported(place, capsys, monkeypatch):
    write_config(place, output="runs/hard", constraints={"accuracy": ">= 1"}, search={"evaluations": 5})
    monkeypatch.chdir(place)
    assert main(["run", "config.yaml"]) == 2
    shown = capsys.readouterr()
    said = shown.err.strip().splitlines()[-1]
    assert "constraints: no evaluation has accuracy >= 1; the closest has 0." in said
    assert said.endswith("; export --pick NUMBER takes any evaluation")
    assert "front: " in shown.out and "* chosen" not in shown.out
    assert (place / "runs/hard/report.html").is_file()
    assert main(["export", "runs/hard", "--pick", "3"]) == 0


def test_where_the_minutes_were_over_before_an_evaluation_more_of_them_are_advised(place, capsys, monkeypatch):
    write_config(place, output="runs/brief", search={"minutes": 1e-6})
    monkeypatch.chdir(place)
    assert main(["run", "config.yaml"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.endswith("choose from; minutes: 1e-06 are over, and with more of them the same command goes on")
    write_config(place, output="runs/brief", search={"minutes": 10, "evaluations": 3})
    assert main(["run", "config.yaml"]) == 0


def test_a_wish_that_cannot_be_is_refused_before_training_and_costs_none(place, capsys, monkeypatch):
    data = {"train": "images", "evaluate": "images", "batch_size": 12}
    rest = {"data": data, "train": {"steps": 2, "batch_size": 4}, "search": {"evaluations": 3}, "output": "runs/typo"}
    for wish, said in {
        "acuracy": "constraints: found 'acuracy'; did you mean 'accuracy'?; allowed: size_mb",
        "size_mb": "constraint size_mb <= 0.0001: no genome meets it",
    }.items():
        write_config(place, constraints={wish: "<= 0.0001"}, **rest)
        assert said in refused(capsys, place, monkeypatch, "run", "config.yaml")
        assert not (place / "runs/typo/supernet.safetensors").exists()
    write_config(place, choose={"size_mb": 0.0001}, **rest)
    said = refused(capsys, place, monkeypatch, "run", "config.yaml")
    assert "choose.size_mb: found 0.0001; allowed: from 0." in said
    assert not (place / "runs/typo/supernet.safetensors").exists()
    write_config(place, **rest)
    done = at_once("run", "config.yaml", cwd=place)
    assert done.returncode == 0, done.stderr
    (place / "runs/typo/study.db").unlink()
    written = (place / "runs/typo/supernet.safetensors").stat().st_mtime_ns
    write_config(place, constraints={"accuracy": ">= 0.1"}, **rest)
    again = at_once("run", "config.yaml", "--overwrite", cwd=place)
    assert again.returncode == 0, again.stderr
    assert (place / "runs/typo/supernet.safetensors").stat().st_mtime_ns == written


@pytest.mark.parametrize("training", [{"train": {"steps": 2}}, {"finish": {"steps": 2}}])
def test_a_damaged_image_is_told_before_training_comes_to_it(training, place, capsys, monkeypatch):
    images = write_images(place / f"damaged-{'-'.join(training)}", seed=5)
    monkeypatch.setattr("jointopt.prepared.PROCESSED", 0)  # of many images most are not looked at for the digest
    (images / "owl/3.png").write_bytes((images / "owl/3.png").read_bytes()[:-30])
    data = {"train": images.name, "calibrate": "images", "evaluate": "images"}
    write_config(place, output="runs/damaged", data=data, search={"evaluations": 2}, **training)
    said = refused(capsys, place, monkeypatch, "run", "config.yaml")
    assert "data.train.image: " in said and "owl/3.png' cannot be opened as an image: " in said
    assert not {"training.safetensors", "study.db"} & {file.name for file in (place / "runs/damaged").iterdir()}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("export", "runs/vit", "--pick", "best"), "--pick: found 'best'; allowed: "),
        (("export", "runs/vit", "--pick", "drop=inf"), "--pick: found 'drop=inf'; allowed: "),
        (("export", "runs/vit", "--pick", "٣"), "--pick: found '٣'; allowed: "),
        (("export", "runs/vit", "--pick", "evaluation=1_1"), "--pick: found 'evaluation=1_1'; allowed: "),
        (("export", "runs/vit", "--pick", "999"), "--pick: found evaluation 999; the study has 1 to "),
        (("export", "runs/vit", "--pick", "size_mb=0.0001"), "size_mb: found 0.0001; the smallest evaluated has "),
        (("export", "runs/vit", "--pick", "knee"), "exists; choose another with --to"),
        (("verify", "nowhere"), "verify: no folder 'nowhere'"),
        (("verify", "vit"), "'vit' is no export"),
        (
            ("report", "runs/vit", "--device", "a100", "--context", "0"),
            "--context: found 0; allowed: a whole number from 1",
        ),
        (
            ("report", "runs/vit", "--device", "a100", "--batch", "99999999999999999999"),
            "--batch: found 99999999999999999999; allowed: a whole number from 1 to 1000000",
        ),
        (("report", "runs/vit", "--batch", "8"), "--batch: found 8 and no --device; allowed: with one"),
        (("report", "runs/vit", "-o", "."), "report: found path '.'; allowed: that of an HTML file"),
        (("report", "nowhere"), "study: 'nowhere' does not exist"),
        (("run", "nowhere.yaml"), "nowhere.yaml: No such file"),
        (("init", "nowhere/at/all"), "model: no folder 'nowhere/at/all'"),
        (("space", "nowhere.yaml"), "nowhere.yaml: No such file"),
    ],
)
def test_a_bad_argument_is_one_line_and_exit_code_2(words, said, finished, capsys, monkeypatch):
    assert said in refused(capsys, finished.parents[1], monkeypatch, *words)


def test_a_study_that_has_just_begun_is_not_shown_on_a_device(finished, capsys, monkeypatch):
    place, begun = finished.parents[1], finished.with_name("begun")
    begun.mkdir()
    shutil.copy(finished / "config.yaml", begun)
    Study.create(begun / "study.db", SearchSpace([Gene("a", (1, 2))]), [Objective("size", "min")], {}).close()
    said = refused(capsys, place, monkeypatch, "report", "runs/begun", "--device", "a100")
    assert "--device: the study has no evaluation yet; allowed: with one or more" in said


def test_an_empty_path_is_not_taken_for_the_default(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["export", "runs/vit", "--pick", "knee", "--to", "", "--overwrite"])
    assert "argument --to: found ''; allowed: a path" in capsys.readouterr().err
