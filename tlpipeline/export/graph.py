"""A network as one graph, from decoded 8-bit images of any size to class probabilities: Pillow's resize is part of it, bit for bit."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tlpipeline.backbones.classifier import Classifier
from tlpipeline.backbones.features import with_pooling
from tlpipeline.backbones.finding import first_tensor
from tlpipeline.backbones.taps import Stopped
from tlpipeline.data.decoding import ELONGATED
from tlpipeline.data.transforms import Transforms
from tlpipeline.errors import BackboneError

_BITS = 22  # Pillow's weights are multiples of 2 to the -22
_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}  # radius of the filter, pixels of the coarser image


def _bilinear(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _bicubic(x: Tensor) -> Tensor:
    a, x = -0.5, x.abs()
    near, far = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))


_FILTERS: dict[str, Callable[[Tensor], Tensor]] = {"bilinear": _bilinear, "bicubic": _bicubic}


class Preparation(nn.Module):
    """What `data.loader.resize_and_crop` and `normalize` do, as a graph: 8-bit RGB (batch, height, width, 3) to (batch, 3, size, size).

    Pillow resizes 8-bit images in whole numbers, the rows first. The same sums in float64 are exact, so the pixels are the same. Only images
    more than twice as high as wide can differ, by their rounding: Pillow 13 resizes their columns first.

    Raises:
        BackboneError: the crop is larger than the resized image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, transforms: Transforms) -> None:
        super().__init__()
        if transforms.resize < transforms.size:
            raise BackboneError(
                f"expected transforms that resize to at least the crop of {transforms.size} pixels, found {transforms.resize}. "
                "Set `resize` of your own network's transforms higher."
            )
        self.size, self.resize, self.interpolation = transforms.size, transforms.resize, transforms.interpolation
        self.register_buffer("mean", torch.tensor(transforms.mean))
        self.register_buffer("std", torch.tensor(transforms.std))

    def pixels(self, images: Tensor) -> Tensor:
        """Return images resized and cropped, with whole values from 0 to 255: float64 (batch, size, size, 3)."""
        height, width = images.shape[1], images.shape[2]
        short = torch.sym_min(height, width)
        x = images.double()
        x = _rounded(torch.einsum("ow,bhwc->bhoc", self._weights(width, short, images.device), x))
        return _rounded(torch.einsum("oh,bhwc->bowc", self._weights(height, short, images.device), x))

    def _weights(self, side: Any, short: Any, device: torch.device) -> Tensor:
        """Return the weights of the pixels of one side for each pixel of the crop, times 2 to the 22: (size, side)."""
        kept = torch.sym_min(side, ELONGATED * short)  # the middle of a very long image
        resized = self.resize * kept // short
        surplus = resized - self.size
        # round() gives the even one of two whole numbers that are equally near.
        start = surplus // 2 + (surplus % 2) * ((surplus // 2) % 2)
        places = torch.arange(self.size, device=device) + start
        # As tensors: ONNX would divide numbers in 32 bits.
        whole = torch.full((1,), kept, dtype=torch.float64, device=device)
        scale = whole / torch.full((1,), resized, dtype=torch.float64, device=device)
        stretch = scale.clamp(min=1)
        center = (places.double()[:, None] + 0.5) * scale
        index = (torch.arange(side, device=device) - (side - kept) // 2).double()[None]
        first = (center - _SUPPORT[self.interpolation] * stretch + 0.5).floor().clamp(min=0)
        last = torch.minimum((center + _SUPPORT[self.interpolation] * stretch + 0.5).floor(), whole)
        weights = _FILTERS[self.interpolation]((index - center + 0.5) * (1.0 / stretch))
        weights = torch.where((index >= first) & (index < last), weights, torch.zeros_like(weights))
        weights = weights * (1.0 / weights.sum(1, keepdim=True)) * float(2**_BITS)
        return torch.where(weights < 0, (weights - 0.5).ceil(), (weights + 0.5).floor())

    def forward(self, images: Tensor) -> Tensor:
        """Return normalized inputs, float32 (batch, 3, size, size)."""
        return ((self.pixels(images).float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)


def _rounded(sums: Tensor) -> Tensor:
    return ((sums + float(2 ** (_BITS - 1))) * 2.0**-_BITS).floor().clamp(0, 255)


class _Tensors(nn.Module):
    """The tensors of a network, under their names, without its code.

    torch.export keeps a list of the registered modules that it is inside of. A network that stops at its deepest tap leaves several at once,
    so none of them may be registered.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        # The same dictionaries: a tensor that is exchanged here is exchanged in the network.
        self._parameters, self._buffers = network._parameters, network._buffers
        self._non_persistent_buffers_set = network._non_persistent_buffers_set
        for name, child in network.named_children():
            self.add_module(name, _Tensors(child))


class Graph(nn.Module):
    """A classifier with its preparation: 8-bit RGB (batch, height, width, 3) to probabilities (batch, classes), in float32.

    The layers below the cut and the head are all that it has. The temperature is part of the head's weights.
    """

    def __init__(self, classifier: Classifier, transforms: Transforms) -> None:
        super().__init__()
        self.prepare = Preparation(transforms)
        trunk = classifier.trunk.eval()
        self.trunk = _Tensors(trunk) if isinstance(trunk, Stopped) else trunk
        self.run, self.head, self.grids = (trunk,), classifier.head, classifier.grids  # in a tuple, trunk is registered once at most

    def forward(self, images: Tensor) -> Tensor:
        """Return the probability of each class."""
        features = torch.cat(with_pooling(self.run[0], self.grids)(self.prepare(images)), dim=1)
        probabilities: Tensor = self.head(features).softmax(1)
        return probabilities


class WholeGraph(nn.Module):
    """The uncut network with the same preparation, to compare with: 8-bit RGB (batch, height, width, 3) to its source head's logits."""

    def __init__(self, classifier: Classifier, transforms: Transforms) -> None:
        super().__init__()
        self.prepare, self.network = Preparation(transforms), classifier.backbone[0].module.eval()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of the source classes."""
        logits = first_tensor(self.network(self.prepare(images)))  # Hugging Face's networks return a record
        assert logits is not None
        return logits
