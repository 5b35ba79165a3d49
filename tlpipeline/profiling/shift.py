"""How far images lie from those that a network was trained on, without labels: statistics of its layers against the stored ones.

Every BatchNorm layer keeps the mean and variance of what it saw in training. The distance of a layer is the squared 2-Wasserstein distance
of diagonal Gaussians in units of those variances (Schneider et al. 2020, arXiv 2006.16971, compare the same statistics), freed from the
part that comes from looking at few images. Networks without BatchNorm store nothing of the kind: a reference file gives them the mean and
variance at each tap, measured once on images like the source's; for the others it gives the floor that a layer shows on such images.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from tlpipeline.backbones import catalogue
from tlpipeline.backbones import taps as cutting
from tlpipeline.backbones.features import extract
from tlpipeline.backbones.taps import Backbone
from tlpipeline.data.dataset import Row
from tlpipeline.data.loader import Images, batch_ranges, normalize
from tlpipeline.errors import BackboneError, DataError
from tlpipeline.files import write_bytes

FORMAT = 1
SUFFIX = ".refstats.json"
CAP = 25.0
DRAWS = 200
FIRST_IMAGES = 128
BATCH = 64
_NUMBERS = 1 << 20

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BatchNormShift:
    """One BatchNorm layer, and how far its inputs are from those of training.

    Attributes:
        name: of the module.
        raw: D against the checkpoint's running statistics, 0 for images from the source; may lie a little below 0.
        low, high: 95 % bootstrap interval of raw over the images.
        sequential: D where all earlier layers normalize with these images' own statistics (AdaBN, Li et al. 2016); None where it was not
            measured. Raw high and this low is a shift of the input (contrast, sensor); both high late in the network is other content.
        floor: raw on images like the source's, from a reference: augmentation in training raises D even for those.
    """

    name: str
    raw: float
    low: float
    high: float
    sequential: float | None
    floor: float | None


@dataclass(frozen=True)
class TapShift:
    """One tap, and the distance of its pooled features from a reference, with a 95 % bootstrap interval over the images."""

    name: str
    distance: float
    low: float
    high: float


# --- the distance ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """What is known of the source: per channel mean, variance, weight (sum 1); how many images that rests on."""

    mean: Matrix
    variance: Matrix
    weights: Matrix
    eps: float
    images: float


def _distance(means: Matrix, variances: Matrix, known: _Known, seed: int) -> tuple[float, float, float]:
    """Return D and its interval: (value, low, high).

    D = sum_c w_c min{25, [(m_c - mu_c)^2 - s_c^2 / n] / (sig_c^2 + eps) + (sqrt(v_c + eps) / sqrt(sig_c^2 + eps) - 1)^2 - bias_c}, where
    s_c^2 is the variance between images (the pixels of one image are not independent) and bias_c a quarter of the last square taken
    between two random halves of the sample. eps stands on both sides so that a channel that is dead here and there counts as equal. The
    cap holds below, too: with few images a dead source channel makes the subtracted part as large as the other. What a reference of few
    images contributes is subtracted likewise; running statistics count as exact. The bootstrap is centered on D: its draws take the
    sample's mean for the truth and would be freed from one half of their bias only.

    Args:
        means, variances: of each image and channel, over its pixels, (n, channels), n at least 2.
    """
    rng = np.random.default_rng(seed)
    # Sorted by content, because halves and draws go by position and the order of the images must not matter.
    order = np.argsort(means @ rng.standard_normal(means.shape[1]))
    scale = np.sqrt(known.variance + known.eps)
    z = (means[order] - known.mean) / scale
    z2 = variances[order] / scale**2 + z**2
    n, slack = len(z), known.eps / scale**2

    def deviation(mean: Matrix, square: Matrix) -> Matrix:
        return np.asarray(np.sqrt((square - mean**2).clip(min=0) + slack))

    shuffled = rng.permutation(n)
    one, other = (deviation(z[half].mean(0), z2[half].mean(0)) for half in (shuffled[: n // 2], shuffled[n // 2 : n // 2 * 2]))
    bias = (one - other) ** 2 / 4 * (1 + n / known.images) + known.variance / scale**2 / known.images

    def at(shares: Matrix) -> Matrix:
        mean = shares @ z
        between = (shares @ z**2 - mean**2) / (n - 1)
        terms = mean**2 - between + (deviation(mean, shares @ z2) - 1) ** 2 - bias
        return np.asarray(terms.clip(-CAP, CAP) @ known.weights)

    value = float(at(np.full((1, n), 1 / n))[0])
    drawn = at(rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n)
    low, high = np.quantile(drawn, (0.025, 0.975)) - drawn.mean() + value
    return value, min(value, float(low)), max(value, float(high))


# --- BatchNorm ------------------------------------------------------------------------------------------------------------------------


class Watcher:
    """Looks, while it is entered, at what the BatchNorm layers of a network see in the passes that are made anyway.

        watcher = Watcher(trunk)
        with watcher:
            *_, seen = extract(trunk, ..., extra_output=watcher.taken)
        curve = watcher.curve(seen)

    The network must be in eval mode and take (batch, ...) as its first argument. A row for each image holds mean and variance of each channel
    of each layer. A layer that runs several times in a pass is averaged over its calls. NaN, and left out of the curve, are layers that
    never run, and calls whose batch is not the network's (patches folded into it: no telling whose they are); layers without running
    statistics have no place in a row.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._layers = _layers(module)
        self._known = {name: _running_statistics(layer) for name, layer in self._layers.items()}
        self._images = 0
        self._calls: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._row = torch.zeros(0, 0)
        self._hooks: list[RemovableHandle] = []

    @property
    def channels(self) -> int:
        """Channels of all layers together: half the numbers of a row."""
        return sum(len(known.mean) for known in self._known.values())

    def __enter__(self) -> "Watcher":
        # The network's own hook first: where the network is a single BatchNorm layer, both are hooks of one module.
        self._hooks.append(self._module.register_forward_pre_hook(self._begin))
        self._hooks += [layer.register_forward_pre_hook(partial(self._look, name)) for name, layer in self._layers.items()]
        self._hooks.append(self._module.register_forward_hook(self._end))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._images = len(inputs[0])
        self._calls.clear()

    def _look(self, name: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        maps = inputs[0].detach()
        if len(maps) == self._images > 0:
            # A few images at a time: parts that stay in a CPU's cache are four times as fast.
            few = max(1, _NUMBERS // maps[0].numel()) if maps.device.type == "cpu" else len(maps)
            parts = [_moments(part) for part in maps.split(few)]
            mean, variance = (torch.cat(column) for column in zip(*parts, strict=True))
            self._calls.setdefault(name, []).append((mean, variance))

    def _end(self, *_: object) -> None:
        row = torch.full((self._images, 2 * self.channels), math.nan)
        place = 0
        for name, known in self._known.items():
            width = len(known.mean)
            # Moved only here: a wait for the device in each layer would slow the pass.
            pairs = [(m.cpu().double(), v.cpu().double()) for m, v in self._calls.get(name, [])]
            if pairs:
                mean = torch.stack([m for m, _ in pairs]).mean(0)
                row[:, place : place + width] = mean.float()
                row[:, place + width : place + 2 * width] = torch.stack([v + (m - mean) ** 2 for m, v in pairs]).mean(0).float()
            place += 2 * width
        self._row = row
        self._calls.clear()

    def taken(self) -> Tensor:
        """Return the rows of the last pass: (images, 2 * channels)."""
        return self._row

    def curve(
        self, rows: Tensor, sequential: Mapping[str, float] | None = None, reference: "Reference | None" = None, seed: int = 0
    ) -> tuple[BatchNormShift, ...]:
        """Return the shift of each layer in the network's order; none where there are fewer than two images.

        Args:
            rows: what `taken` gave, one a row and image, in any number of passes.
            sequential: what the function of this name gave.
            reference: gives the floors, where it was measured on this network at the same input size.
            seed: of the halves and the bootstrap.
        """
        floors = {layer.name: layer.raw for layer in reference.layers} if reference else {}
        found, place = [], 0
        for name, known in self._known.items():
            width = len(known.mean)
            means, variances = (rows[:, place + k * width : place + (k + 1) * width].double().numpy() for k in (0, 1))
            place += 2 * width
            if len(means) > 1 and not np.isnan(means).any():
                raw = _distance(means, variances, known, seed)
                found.append(BatchNormShift(name, *raw, (sequential or {}).get(name), floors.get(name)))
        return tuple(found)


def sequential(module: nn.Module, batches: Iterable[Tensor], seed: int = 0) -> dict[str, float]:
    """Measure D with all earlier BatchNorm layers normalizing with the images' own statistics, in one pass.

    Running statistics and training flags stay as they are. Call it outside of a Watcher on the same network, which would watch this, too.

    Args:
        batches: inputs (batch, 3, size, size) on the network's device; the first 128 images are used.

    Returns:
        D by name of the layer, nothing where the network has no BatchNorm or there are fewer than two images.
    """
    parts = _first_images(batches) if _layers(module) else []
    watcher = Watcher(module)
    rows = []
    with _in_eval(module), watcher, _own_statistics(module), torch.inference_mode():
        for part in parts:
            module(part)
            rows.append(watcher.taken())
    return {layer.name: layer.raw for layer in watcher.curve(torch.cat(rows), seed=seed)} if rows else {}


def random_reference(backbone: Backbone, batches: Iterable[Tensor], seed: int) -> Backbone:
    """Return the same architecture with random weights, its running statistics set by one pass over images, so that activations are scaled.

    Args:
        batches: inputs (batch, 3, size, size) on the CPU; the first 128 images are used.
        seed: of the weights.

    Raises:
        DataError: fewer than two images.
    """
    parts = _first_images(batches)
    if not parts:
        raise DataError("expected at least 2 images to scale a random network with, found fewer. Give it the images of the profile.")
    fresh = catalogue.load(backbone.name, catalogue.NONE, size=parts[0].shape[-1], seed=seed)
    momenta = [(layer, layer.momentum) for layer in _layers(fresh.module).values()]
    with _in_eval(fresh.module), torch.no_grad():
        for layer, _ in momenta:
            layer.momentum = None  # PyTorch's word for the plain average over batches
            layer.train()
        for part in parts:
            fresh.module(part)
    for layer, momentum in momenta:
        layer.momentum = momentum
    return fresh


def _moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance over the pixels of each image and channel, around the image's own mean: squares would cancel far from 0."""
    pixels = maps.float().flatten(2) if maps.dim() > 2 else maps.float()[..., None]
    mean = pixels.mean(2, keepdim=True)
    return mean[..., 0], (pixels - mean).square_().mean(2)


def _layers(module: nn.Module) -> dict[str, _BatchNorm]:
    return {name: m for name, m in module.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def _running_statistics(layer: _BatchNorm) -> _Known:
    mean, variance = (t.detach().cpu().double().numpy() for t in (layer.running_mean, layer.running_var) if t is not None)
    weights = layer.weight.detach().abs().cpu().double().numpy() if layer.affine else np.ones_like(mean)
    # Residual branches may start with all factors zero.
    weights = weights if weights.sum() > 0 else np.ones_like(mean)
    return _Known(mean, variance, weights / weights.sum(), layer.eps, math.inf)


def _first_images(batches: Iterable[Tensor]) -> list[Tensor]:
    """Return the first 128 images in parts of nearly equal size (a small last batch would have poor statistics), none of a single one."""
    taken: list[Tensor] = []
    left = FIRST_IMAGES
    for batch in batches:
        taken.append(batch[:left])
        left -= len(taken[-1])
        if left == 0:
            break
    count = FIRST_IMAGES - left
    return list(torch.cat(taken).tensor_split(math.ceil(count / BATCH))) if count > 1 else []


@contextmanager
def _in_eval(module: nn.Module) -> Iterator[None]:
    before = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in before:
            m.training = training


@contextmanager
def _own_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers normalize with each batch's statistics; without running statistics they do, and there is nothing to update."""
    before = [(layer, layer.running_mean, layer.running_var) for layer in _layers(module).values()]
    try:
        for layer, _, _ in before:
            layer.running_mean = layer.running_var = None
        yield
    finally:
        for layer, mean, variance in before:
            layer.running_mean, layer.running_var = mean, variance


# --- references -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TapStatistics:
    """Mean and variance of each channel of one tap, globally averaged over its maps, over the images of a reference."""

    name: str
    mean: tuple[float, ...]
    variance: tuple[float, ...]


@dataclass(frozen=True)
class Reference:
    """The content of a .refstats.json file: a network's statistics on images like those that it was trained on.

    Attributes:
        backbone, weights: name of the network and fingerprint of its weights.
        size: input side, pixels; images: how many it was measured on.
        taps: first to last. layers: what its BatchNorm layers show on these images; `raw` of each is the floor.
    """

    backbone: str
    weights: str
    size: int
    images: int
    taps: tuple[TapStatistics, ...]
    layers: tuple[BatchNormShift, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Reference":
        """Read what `to_json` gave."""
        taps = tuple(TapStatistics(t["name"], tuple(t["mean"]), tuple(t["variance"])) for t in content["taps"])
        layers = tuple(BatchNormShift(**layer) for layer in content["layers"])
        return cls(content["backbone"], content["weights"], content["size"], content["images"], taps, layers)


def measure_reference(
    backbone: Backbone, root: Path, rows: Sequence[Row], size: int, device: torch.device, progress: Callable[[int], None]
) -> Reference:
    """Measure a reference on images that look like the source's (500 or more) in one pass, and the sequential one where BatchNorm is.

    Args:
        root: folder that the rows' paths start from.
        size: input side, pixels.
        progress: called with the number of images done so far.

    Raises:
        DataError: fewer than two images. BackboneError: the network cannot be cut.
    """
    if len(rows) < 2:
        raise DataError(f"expected images like those that the weights were trained on, found {len(rows)}. Give 500 or more.")
    with _in_eval(backbone.module):
        trunk = cutting.cut(backbone, backbone.tap_names).to(device)
        trunk.to(memory_format=torch.channels_last)
        images, first = (Images(root, part, backbone.transforms.at(size)) for part in (rows, rows[:FIRST_IMAGES]))
        with Watcher(trunk) as watcher:
            *features, seen = extract(trunk, [(1,)] * len(backbone.tap_names), images, device, progress, watcher.taken)
        batches = (normalize(pixels.to(device), first.transforms) for _, pixels in first.batches(batch_ranges(len(first), BATCH)))
        curve = watcher.curve(seen, sequential(trunk, batches))
    pooled = [(name, x.double()) for name, x in zip(backbone.tap_names, features, strict=True)]
    taps = tuple(TapStatistics(name, _rounded(x.mean(0)), _rounded(x.var(0))) for name, x in pooled)
    return Reference(backbone.name, backbone.fingerprint, size, len(rows), taps, curve)


def _rounded(values: Tensor) -> tuple[float, ...]:
    """Six digits: half the file, and a millionth is far below what any sample tells."""
    return tuple(float(f"{v:.6g}") for v in values.tolist())


def tap_shift(features: Mapping[str, Tensor], reference: Reference, seed: int = 0) -> tuple[TapShift, ...]:
    """Return the distance of pooled features from a reference at each tap that both have, first to last.

    The formula is that of the BatchNorm layers, with equal weights and with deviations below a hundredth of their tap's raised to it. The
    very images of the reference come out a few / n below 0: they are nearer to it than other images of the source.

    Args:
        features: by tap, (n, at least its channels), the global averages first, as `extract` gives them; n at least 2.
        seed: of the halves and the bootstrap.
    """
    found = []
    for tap in (t for t in reference.taps if t.name in features):
        mean, variance = np.array(tap.mean), np.array(tap.variance)
        eps = max(float(variance.mean()) * 1e-4, 1e-24)
        known = _Known(mean, variance, np.full(len(mean), 1 / len(mean)), eps, reference.images)
        means = features[tap.name][:, : len(mean)].double().cpu().numpy()
        found.append(TapShift(tap.name, *_distance(means, np.zeros_like(means), known, seed)))
    return tuple(found)


def write_reference(reference: Reference, folder: Path) -> Path:
    """Write `<backbone>-<8 digits of the content's md5>.refstats.json` into a folder, completely or not at all; return its path."""
    content = (json.dumps(reference.to_json()) + "\n").encode()
    path = folder / f"{reference.backbone.replace(':', '-')}-{_md5(content)}{SUFFIX}"
    write_bytes(content, path)
    return path


def read_reference(path: Path, backbone: Backbone) -> Reference:
    """Read a reference of this network.

    Raises:
        BackboneError: the file is missing, changed since it was written, no reference of this format, or one of another network or weights.
    """

    def refused(expected: str, found: object) -> BackboneError:
        return BackboneError(f"expected {expected} in {path}, found {found}. Measure it again with the weights that you use.")

    try:
        content = path.read_bytes()
    except OSError as error:
        raise refused("reference statistics", f"no file that can be read ({error.strerror})") from error
    if path.name.removesuffix(SUFFIX).rpartition("-")[2] != _md5(content):
        raise refused("the content whose md5 stands in the name", f"{_md5(content)}: it was changed or renamed")
    try:
        values = json.loads(content)
        if values["format"] != FORMAT:
            raise refused(f"reference statistics of format {FORMAT}", repr(values["format"]))
        reference = Reference.from_json(values)
    except (ValueError, LookupError, TypeError) as error:
        raise refused("reference statistics as JSON", f"something else ({type(error).__name__}: {error})") from error
    if reference.backbone != backbone.name:
        raise refused(f"reference statistics of {backbone.name}", f"those of {reference.backbone}")
    if reference.weights != backbone.fingerprint:
        raise refused(f"reference statistics of the weights {backbone.fingerprint}", f"those of {reference.weights}")
    return reference


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()[:8]
