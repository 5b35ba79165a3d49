"""Profiling: how well a pretrained network's features separate the classes, measured on a bounded sample of the training images.

One pass in eval mode gives the features at all taps. At each tap an exact leave-one-out ridge probe measures how well they predict the labels.
The probe pools as the head will.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from tlpipeline.backbones import taps as cutting
from tlpipeline.backbones.features import FeatureExtractor, numerics_key, pooling_at
from tlpipeline.backbones.pooling import TapPooling
from tlpipeline.backbones.taps import Backbone
from tlpipeline.data import splits
from tlpipeline.data.cache import Store
from tlpipeline.data.contents import ImageFolder
from tlpipeline.data.dataset import Manifest, Row
from tlpipeline.data.loader import FORMAT, Images, batch_ranges, normalize
from tlpipeline.data.splits import TRAIN, VAL
from tlpipeline.errors import DataError
from tlpipeline.params import ProfileParams
from tlpipeline.profiling.gram import CONFIRMED_ON, GramMatrices, gram_matrices
from tlpipeline.profiling.ntk import BUCKETS, GradientSketcher, tangent_kernel
from tlpipeline.profiling.probes import head_similarity
from tlpipeline.profiling.profile import Head, Probe, Profile, Tangent, slice_point
from tlpipeline.progress import Event, Progress
from tlpipeline.stats import pack, wilson

HELD_OUT = 512
GRADIENT_BATCH = 64
EACH_CLASS = 8  # images of a class that a probe needs
TANGENT_IMAGES = 512
SOLVERS = 0.3  # see `measure`
SLOWER = 2.1  # time of an operation of a solver against one of a convolution: 1.9 to 2.6 by the clock (benchmarks/speed.py solvers)


def measure(
    backbone: Backbone,
    root: ImageFolder,
    manifest: Manifest,
    size: int,
    params: ProfileParams,
    undecided: Callable[[Profile], bool],
    progress: Progress,
    device: torch.device,
    store: Store | None = None,
    half: bool = False,
    solvers: float = SOLVERS,
) -> Profile:
    """Profile the training images of a data set; the sample is doubled while the choice is open.

    Args:
        backbone: uncut.
        root: folder that the manifest's paths start from.
        size: input side, pixels.
        undecided: returns whether a larger sample could still change the choice.
        store: keeps what is computed of each image, for later stages and runs.
        half: the network computes features in bfloat16, as the frozen cases will; gradients are in float32.
        solvers: largest cost of the solvers when the sample grows, as a share of the cost of the passes.

    Raises:
        DataError: there are no training images.
    """
    rows = manifest.used(TRAIN)
    if not rows:
        raise DataError("expected training images to profile, found none. Check the quarantine list of ingest.")
    labels = {label: i for i, label in enumerate(manifest.classes)}
    passes = _Passes(backbone, root, size, device, progress, store or Store(), half)
    val = manifest.used(VAL)
    selecting, judges = (
        sample([r for r in val if splits.in_selection_half(r.key)], HELD_OUT, params.seed),
        sum(not splits.in_selection_half(r.key) for r in val),
    )
    drawn, kernels, profile = _large_enough(passes, rows, labels, judges, params, undecided, solvers)
    there = {r.label for r in drawn}
    held = [r for r in selecting if r.label in there]
    if held and profile.cut is not None:
        truth = np.array([labels[r.label] for r in held])
        profile = kernels.confirm(profile, passes.features(held), truth, progress)
    if params.tangent:
        profile = replace(profile, tangent=passes.tangent(kernels, drawn, profile.multi.taps, params.seed))
    return profile


def _large_enough(
    passes: "_Passes",
    rows: Sequence[Row],
    labels: Mapping[str, int],
    judges: int,
    params: ProfileParams,
    undecided: Callable[[Profile], bool],
    solvers: float,
) -> tuple[list[Row], GramMatrices, Profile]:
    """Probe a sample, and double it while the choice is open and the solvers stay cheap beside the passes.

    Args:
        rows, judges: as in `_of_sample`; labels: class name to index; solvers: as in `measure`.

    Returns:
        The images of the last sample, the Gram matrices of their features at each tap, and the profile.
    """
    wanted = min(max(params.images, EACH_CLASS * len({r.label for r in rows})), params.images_max)
    penalties: dict[tuple[int, ...], float] = {}
    drawn = sample(rows, wanted, params.seed)
    while True:
        read = passes.features(drawn)
        groups = [r.group for r in drawn] if any(r.group for r in drawn) else None
        kernels = gram_matrices(passes.readings, read, np.array([labels[r.label] for r in drawn]), penalties, groups)
        passes.progress(Event("profile", len(drawn), len(drawn), f"probes of {len(drawn)} images at {len(passes.taps)} taps"))
        profile = _of_sample(passes, rows, judges, read, kernels, params.seed)
        wanted, penalties = 2 * len(drawn), kernels.penalties
        more = wanted <= params.images_max and len(drawn) < len(rows)
        if not more or solving(passes.readings, wanted, profile.classes) > solvers * passes.cost_of(wanted, params.tangent):
            break
        if not undecided(profile):
            break
        drawn = sample(rows, wanted, params.seed)
    return drawn, kernels, profile


def _of_sample(
    passes: "_Passes",
    rows: Sequence[Row],
    judges: int,
    read: Sequence[Tensor],
    kernels: GramMatrices,
    seed: int,
) -> Profile:
    """Return the profile of a sample's features at all taps, without the check on held-out images.

    Args:
        rows: all training images; judges: how many validation images select nothing.
    """
    backbone, logits = passes.backbone, len(passes.taps)
    counts = Counter(r.label for r in rows)
    # Rounded: the last digits depend on how many threads sum.
    chances = read[logits].softmax(1).double().numpy() if backbone.source_classes else None
    similarity = None if chances is None else round(head_similarity(chances, kernels.labels, groups=kernels.groups), 6)
    with threadpool_limits(1):  # factorizations of a sample's size take longer with two
        probed = _probe(passes.taps, passes.readings, kernels, seed)
    return Profile(
        backbone=backbone.name,
        weights=backbone.fingerprint,
        size=passes.transforms.size,
        normalization=backbone.normalization,
        images=len(rows),
        classes=len(counts),
        majority=max(counts.values()) / len(rows),
        smallest=min(counts.values()),
        largest=max(counts.values()),
        validation=judges,
        sampled=len(kernels.labels),
        held_out=0,
        probed=len(np.unique(kernels.labels)),
        head_similarity=similarity,
        **probed,
    )


class _Passes:
    """Passes of a network over images: features at all taps, and gradients. The results are cached by the images' content."""

    def __init__(
        self, backbone: Backbone, root: ImageFolder, size: int, device: torch.device, progress: Progress, store: Store, half: bool
    ) -> None:
        self.backbone, self.root, self.device, self.progress, self.store = backbone, root, device, progress, store
        self.half, self.transforms = half, backbone.transforms.at(size)
        self.taps = cutting.measure_taps(backbone, size)
        self.readings = [pooling_at(tap) for tap in self.taps]
        logits = backbone.source_classes > 0
        trunk = self._cut(backbone, [t.name for t in self.taps], logits)
        self.reader = FeatureExtractor(
            store,
            backbone,
            trunk,
            self.readings,
            self.transforms,
            device,
            logits=logits,
            half=half,
        )

    def _cut(self, backbone: Backbone, taps: Sequence[str], logits: bool = False) -> nn.Module:
        return cutting.cut(backbone, taps, logits=logits).to(self.device).to(memory_format=torch.channels_last)

    def features(self, wanted: Sequence[Row]) -> list[Tensor]:
        """Return the features at each tap: (images, features) each.

        The last entry has the source head's logits, if the network has one.
        """
        images = Images(self.root, wanted, self.transforms)
        report = self._reporter("features", int(self.reader.missing(wanted).sum()))
        return [rows.all() for rows in self.reader.extract(images, report)]

    def inputs(self, rows: Sequence[Row]) -> Iterator[Tensor]:
        """Yield inputs (batch, 3, size, size) on the CPU."""
        batches = Images(self.root, rows, self.transforms).batches(batch_ranges(len(rows), GRADIENT_BATCH))
        return (normalize(pixels, self.transforms) for _, pixels in batches)

    def tangent(self, kernels: GramMatrices, drawn: Sequence[Row], taps: Sequence[str], seed: int) -> Tangent:
        """Return the tangent probe on at most TANGENT_IMAGES of the drawn images, compared with a head on these taps."""
        few = {r.md5 for r in sample(drawn, TANGENT_IMAGES, seed)}
        at = [i for i, r in enumerate(drawn) if r.md5 in few]
        chosen = [drawn[i] for i in at]
        name = self.taps[-1].name
        known = cutting.tap_fingerprints(self.backbone, [name])[name]
        column = self.store.column(
            f"{known}|gradients|{seed}|{BUCKETS}|{self.transforms}|{numerics_key(self.device, self.transforms.size, False)}|{FORMAT}",
            f"{self.backbone.name} gradients at {name}",
        )
        new = [row for row, there in zip(chosen, column.has([r.md5 for r in chosen]), strict=True) if not there]
        report = self._reporter("gradients", len(new))
        sketcher = GradientSketcher(self._cut(self.backbone, [name]), self.device, seed) if new else None
        done = 0
        for batch in self.inputs(new):
            assert sketcher is not None
            part = new[done : done + len(batch)]
            column.add([row.md5 for row in part], sketcher.sketch(batch))
            done += len(batch)
            report(done)
        gradients = tangent_kernel(column.rows([r.md5 for r in chosen]).all())
        names = [t.name for t in self.taps]
        return kernels.tangent([names.index(tap) for tap in taps], gradients, at)

    def cost_of(self, images: int, tangent: bool) -> float:
        """Return the operations of the passes over a sample of so many images; a backward pass counts two."""
        return self.taps[-1].forward_ops * (images + 3 * min(images, TANGENT_IMAGES) * tangent)

    def _reporter(self, what: str, images: int) -> Callable[[int], None]:
        return lambda done: self.progress(Event("profile", done, images, f"{what} of {images} images at {len(self.taps)} taps"))


def sample(rows: Sequence[Row], wanted: int, seed: int) -> list[Row]:
    """Draw rows, classes in proportion but each at least once, by a hash of seed and content, so that neither order nor names matter.

    With more classes than an eighth of the sample, only some classes are drawn: as many as fill it with at most eight images each.
    """

    def rank(text: str) -> str:
        return hashlib.md5(f"{seed}:{text}".encode(), usedforsecurity=False).hexdigest()

    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda r: rank(r.md5)):
        groups.setdefault(row.label, []).append(row)
    if len(groups) > max(wanted / EACH_CLASS, 1) and sum(len(g) for g in groups.values()) > wanted:
        kept: list[str] = []
        room = wanted
        for label in sorted(groups, key=lambda label: rank(groups[label][0].md5)):
            if room < EACH_CLASS and len(kept) >= 2:
                break
            kept.append(label)
            room -= min(len(groups[label]), EACH_CLASS)
        groups = {label: groups[label] for label in kept}
    total = sum(len(g) for g in groups.values())
    if total <= wanted:
        return sorted((r for g in groups.values() for r in g), key=lambda r: r.md5)
    quota = {label: max(1, math.floor(wanted * len(g) / total)) for label, g in groups.items()}
    by_remainder = sorted(groups, key=lambda label: (-(wanted * len(groups[label]) / total % 1), rank(groups[label][0].md5)))
    for label in by_remainder[: max(0, wanted - sum(quota.values()))]:
        quota[label] += 1
    return sorted((r for label, g in groups.items() for r in g[: quota[label]]), key=lambda r: r.md5)


def solving(readings: Sequence[TapPooling], images: int, classes: int) -> float:
    """Return what the solvers cost for a sample of so many images: inner products, probes, and the two heads that confirm a slice.

    In operations of a convolution, which are counted and not timed, so that equal runs decide alike.

    A probe costs two factorizations (after the first sample, which tries all penalties), and there are four heads besides the taps. A head takes
    about 100 passes over a square matrix of as many rows as there are images, each with two products.
    """
    widths = [sum(r.blocks) for r in readings]
    products = sum(2 * images**2 * width for width in widths)
    probes = sum(2 * images * min(images, width) ** 2 for width in [*widths, *4 * [images]])
    heads = 2 * 100 * 4 * classes * min(images, CONFIRMED_ON) ** 2
    return SLOWER * float(products + probes + heads)


def _probe(taps: Sequence[cutting.Tap], readings: Sequence[TapPooling], kernels: GramMatrices, seed: int) -> dict[str, Any]:
    """Return the parts of the profile that follow from the kernels: probes, heads, learning curve."""
    labels, names = kernels.labels, [t.name for t in taps]
    classes = np.unique(labels)
    fits = [kernels.fit([i]) for i in range(len(taps))]
    accuracy = [float(right.mean()) for _, right in fits]
    probes = []
    for i, (tap, read, (fit, right)) in enumerate(zip(taps, readings, fits, strict=True)):
        difference = right.astype(float) - fits[-1][1]
        earlier = sorted(range(i), key=lambda j: (-accuracy[j], -j))[:2]
        low, high = wilson(int(right.sum()), len(labels))
        probes.append(
            Probe(
                name=tap.name,
                channels=tap.channels,
                height=tap.height,
                width=tap.width,
                parameters=tap.parameters,
                forward_ops=tap.forward_ops,
                grids=read.grids,
                accuracy=accuracy[i],
                low=low,
                high=high,
                balanced=float(np.mean([right[labels == c].mean() for c in classes])),
                gain=float(difference.mean()),
                gain_error=float(difference.std() / math.sqrt(len(labels))),
                penalty=fit.penalty,
                correct=pack(right),
                head=tuple(names[j] for j in sorted([i, *earlier], reverse=True)),
            )
        )

    def head(read: Sequence[str]) -> Head:
        return kernels.head([names.index(name) for name in read], read)

    at = slice_point(np.stack([right for _, right in fits], axis=1))
    multi = head(probes[-1].head)
    return {
        "taps": tuple(probes),
        "last": head(names[-1:]),
        "multi": multi,
        "cut": None if at is None else head(probes[at].head),
        "learning_curve": kernels.learning_curve([names.index(name) for name in multi.taps], multi.accuracy, seed),
    }
