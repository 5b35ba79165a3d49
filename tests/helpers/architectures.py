"""One network under one case, from its taps to a reloaded model: what test_architectures.py and benchmarks/architectures.py check."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.helpers.decisions import decision_for
from tests.helpers.images import paint
from tlpipeline.backbones import catalogue, classifier
from tlpipeline.backbones import taps as cutting
from tlpipeline.backbones.classifier import Classifier, Description, probabilities
from tlpipeline.backbones.features import pool, pooling_at
from tlpipeline.backbones.taps import Backbone, Tap
from tlpipeline.choice.cases import CASES, Case
from tlpipeline.choice.decision import Decision
from tlpipeline.data import dataset
from tlpipeline.data.loader import Images, normalize

# One batch, four images for each of two workers; a single validation image cannot outvote fine-tuning.
CLASSES = ("class0", "class1")
IMAGES = {"train": (4, 4), "val": (1, 0), "test": (2, 2)}
BATCH = 8


def smallest(backbone: Backbone) -> int:
    """Return the smallest side that makes sense to the pipeline: 32 pixels, or what the network needs, in whole patches."""
    least = max(backbone.minimum, 32)
    return cutting.input_size(backbone, -(-least // backbone.multiple) * backbone.multiple, 0)


def outline(name: str, size: int | None = None) -> Backbone:
    """Return a network of the catalogue without memory behind its tensors, for PyTorch's meta device: nothing is drawn or computed."""
    try:
        with torch.device("meta"):
            return catalogue.load(name, catalogue.NONE, size=size)
    except NotImplementedError:  # PyTorch's: regnet computes its widths with tensors, which the meta device cannot
        backbone = catalogue.load(name, catalogue.NONE, size=size)
        backbone.module.to("meta")
        return backbone


def scaled(name: str, batch: Tensor, size: int) -> dict[str, Tensor]:
    """Return random weights whose running statistics are those of a batch: without them hardly anything of an image arrives at the last tap."""
    fresh = catalogue.load(name, catalogue.NONE, size=size, seed=0).module.eval()
    for module in fresh.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = None  # PyTorch's word for a plain average
            module.train()
    with torch.no_grad():
        fresh(batch)
    return fresh.state_dict()


def described(backbone: Backbone, size: int) -> tuple[Tap, ...]:
    """Return the taps of an outline at an input side."""
    with torch.device("meta"):
        return cutting.measure_taps(backbone, size)


def paint_images(folder: Path) -> Path:
    """Write a few images as {train,val,test}/<class>/<index>.png and their manifest beside; return the manifest's path."""
    for label, name in enumerate(CLASSES):
        for place, (side, counts) in enumerate(IMAGES.items()):
            (folder / "images" / side / name).mkdir(parents=True)
            for index in range(counts[label]):
                paint(label, 10 * place + index).save(folder / "images" / side / name / f"{index}.png")
    manifest = dataset.ingest(folder / "images", {}, lambda done, total: None)
    dataset.write_manifest(manifest, folder / "manifest.parquet", folder / "quarantine.csv")
    return folder / "manifest.parquet"


def read_at(names: Sequence[str], case: Case) -> list[str]:
    """Return where a head reads in this case, deepest first: at the last tap, or at a middle one and at two before it."""
    middle = len(names) // 2
    return [names[i] for i in ((middle, middle // 2, 0) if case.keep == "slice" else (len(names) - 1,))]


def only_read(backbone: Backbone) -> Backbone:
    """Return the network with those taps alone that some case reads: describing them all takes longer."""
    read = {name for case in CASES for name in read_at(backbone.tap_names, case)}
    return replace(backbone, tap_names=tuple(name for name in backbone.tap_names if name in read))


def decide(names: Sequence[str], taps: Sequence[Tap], size: int, case: Case) -> Decision:
    """Return a decision for this row on a network with taps of these names; those that are read must be described."""
    by_name = {tap.name: tap for tap in taps}
    return decision_for(case, [pooling_at(by_name[name]) for name in read_at(names, case)], size)


@dataclass(frozen=True)
class Trained:
    """What training left.

    Attributes:
        start: the backbone's tensors before.
        stepped: the classifier's right after the step, whether or not validation kept them.
        folder: of the exported model.
        chances: what the trained model said of the images before it was exported, None where it is gone.
    """

    start: Mapping[str, Tensor]
    stepped: Mapping[str, Tensor]
    folder: Path
    chances: Tensor | None


def step(
    backbone: Backbone, start: Mapping[str, Tensor], decision: Decision, images: Images, labels: Sequence[int], shown: Images, folder: Path
) -> Trained:
    """Build the case's classifier, take one step on some images in this process, look at those that are shown, and export it."""
    torch.manual_seed(0)
    net = Classifier(backbone, decision.readings, len(CLASSES), decision.freeze == "kept").train()
    nn.init.normal_(net.head.weight, std=0.01)  # a head of zeros passes no gradient on
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01, weight_decay=5e-4)
    nn.functional.cross_entropy(net(inputs(images)), torch.tensor(labels)).backward()
    optimizer.step()
    classifier.save(net, Description(backbone.name, decision.slice, decision.readings, CLASSES, images.transforms), folder)
    return Trained(start, net.state_dict(), folder, probabilities(net, shown, torch.device("cpu"), lambda done: None))


@contextmanager
def undrawn() -> Iterator[None]:
    """Leave the tensors of networks that are built as the memory was: what is loaded must not depend on them, and drawing takes longest."""
    names = ("kaiming_normal_", "kaiming_uniform_", "normal_", "trunc_normal_", "uniform_", "xavier_uniform_")
    before = {name: getattr(nn.init, name) for name in names}
    try:
        for name in names:
            setattr(nn.init, name, lambda tensor, *_, **__: tensor)
        yield
    finally:
        for name, function in before.items():
            setattr(nn.init, name, function)


def inputs(images: Images) -> Tensor:
    """Return all images as one batch of normalized inputs."""
    ((_, pixels),) = images.batches([range(len(images))])
    return normalize(pixels, images.transforms)


def check(backbone: Backbone, decision: Decision, trained: Trained, images: Images) -> None:
    """Check what training left: the cut is real, frozen is frozen, the rest moved, and the reloaded model says the same of the images.

    The network is used up: it gets the trained tensors, because what a cut network says must be what the whole network computes at its taps.

    Raises:
        AssertionError: saying what is not so.
    """
    trunk = cutting.cut(backbone, [r.tap for r in decision.readings])
    kept, whole = trunk.state_dict().keys(), backbone.module.state_dict().keys()
    stored = load_file(trained.folder / classifier.WEIGHTS)
    found = {key.removeprefix("trunk.") for key in stored if key.startswith("trunk.")}
    assert found == kept, f"stored are not the tensors of the cut: {sorted(found ^ kept)[:3]}"
    assert found < whole, "nothing was cut off"
    assert not any("aux" in key.lower() for key in found), "an auxiliary head was kept"
    assert all(bool(value.isfinite().all()) for value in trained.stepped.values()), "training gave values that are not finite"
    parameters = {name for name, _ in trunk.named_parameters()}
    moved = {key for key in kept if not torch.equal(trained.stepped[f"trunk.{key}"], trained.start[key])}
    if decision.freeze == "kept":
        assert not moved, f"frozen tensors moved: {sorted(moved)[:3]}"
        changed = [key for key in found if not torch.equal(stored[f"trunk.{key}"], trained.start[key])]
        assert not changed, f"frozen tensors are exported otherwise: {changed[:3]}"
    else:
        # Stochastic depth can leave out a block for all of so few images.
        still = sorted(parameters - moved)
        assert len(still) <= len(parameters) / 10, f"{len(still)} of {len(parameters)} parameters did not move: {still[:3]}"
    assert bool(stored["head.weight"].any()), "the head was not trained"
    with undrawn():
        loaded, description = classifier.load(trained.folder)
    assert (description.cut, description.readings) == (decision.slice, decision.readings), "the description is of another cut"
    chances = probabilities(loaded, images, torch.device("cpu"), lambda done: None)
    assert chances.shape == (len(images), len(CLASSES)), f"predictions have the shape {tuple(chances.shape)}"
    if trained.chances is not None:
        assert torch.equal(chances, trained.chances), "the reloaded model predicts otherwise"
    expected = by_the_whole_network(backbone, decision, stored, inputs(images))
    furthest = float((chances - expected).abs().max())
    if furthest >= 1e-4:
        # Deep networks with random weights amplify the last digits: in double precision both must be the same function all the same.
        batch = inputs(images).double()
        with torch.inference_mode():
            ours = loaded.double().eval()(batch).softmax(1)
        backbone.module.double()
        furthest = float((ours - by_the_whole_network(backbone, decision, {k: v.double() for k, v in stored.items()}, batch)).abs().max())
        backbone.module.float()
    assert furthest < 1e-4, f"the whole network with these tensors says otherwise, by up to {furthest:.2g}"


def by_the_whole_network(backbone: Backbone, decision: Decision, stored: Mapping[str, Tensor], batch: Tensor) -> Tensor:
    """Return the probabilities that follow from what the uncut network, given the stored tensors, computes at the taps."""
    seen: dict[str, Tensor] = {}
    for key, value in backbone.module.state_dict().items():
        value.copy_(stored.get(f"trunk.{key}", value))
    modules = dict(backbone.module.named_modules())
    hooks = [
        modules[r.tap].register_forward_hook(
            lambda _module, _inputs, out, tap=r.tap: seen.update({tap: (out if isinstance(out, Tensor) else out[0]).clone()})
        )
        for r in decision.readings
    ]
    with torch.inference_mode():
        backbone.module.eval()(batch)
    for hook in hooks:
        hook.remove()
    features = [pool(channels_first(seen[r.tap], backbone.layouts.get(r.tap, "")), r.grids) for r in decision.readings]
    return nn.functional.linear(torch.cat(features, 1), stored["head.weight"], stored["head.bias"]).softmax(1)


def channels_first(value: Tensor, layout: str) -> Tensor:
    """Return a tap's output as (batch, channel, height, width) or (batch, channel)."""
    if layout == "tokens0":
        side = round(value.shape[1] ** 0.5)
        return value.reshape(len(value), side, side, -1).permute(0, 3, 1, 2)
    if layout.startswith("tokens"):
        return torch.cat([value[:, 0], value[:, int(layout.removeprefix("tokens") or 1) :].mean(1)], 1)
    return value.permute(0, 3, 1, 2) if layout == "nhwc" else value
