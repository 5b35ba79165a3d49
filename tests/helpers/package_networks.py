"""Small networks of the families of timm and Hugging Face, which the tests and benchmarks/packages.py build without a hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The name, its family, and the settings of a small configuration of Hugging Face.
_SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
_LABELS = {"id2label": {str(i): f"class {i}" for i in range(10)}, "label2id": {f"class {i}": i for i in range(10)}}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]}
FAMILIES: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    ("timm:resnet18", "resnet", {}),
    ("timm:resnext50_32x4d", "resnext", {}),
    ("timm:convnext_atto", "convnext", {}),
    ("timm:efficientnet_b0", "efficientnet", {}),
    ("timm:regnety_002", "regnet", {}),
    ("timm:mobilenetv3_small_050", "mobilenetv3", {}),
    ("timm:vit_tiny_patch16_224", "vit", {}),
    ("timm:deit_tiny_distilled_patch16_224", "deit", {}),
    ("timm:swin_tiny_patch4_window7_224", "swin", {}),
    ("timm:eva02_tiny_patch14_224", "eva", {}),
    ("timm:mobilevit_xxs", "mobilevit", {}),
    ("timm:efficientvit_b0", "efficientvit", {}),
    ("timm:coatnet_nano_rw_224", "coatnet", {}),
    ("timm:densenet121", "densenet", {}),
    ("hf:dinov2", "dinov2", {**_SMALL, "image_size": 56, "patch_size": 14}),
    ("hf:dinov2_with_registers", "dinov2 with registers", {**_SMALL, "image_size": 56, "patch_size": 14, "num_register_tokens": 4}),
    ("hf:vit", "vit", {**_SMALL, **_LABELS, "image_size": 32, "patch_size": 8}),
    ("hf:beit", "beit", {**_SMALL, **_LABELS, "image_size": 32, "patch_size": 8}),
    ("hf:convnextv2", "convnextv2", {**_STAGES, **_LABELS, "image_size": 64}),
    ("hf:swin", "swin", {**_LABELS, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 2}),
    ("hf:resnet", "resnet", {**_STAGES, **_LABELS, "embedding_size": 8, "layer_type": "basic"}),
)  # fmt: skip


def folder_of(name: str, place: Path) -> str:
    """Return the name under which a network is loaded; the configuration of one of Hugging Face is written to a folder below `place`."""
    if not name.startswith("hf:"):
        return name
    kind = name.removeprefix("hf:")
    settings = next(settings for known, _, settings in FAMILIES if known == name)
    folder = place / kind
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": kind, **settings}))
    side = settings.get("image_size", 64)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": side, "width": side}, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"hf:{folder}"
