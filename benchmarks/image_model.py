"""An image classifier as the transformers library saves it: ViT-Tiny's weights under its names.

    python benchmarks/image_model.py models/vit-tiny
    profiling-agent optimize hf:models/vit-tiny --data $PROFILING_AGENT_ASSETS/imagenet_val_650 \\
        --classes $PROFILING_AGENT_ASSETS/imagenet_classes.txt --max-drop 1

The folder holds config, weights and processor, and nothing else is needed to use it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from workloads import VIT_WEIGHTS, asset

RENAMED = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "head": "classifier",
}
RENAMED_IN_BLOCKS = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names to those of transformers; the fused projection is taken apart."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if not name.startswith("blocks."):
            stem, _, kind = name.rpartition(".")
            renamed[RENAMED[name] if name in RENAMED else f"{RENAMED[stem]}.{kind}"] = value
            continue
        _, number, rest = name.split(".", 2)
        stem, _, kind = rest.rpartition(".")
        layer = f"vit.layers.{number}"
        if stem == "attn.qkv":
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{layer}.attention.{part}_proj.{kind}"] = piece.clone()
        else:
            renamed[f"{layer}.{RENAMED_IN_BLOCKS[stem]}.{kind}"] = value
    return renamed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    from profiling_agent.acquisition.hubs.torchvision_repair import make_torchvision_importable

    make_torchvision_importable()
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        layer_norm_eps=1e-6,
        num_labels=1000,
    )
    lines = asset("imagenet_classes.txt").read_text(encoding="utf-8").splitlines()
    config.id2label = {index: line.split(maxsplit=1)[-1] for index, line in enumerate(lines)}
    config.label2id = {name: index for index, name in config.id2label.items()}
    with torch.device("meta"):
        model = ViTForImageClassification(config)
    model.load_state_dict(rename(load_file(asset(VIT_WEIGHTS))), assign=True)
    model.save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"shortest_edge": 248},
        resample=3,
        do_center_crop=True,
        crop_size={"height": 224, "width": 224},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(folder)


if __name__ == "__main__":
    main()
