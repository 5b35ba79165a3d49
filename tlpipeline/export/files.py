"""ONNX and torch.export files of a model, each compared with the model before it takes its name."""

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tlpipeline.backbones.classifier import Classifier, Description
from tlpipeline.data.decoding import Pixels
from tlpipeline.errors import BackboneError, PipelineError
from tlpipeline.export.graph import Graph, WholeGraph
from tlpipeline.export.provenance import Provenance
from tlpipeline.files import atomic_write

IMAGES, PROBABILITIES = "images", "probabilities"
TOLERANCE = 1e-4  # of a probability: what other kernels may round otherwise
WRONG = 0.02  # a file that differs by more computes something else
_AXES = ("batch", "height", "width")
_REPETITIONS = 15

Probabilities = npt.NDArray[np.float32]
Compute = Callable[[Pixels], Probabilities]  # images (batch, height, width, 3) to probabilities (batch, classes)


@dataclass(frozen=True)
class Sample:
    """Images that a file is compared on.

    Attributes:
        kind: what they are, such as "test images".
        images: decoded, each (height, width, 3).
        probabilities: of the model itself (images, classes).
    """

    kind: str
    images: Sequence[Pixels]
    probabilities: Probabilities


@dataclass(frozen=True)
class Exported:
    """A file that was written, and how it compares with the model.

    Attributes:
        path: of the file; runtime: what runs it, with its version; megabytes: of the file.
        milliseconds: for one image of the input size, the fastest of several passes.
        difference: the largest of a probability; agreeing: how many images have the same class.
        compared: number of images; kind: what they are.
    """

    path: Path
    runtime: str
    megabytes: float
    milliseconds: float
    difference: float
    agreeing: int
    compared: int
    kind: str

    def __str__(self) -> str:
        exact = "" if self.difference <= TOLERANCE else f", more than the {TOLERANCE:g} that rounding explains"
        return (
            f"{self.path}: {self.megabytes:.1f} MB, {self.milliseconds:.1f} ms an image ({self.runtime})\n"
            f"compared on {self.compared} {self.kind}: probabilities differ by at most {self.difference:.1e}{exact}; "
            f"{self.agreeing} of {self.compared} classes are the same"
        )


@dataclass(frozen=True)
class Saving:
    """What the cut saves: bytes of weights and time for one image in PyTorch, of the whole source network and of the model.

    Attributes:
        cut: the deepest tap that is kept.
    """

    cut: str
    whole_megabytes: float
    megabytes: float
    whole_milliseconds: float
    milliseconds: float

    def __str__(self) -> str:
        return (
            f"whole source network: {self.whole_megabytes:.1f} MB, {self.whole_milliseconds:.1f} ms an image; up to {self.cut}, with the head: "
            f"{self.megabytes:.1f} MB, {self.milliseconds:.1f} ms (weights, PyTorch)"
        )


def saving(classifier: Classifier, description: Description) -> Saving:
    """Measure the whole source network against the model that was cut from it, one image at a time on the CPU."""
    graphs = [WholeGraph(classifier, description.transforms).eval(), Graph(classifier, description.transforms).eval()]
    sizes = [sum(p.numel() * p.element_size() for p in (*g.parameters(), *g.buffers())) / 1e6 for g in graphs]
    times = [_milliseconds(in_torch(graph), description.transforms.size) for graph in graphs]
    return Saving(description.cut, *sizes, *times)


def write_onnx(classifier: Classifier, description: Description, provenance: Provenance, path: Path, sample: Sample) -> Exported:
    """Write a model as ONNX, from decoded RGB images uint8 (batch, height, width, 3) to probabilities; all three axes are dynamic.

    Its metadata name the classes and where it comes from.

    Raises:
        PipelineError: the extra `onnx` is not installed.
        BackboneError: the network cannot be exported, or the file says something else than the model.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise PipelineError(
            f"expected the packages onnx, onnxscript and onnxruntime, but {error.name} is not installed. Install them: "
            "pip install 'tlpipeline[onnx]'"
        ) from error
    program = _program(classifier, description)
    try:
        made = torch.onnx.export(program, dynamo=True, verbose=False, input_names=[IMAGES], output_names=[PROBABILITIES])
        assert made is not None
        proto = made.model_proto
        _name_axes(proto)
        onnx.helper.set_model_props(proto, metadata(description, provenance))
        content = proto.SerializeToString()
    except (torch.onnx.errors.OnnxExporterError, ValueError) as error:
        raise _unexportable(description, "ONNX", error) from error

    def check(draft: Path) -> Exported:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(draft, options, providers=["CPUExecutionProvider"])
        runtime = f"ONNX Runtime {onnxruntime.__version__}"
        return _compared(lambda images: session.run([PROBABILITIES], {IMAGES: images})[0], path, draft, runtime, description, sample)

    return _write(path, lambda draft: draft.write_bytes(content), check)


def write_torch(classifier: Classifier, description: Description, provenance: Provenance, path: Path, sample: Sample) -> Exported:
    """Write a model as a file of torch.export, with the same input and output as `write_onnx`; the file metadata.json in it says the same.

    Raises:
        BackboneError: as in `write_onnx`.
    """
    program = _program(classifier, description)

    def save(draft: Path) -> None:
        with draft.open("wb") as file:
            torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata(description, provenance))})

    def check(draft: Path) -> Exported:
        with draft.open("rb") as file:
            loaded = torch.export.load(file).module()
        return _compared(in_torch(loaded), path, draft, f"PyTorch {torch.__version__.partition('+')[0]}", description, sample)

    return _write(path, save, check)


def metadata(description: Description, provenance: Provenance) -> dict[str, str]:
    """Return what a file says of itself: all values are texts, and the classes a JSON list in the order of the probabilities."""
    return asdict(provenance) | {
        "classes": json.dumps(list(description.classes)),
        "architecture": description.architecture,
        "cut": description.cut,
        "input": "decoded RGB images, uint8 (batch, height, width, 3)",
        "decode_side": str(2 * description.transforms.resize),  # pixels of the short side at which a JPEG may be decoded
        "tlpipeline": version("tlpipeline"),
    }


def in_torch(graph: Callable[..., Any]) -> Compute:
    """Return a function that runs a graph on arrays."""

    def compute(images: Pixels) -> Probabilities:
        with torch.inference_mode():
            return np.asarray(graph(torch.from_numpy(images)).numpy(), dtype=np.float32)

    return compute


def _program(classifier: Classifier, description: Description) -> torch.export.ExportedProgram:
    # torch.export stores tensors as they lie in memory, and those with the channels last are no complete ones to it.
    graph = copy.deepcopy(Graph(classifier, description.transforms)).to(memory_format=torch.contiguous_format).eval()
    side = description.transforms.resize
    example = torch.zeros(2, side + 5, side + 11, 3, dtype=torch.uint8)
    axes = {i: torch.export.Dim(name, min=1) for i, name in enumerate(_AXES)}
    try:
        # Outside of inference mode: tensors that are made in it cannot be traced.
        with torch.inference_mode(False), torch.no_grad():
            return torch.export.export(graph, (example,), dynamic_shapes=(axes,))
    except Exception as error:  # whatever its code raises of stand-ins for tensors
        raise _unexportable(description, "torch.export", error) from error


def _unexportable(description: Description, form: str, error: Exception) -> BackboneError:
    reason = " ".join(str(error).split())[:300]
    return BackboneError(
        f"expected a network that {form} can hold, but {description.architecture}: {reason}. Take branches on data out of its forward(), or "
        "use the model with tlpipeline.load_model."
    )


def _name_axes(proto: Any) -> None:
    """Name the dynamic axes of the input, and the same in all other values."""
    (images,) = proto.graph.input
    names = {dim.dim_param: name for dim, name in zip(images.type.tensor_type.shape.dim, _AXES, strict=False)}
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]


def _write(path: Path, save: Callable[[Path], Any], check: Callable[[Path], Exported]) -> Exported:
    with atomic_write(path) as draft:
        save(draft)
        return check(draft)


def _compared(compute: Compute, path: Path, draft: Path, runtime: str, description: Description, sample: Sample) -> Exported:
    """Compare a file with the model.

    Raises:
        BackboneError: it computes something else.
    """
    computed = np.concatenate([compute(image[None]) for image in sample.images])
    difference = float(np.abs(computed - sample.probabilities).max())
    agreeing = int((computed.argmax(1) == sample.probabilities.argmax(1)).sum())
    if not difference <= WRONG:  # NaN is no small difference either
        raise BackboneError(
            f"expected probabilities within {WRONG} of the model's in {path}, found a difference of {difference:.3g} on {len(computed)} "
            f"{sample.kind}; nothing was written. {runtime} computes {description.architecture} otherwise: use the other format."
        )
    milliseconds = _milliseconds(compute, description.transforms.size)
    return Exported(path, runtime, draft.stat().st_size / 1e6, milliseconds, difference, agreeing, len(computed), sample.kind)


def _milliseconds(compute: Compute, side: int) -> float:
    image = np.zeros((1, side, side, 3), dtype=np.uint8)
    compute(image)
    seconds = []
    for _ in range(_REPETITIONS):
        started = time.perf_counter()
        compute(image)
        seconds.append(time.perf_counter() - started)
    return min(seconds) * 1000  # what other programs take is no part of it
