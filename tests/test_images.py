"""Images as a data set has them: which files count, how they are opened, and what is refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from jointopt import JointoptError
from jointopt.config.config import Config
from jointopt.config.sections import Data, Source, Train
from jointopt.models import load_model
from jointopt.outputs import logits_of
from jointopt.prepared import prepare
from jointopt.rows import DataSource, read_columns
from jointopt.tasks.image_classification import _mark
from jointopt.tasks.labels import check_same_folders
from tests.saved import batches_of, quality_of, save_timm, save_vit, write_images


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in (("vit", save_vit), ("timm", save_timm))}


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_images_come_from_folders_of_their_class(folders, tmp_path, name):
    source = DataSource(str(write_images(tmp_path / "images")))
    loaded = load_model(str(folders[name]), None, "cpu")
    batches = batches_of(loaded, "image-classification", source, 5)
    assert torch.cat([batch["labels"] for batch in batches]).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    with torch.no_grad():
        inputs = {key: value for key, value in batches[0].items() if key != "labels"}
        assert logits_of(loaded.model, inputs).shape == (5, 3)


def test_folders_that_number_classes_are_the_same_in_all_of_the_data(folders, tmp_path):
    write_images(tmp_path / "seen")
    write_images(tmp_path / "unseen", classes=("cat", "cow", "dog"), seed=1)
    data = {name: Source(path=str(tmp_path / "seen")) for name in ("calibrate", "evaluate")}
    for name, train in (("vit", None), ("timm", Train(steps=1))):
        other = {"test" if train is None else "train": Source(path=str(tmp_path / "unseen"))}
        config = Config(
            model=str(folders[name]), task="image-classification", data=Data(**data, **other), train=train, output="out"
        )
        with pytest.raises(JointoptError, match=r"^data\..*: its folders number the .* found 2: cow, owl in one alone"):
            prepare(config)


def test_folders_that_are_named_as_classes_are_need_not_be_the_same():
    check_same_folders({"data.evaluate": ["cat", "dog"], "data.test": ["cat"]}, ["cat", "dog"])
    check_same_folders({"data.evaluate": ["0", "1"], "data.test": ["1"]}, ["0", "1"])
    with pytest.raises(JointoptError, match=r"^data.test: .* so do those of data.evaluate; found 4: 0, 1, cat, dog in"):
        check_same_folders({"data.evaluate": ["0", "1"], "data.test": ["cat", "dog"]}, ["0", "1"])


def test_files_with_a_dot_before_their_name_are_no_images(tmp_path):
    images = write_images(tmp_path)
    (images / "cat/.ipynb_checkpoints").mkdir()
    shutil.copy(images / "cat/0.png", images / "cat/.ipynb_checkpoints/0-checkpoint.png")
    (images / "cat/._0.png").write_bytes(b"attributes of a file")
    assert len(read_columns(DataSource(str(images)))["image"]) == 12


def test_images_have_any_of_the_usual_suffixes_and_other_files_are_counted(tmp_path):
    images = write_images(tmp_path)
    for name, kind in (("a.ppm", "PPM"), ("b.jfif", "JPEG"), ("c.JPG", "JPEG"), ("d.heic", "PNG")):
        Image.new("L", (8, 8)).save(images / "owl" / name, format=kind)
    with pytest.warns(
        UserWarning, match=r"1 of 16 files in its class folders are left out, such as owl/d.heic; images"
    ):
        assert len(read_columns(DataSource(str(images)))["image"]) == 15


def test_images_behind_links_to_folders_count_once_and_in_their_class_alone(tmp_path):
    images, elsewhere = write_images(tmp_path / "images"), write_images(tmp_path / "elsewhere", seed=1)
    (images / "cat/more").symlink_to(elsewhere / "cat")
    (images / "cat/again").symlink_to(elsewhere / "cat")
    (images / "dog/here").symlink_to(images / "dog")
    (images / "owl/all").symlink_to(images)
    (images / "owl/some").symlink_to(images / "dog")
    found = read_columns(DataSource(str(images)))
    assert [found["label"].count(name) for name in ("cat", "dog", "owl")] == [8, 4, 4]
    assert str(images / "cat/again/0.png") in found["image"]


def test_images_beside_class_folders_are_told(tmp_path):
    images = write_images(tmp_path)
    for name in ("b.png", "a.jpg", "notes.txt", "._a.jpg"):
        shutil.copy(images / "cat/0.png", images / name)
    with pytest.warns(UserWarning, match=r"2 images beside its class folders are left out, such as a.jpg$"):
        assert len(read_columns(DataSource(str(images)))["image"]) == 12


def test_pictures_with_a_border_that_are_not_compressed_are_told_apart(tmp_path):
    for at, name in enumerate(("a.bmp", "b.bmp")):
        image = Image.new("RGB", (64, 64))
        image.paste((at, 255, 0), (24, 24, 40, 40))
        image.save(tmp_path / name)
    first, second = (_mark(str(tmp_path / name), tmp_path, "data.test") for name in ("a.bmp", "b.bmp"))
    assert first != second


def test_a_table_names_its_images_relative_to_itself(folders, tmp_path):
    write_images(tmp_path / "images")
    (tmp_path / "table.csv").write_text("image,label\nimages/cat/0.png,2\nimages/dog/1.png,0\n")
    found = quality_of(folders["vit"], "image-classification", DataSource(str(tmp_path / "table.csv")))
    assert set(found) == {"accuracy", "loss", "kl"}


def test_images_of_more_than_8_bits_are_refused_and_not_cut_off(folders, tmp_path):
    for name in ("0", "1", "2"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((16, 16), 30_000, dtype=np.uint16)).save(tmp_path / name / "a.png")
    with pytest.raises(JointoptError, match=r"more than 8 bits a channel \(mode I;16\); allowed: 8 bits"):
        quality_of(folders["vit"], "image-classification", DataSource(str(tmp_path)))


def test_a_png_with_zeroed_sectors_is_named_as_other_damaged_images_are(folders, tmp_path):
    write_images(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (512, 512), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "dog/1.png")
    whole = (tmp_path / "dog/1.png").read_bytes()
    second = whole.index(b"IDAT", whole.index(b"IDAT") + 1)
    (tmp_path / "dog/1.png").write_bytes(whole[: second + 100] + bytes(len(whole) - second - 100))
    with pytest.raises(JointoptError, match=r"dog/1.png' cannot be opened as an image: broken PNG file"):
        quality_of(folders["vit"], "image-classification", DataSource(str(tmp_path)))


def test_images_that_are_left_at_unequal_sizes_are_named(tmp_path):
    images = write_images(tmp_path / "images")
    Image.new("L", (12, 8)).save(images / "dog/1.png")
    config = ResNetConfig(num_channels=1, embedding_size=32, hidden_sizes=[32], depths=[1], num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    ViTImageProcessor(do_resize=False, image_mean=[0.5], image_std=[0.5]).save_pretrained(tmp_path / "resnet")
    with pytest.raises(JointoptError, match=r"makes \(8, 12\) of .*dog/1.png', \(8, 8\) of .*cat/0.png'; allowed: one"):
        quality_of(tmp_path / "resnet", "image-classification", DataSource(str(images)))


def test_a_photo_is_seen_the_way_up_that_its_camera_says(folders, tmp_path):
    write_images(tmp_path / "upright")
    for path in (tmp_path / "upright").rglob("*.png"):
        turned = tmp_path / "turned" / path.relative_to(tmp_path / "upright")
        turned.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6
        Image.open(path).transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    loaded = load_model(str(folders["vit"]), None, "cpu")
    upright, turned = (
        batches_of(loaded, "image-classification", DataSource(str(tmp_path / name)), 12)[0]
        for name in ("upright", "turned")
    )
    assert torch.equal(upright["pixel_values"], turned["pixel_values"])


def test_an_image_processor_of_another_size_than_the_models_is_named(tmp_path):
    images = write_images(tmp_path / "images")
    with pytest.raises(JointoptError, match=r"makes images of \(8, 8\); the model takes \(16, 16\)"):
        quality_of(save_vit(tmp_path / "vit", 16), "image-classification", DataSource(str(images)))


def test_an_image_processor_for_colours_of_a_gray_model_is_named(tmp_path):
    folder = save_vit(tmp_path / "vit")
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    source = DataSource(str(write_images(tmp_path / "images")))
    with pytest.raises(JointoptError, match="its image processor fails on L images: RuntimeError: .* shape"):
        quality_of(folder, "image-classification", source)
