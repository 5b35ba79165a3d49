"""Where fine-tuning starts: from the source's weights (cold), or from those of the model in production (warm).

Which model in production that is, is an input of the stage train: start.json. So the stage depends on its inputs alone, and `dvc repro` does
what the flow does.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tlpipeline import records
from tlpipeline.choice.decision import Decision
from tlpipeline.errors import ParamsError, RegistryError, WorkspaceError
from tlpipeline.files import write_bytes
from tlpipeline.params import Params
from tlpipeline.registry import versions
from tlpipeline.registry.versions import Version
from tlpipeline.training.checkpoint import STATE, Best
from tlpipeline.training.config import TrainingConfig
from tlpipeline.versioning import dvc, git
from tlpipeline.workspace import layout

if TYPE_CHECKING:
    from tlpipeline.backbones.classifier import Start
    from tlpipeline.data.dataset import Manifest

COLD, WARM, BOTH = "cold", "warm", "both"
_WAY_OUT = "Write `null` into it; the next run fills it again."


@dataclass(frozen=True)
class Champion:
    """The content of start.json: the model in production, if it was fine-tuned as the network that is to be trained.

    Attributes:
        name, number, commit: of its version.
        model: md5 of its folder, as DVC records it.
        earlier: md5s of images that its backbone, or one that it started from, was trained on, and that were no training images any more when
            this was written.
    """

    name: str
    number: tuple[int, int, int]
    commit: str
    model: str
    earlier: tuple[str, ...]

    @property
    def version(self) -> Version:
        """The version as the registry has it."""
        return Version(self.number, self.name, self.commit)


# --- the input ------------------------------------------------------------------------------------------------------------------------


def record(root: Path) -> None:
    """Write the model in production to start.json, if the stage train is to run anyway: a fresh model stays as it is."""
    path = root / layout.START
    if not path.is_file() or not dvc.has_stage(root, "train") or dvc.is_fresh(root, "train"):
        return
    found = _champion(root)
    text = json.dumps(asdict(found) if found else None, indent=2) + "\n"
    if path.read_text(encoding="utf-8") != text:
        write_bytes(text.encode(), path)


def read(root: Path) -> Champion | None:
    """Return the model that training may start from, None without one.

    The workspace of an older version whose dvc.yaml does not name start.json has none.

    Raises:
        WorkspaceError: start.json is damaged.
    """
    path = root / layout.START
    if not path.is_file() or f"- {layout.START}" not in (root / "dvc.yaml").read_text(encoding="utf-8"):
        return None
    return records.read(Champion | None, path, _WAY_OUT)  # type: ignore[arg-type]


def _champion(root: Path) -> Champion | None:
    """Return the model in production; None if there is none, or it was not fine-tuned as the network that is to be fine-tuned."""
    from tlpipeline.backbones import classifier
    from tlpipeline.data import dataset
    from tlpipeline.data.splits import TRAIN

    params, decision = layout.params_of(root), layout.read_case(root)
    if params.train.start == COLD or decision.plan.freeze:
        return None
    version = versions.champion(root, params.data.name)
    if version is None:
        return None
    try:
        made_by = layout.params_at(root, version.commit)
        description = classifier.describe(versions.model_folder(root, version))
    except (ParamsError, RegistryError):  # another version of tlpipeline wrote it
        return None
    same = layout.decided_by(made_by)[0] == layout.decided_by(params)[0]
    same = same and (description.cut, description.transforms.size) == (decision.slice, decision.size)
    if not same or description.frozen:
        return None
    trained_on = {row.md5 for row in versions.manifest_of(root, version).used(TRAIN)}
    if description.start and description.start.warm:
        then = records.parse(
            Champion, git.read_at(root, version.commit, layout.START) or "", f"{layout.START} of {version}", _WAY_OUT, WorkspaceError
        )
        trained_on.update(then.earlier)
    now = {row.md5 for row in dataset.read_manifest(root / layout.MANIFEST).used(TRAIN)}
    model = dvc.stage_output(root, "train", layout.MODEL, version.commit)
    return Champion(version.name, version.number, version.commit, model, tuple(sorted(trained_on - now)))


# --- training -------------------------------------------------------------------------------------------------------------------------


def usable(root: Path, params: Params, decision: Decision, manifest: "Manifest") -> tuple[Champion | None, str]:
    """Return the model that this training may start from, and why it may not; "" where there is nothing to say."""
    from tlpipeline.data.splits import TEST, VAL

    if params.train.start == COLD or decision.plan.freeze:
        return None, ""
    champion = read(root)
    if champion is None:
        why = "no model in production was fine-tuned as this network with these settings"
        return None, f"train.start: {why}, so training starts from the source's weights" if params.train.start == WARM else ""
    why = ""
    earlier = set(champion.earlier)
    if decision.init in ("random", "plain"):
        why = "init in train.override asks for another start"
    elif known := sum(row.md5 in earlier for row in manifest.used(VAL, TEST)):
        # A start that was trained on them would look better than it is.
        why = f"it was trained on {known} images that are validation or test images now"
    elif params.train.start == BOTH and not manifest.used(VAL):
        why = "no validation images can choose between the starts"
    return (None, f"train.start: no start from {champion.version}: {why}") if why else (champion, "")


def warm(job: TrainingConfig, root: Path, champion: Champion, history: Path, cold: Path | None) -> TrainingConfig | None:
    """Return the job that starts from the model in production, None if the time is up.

    Args:
        job: from the source's weights.
        history: file for its progress.
        cold: folder of the finished run from the source's weights, None without one. `train.budget_minutes` bounds both runs together.

    Raises:
        WorkspaceError: the model cannot be fetched.
    """
    left = job.budget_minutes
    if left and cold is not None:
        left -= json.loads((cold / STATE).read_text(encoding="utf-8"))["seconds"] / 60
        if left <= 0:
            return None
    # Weights that learned the task are not left for random ones, whatever the case would try.
    return replace(
        job, champion=str(versions.model_folder(root, champion.version).resolve()), champion_md5=champion.model, start="",
        plan=replace(job.plan, init="pretrained"), history=str(history), budget_minutes=left,
    )  # fmt: skip


def choose(finished: Mapping[str, Path], champion: Champion, images: int) -> tuple[str, "Start"]:
    """Return the start whose model is kept, and the start as model.json tells it. Validation chooses: no backbone was trained on its images.

    Args:
        finished: folder of the finished run of each start.
        images: of validation.
    """
    from tlpipeline.backbones.classifier import Start

    reached = {}
    for start, folder in finished.items():
        validation = json.loads((folder / "history.json").read_text(encoding="utf-8"))["validation"]
        reached[start] = Best(start, 0, validation["accuracy"], validation["log_loss"])
    kept = WARM if WARM in reached and (COLD not in reached or reached[WARM].beats(reached[COLD])) else COLD
    cold, best = (reached[start].accuracy if start in reached else None for start in (COLD, WARM))
    return kept, Start(str(champion.version), kept == WARM, cold, best, images)
