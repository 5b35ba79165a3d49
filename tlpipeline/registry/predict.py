"""Prediction: the transforms are stored with the model, so predictions are prepared as the evaluation was."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from tlpipeline import params
from tlpipeline.backbones import classifier
from tlpipeline.backbones.precision import enable_tf32
from tlpipeline.data import dataset, splits
from tlpipeline.data.loader import Images, batch_ranges
from tlpipeline.errors import DataError, WorkspaceError
from tlpipeline.export.provenance import Provenance
from tlpipeline.progress import Event, Progress, silent
from tlpipeline.registry import pictures, versions
from tlpipeline.registry.pictures import Picture, Pictures

if TYPE_CHECKING:
    from tlpipeline.export.files import Exported, Sample, Saving

_PART = 2048  # files whose predictions are computed before they are handed on
_COMPARED = 64  # images that an exported file is compared on


@dataclass(frozen=True)
class Prediction:
    """The prediction of a model for one image.

    Attributes:
        path: of the file, "" for an image in memory.
        label: the most likely class; probability: of that class.
        probabilities: of each class.
        distance: to the training images, 1 at the threshold; None where the model does not store it.
        known: whether the distance is below the threshold; None where there is none.
        error: why there is no prediction, "" if there is one.
        model: version or folder of the model.
    """

    path: str
    label: str
    probability: float
    probabilities: dict[str, float]
    distance: float | None = None
    known: bool | None = None
    error: str = ""
    model: str = ""

    def __str__(self) -> str:
        if self.error:
            return f"{self.path}  error: {self.error}"
        unlike = "  none of these" if self.known is False else ""
        return f"{self.path}  {self.label}  {self.probability:.4f}{unlike}".lstrip()

    def to_json(self) -> dict[str, Any]:
        """Return plain values; an image without a prediction has no label and no probability."""
        return {
            "path": self.path,
            "label": None if self.error else self.label,
            "probability": None if self.error else self.probability,
            "probabilities": self.probabilities,
            "distance": self.distance,
            "known": self.known,
            "error": self.error or None,
            "model": self.model,
        }


@dataclass(frozen=True)
class Source:
    """A model's folder, where it comes from, and the workspace of its images; None if there is none."""

    folder: Path
    provenance: Provenance
    root: Path | None = None
    version: versions.Version | None = None


def find_model(text: str, root: Path, place: Path | None = None) -> Source:
    """Return a model, given its folder or a version in the workspace's registry (name@v1, name#prod).

    Args:
        place: folder to fetch a version to that the workspace does not have; None fetches it into the workspace.

    Raises:
        RegistryError: there is no such version.
        WorkspaceError: it is no folder, and there is no workspace to ask for a version.
    """
    if Path(text).is_dir():
        return _folder(Path(text), root)
    if not (root / ".git").exists():
        raise WorkspaceError(
            f"expected a model folder, or a version in a workspace, found no folder {text} and no workspace at {root.resolve()}. Name the "
            "workspace with --workspace."
        )
    version = versions.resolve(root, text)
    return Source(versions.model_folder(root, version, place), versions.provenance_of(root, version), root, version)


def _folder(folder: Path, root: Path) -> Source:
    """Return a model folder, with the version that it is, if the workspace has registered it."""
    name = Provenance(str(folder))
    if not ((root / ".git").exists() and (root / "params.yaml").is_file()):
        return Source(folder, name)
    version = versions.find_folder(root, folder)
    if version is None:
        return Source(folder, name, root)
    return Source(folder, versions.provenance_of(root, version), root, version)


class Model:
    """A trained classifier, loaded once.

    Args:
        source: the model's folder, and where it comes from.
        root: the workspace where the network's own code is looked for, besides the installed packages.
        trust: networks as module:callable whose code may run, besides those that the workspace names.
        device: "cpu", "cuda", or "auto", which takes a GPU where there is one and the workspace's cluster.gpu allows it.

    Attributes:
        name: version of the model, or its folder.
        classes: names of the classes, in the order of the network's outputs.
        indices: number of each class in the class map of its workspace. It never changes, though outputs move when classes come and go.

    Raises:
        RegistryError: there is no model in the folder.
        BackboneError: its network is not trusted.
    """

    def __init__(self, source: Source, root: Path | None = None, trust: Collection[str] = (), device: str = "auto") -> None:
        def trusts(network: str, code_md5: str) -> bool:
            return network in trust or (root is not None and versions.names_network(root, network, code_md5))

        self._classifier, self._description = classifier.load(source.folder, root, trusts)
        self._source = source
        self._device = _device(device, root)
        self._classifier.to(self._device)
        self.name = source.provenance.model
        self.classes = self._description.classes
        self.indices = self._description.indices or tuple(range(len(self.classes)))

    def __repr__(self) -> str:
        return f"Model({self.name}, {self._description.architecture}, {len(self.classes)} classes)"

    def predict(self, images: "Picture | Sequence[Picture]") -> list[Prediction]:
        """Predict images; each goes through the transforms that the model was trained with.

        Args:
            images: one or several of: a path of an image file, a PIL image, an 8-bit array (H, W, 3) in RGB or (H, W) in gray.

        Raises:
            DataError: a file is missing or no image, or an array has another shape or type.
        """
        several = [images] if isinstance(images, str | Path | Image.Image | np.ndarray) else list(images)
        predictions = self._predict(several, silent, 0, len(several))
        if bad := next((p for p in predictions if p.error), None):
            raise DataError(f"expected an image at {bad.path}, but: {bad.error}. Name an image file, or leave it out.")
        return predictions

    def predict_files(self, inputs: Iterable[str | Path], progress: Progress = silent) -> Iterator[Prediction]:
        """Predict many files, and give each prediction when it is there; a file that cannot be read gives one with its `error`.

        Args:
            inputs: files, folders, patterns such as `photos/**/*.jpg`, and tables (.csv, .tsv, .parquet) with a column `path`.
            progress: is told how many images are done.

        Raises:
            DataError: a folder or pattern has no files, or a table cannot be read.
        """
        files = pictures.list_images(inputs)
        for part in batch_ranges(len(files), _PART):
            yield from self._predict([files[i] for i in part], progress, part.start, len(files))

    def _predict(self, images: Sequence[Picture], progress: Progress, before: int, total: int) -> list[Prediction]:
        if not images:
            return []
        transforms = self._description.transforms
        prepared = Pictures(images, transforms)

        def done(count: int) -> None:
            progress(Event("predict", before + count, total, f"{before + count} of {total} images"))

        batches = Images(Path(), prepared.rows, transforms, decoded=prepared)
        probabilities = classifier.probabilities(self._classifier, batches, self._device, done).tolist()
        return [
            self._prediction(row.path, values, prepared.problems.get(index, ""))
            for index, (row, values) in enumerate(zip(prepared.rows, probabilities, strict=True))
        ]

    def _prediction(self, path: str, probabilities: list[float], problem: str) -> Prediction:
        if problem:
            return Prediction(path, "", 0.0, {}, error=problem, model=self.name)
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        named = dict(zip(self.classes, probabilities, strict=True))
        return Prediction(path, self.classes[best], probabilities[best], named, model=self.name)

    # --- taking it away -----------------------------------------------------------------------------------------------------------------

    def export(
        self, onnx: str | Path | None = None, torch: str | Path | None = None, images: "str | Path | Sequence[str | Path] | None" = None
    ) -> "Export":
        """Write the model as files that need no tlpipeline: from decoded RGB images, uint8 (batch, height, width, 3), to probabilities.

        Each file is compared with the model before it takes its name. ONNX needs the extra `onnx`.

        Args:
            onnx: file for ONNX; torch: file for torch.export (.pt2).
            images: what to compare on: files, folders, patterns or tables; None takes test images of the workspace.

        Raises:
            BackboneError: the network cannot be exported, or a file computes something else.
            DataError: none of `images` can be read.
        """
        from tlpipeline.export import files

        sample = self._sample(images)
        self._classifier.cpu()
        try:
            given = self._classifier, self._description, self._source.provenance
            written = []
            if onnx is not None:
                written.append(files.write_onnx(*given, Path(onnx).expanduser(), sample))
            if torch is not None:
                written.append(files.write_torch(*given, Path(torch).expanduser(), sample))
            return Export(tuple(written), files.saving(self._classifier, self._description))
        finally:
            self._classifier.to(self._device)

    def _sample(self, images: "str | Path | Sequence[str | Path] | None") -> "Sample":
        """Return images with the model's probabilities of them."""
        from tlpipeline.export.files import Sample

        transforms = self._description.transforms
        if images is None:
            kind, files = "test images", self._test_images()
        else:
            kind, files = "images", pictures.list_images([images] if isinstance(images, str | Path) else images)
            files = files[:: -(-len(files) // _COMPARED)]
        decoded = [image for path in files if not isinstance(image := pictures.decode(path, 2 * transforms.resize), str)]
        arrays = [np.array(image, dtype=np.uint8) for image in decoded]
        if not arrays and images is not None:
            raise DataError("expected images to compare the file on, of which none can be read. Name others.")
        if not arrays:
            kind, random = "generated images, as no test image is here", np.random.default_rng(0)
            arrays = [random.integers(0, 256, (*random.integers(16, 400, 2), 3), dtype=np.uint8) for _ in range(16)]
        prepared = Pictures([Image.fromarray(array) for array in arrays], transforms)
        batches = Images(Path(), prepared.rows, transforms, decoded=prepared)
        probabilities = classifier.probabilities(self._classifier, batches, self._device, lambda done: None)
        return Sample(kind, arrays, probabilities.numpy())

    def _test_images(self) -> list[Path]:
        """Return test images of the model that are in the workspace as the model's manifest lists them, evenly spaced."""
        root, version = self._source.root, self._source.version
        if root is None:
            return []
        if version is not None:
            manifest = versions.manifest_of(root, version)
        elif (root / "manifest.parquet").is_file():
            manifest = dataset.read_manifest(root / "manifest.parquet")
        else:
            return []
        images = root / params.load(root / "params.yaml").data.images
        rows = manifest.used(splits.TEST)
        chosen = rows[:: max(1, -(-len(rows) // _COMPARED))]
        return [images / row.path for row in chosen if pictures.digest(images / row.path) == row.md5]


@dataclass(frozen=True)
class Export:
    """The files that a model was written to, and what the cut saves."""

    files: "tuple[Exported, ...]"
    saving: "Saving"
    folders: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return "\n".join([*self.folders, *map(str, self.files), str(self.saving)])


def _device(name: str, root: Path | None) -> torch.device:
    if name != "auto":
        return enable_tf32(torch.device(name))
    settings = None if root is None else root / "params.yaml"
    allowed = settings is None or not settings.is_file() or params.load(settings).cluster.gpu is not False
    return enable_tf32(torch.device("cuda" if allowed and torch.cuda.is_available() else "cpu"))
