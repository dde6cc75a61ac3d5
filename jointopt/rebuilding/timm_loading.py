"""Loads a folder that holds a model of timm. Goes into such an export's modelling file."""

import json
from pathlib import Path

import torch

from jointopt.rebuilding.runtime import rebuild


def build(recipe):
    """The model of timm that a recipe describes, its weights drawn anew. Needs timm."""
    import timm

    arguments = dict(recipe["arguments"])
    library = timm.models.vision_transformer
    if recipe["class"] == "ResNet":
        library = timm.models.resnet
        arguments["block"] = getattr(library, arguments["block"])
    return getattr(library, recipe["class"])(**arguments)


def load(folder):
    """The model in `folder`, in eval mode. Needs timm and safetensors."""
    from safetensors.torch import load_file

    config = json.loads((Path(folder) / "config.json").read_text())
    model = build(config["timm"]).to(getattr(torch, config["dtype"]))
    rebuild(model, config["jointopt"])
    if config["timm"]["class"] == "ResNet":  # what is built upon its features reads their widths here
        model.feature_info[0]["num_chs"] = model.bn1.num_features
    model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
    # How its images are prepared, where timm looks for it, in the tuples that it has there.
    prepared = {k: tuple(v) if isinstance(v, list) else v for k, v in config["pretrained_cfg"].items()}
    model.pretrained_cfg = model.default_cfg = prepared
    return model.eval()
