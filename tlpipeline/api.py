"""The package for Python users: a workspace is an object, and a model predicts files, PIL images and arrays.

>>> import tlpipeline as tl
>>> ws = tl.Workspace.init("catalogue", images="~/pictures")
>>> summary = ws.run()
>>> print(summary.version, summary.case)
catalogue@v0.1.0 small_similar

`summary`, `ws.explain()` and `ws.registry.versions()` are typed values. They print as text, and notebooks draw them:

>>> summary.classes
3
>>> ws.explain().decision.case
'small_similar'
>>> [version.name for version in ws.registry.versions()]
['catalogue@v0.1.0']

A stage of a model is where it is used. `prod` is the one that predictions ask for most:

>>> print(ws.promote("latest"))
catalogue@v0.1.0 is in prod now (catalogue#prod#1)

A model is loaded once and predicts many times, with the transforms that it was trained with:

>>> import numpy as np
>>> from PIL import Image
>>> model = tl.load_model("catalogue#prod", workspace="catalogue")
>>> model.classes
('class0', 'class1', 'class2')
>>> path = "catalogue/images/class1/003.png"
>>> [p.label for p in model.predict([path, Image.open(path), np.asarray(Image.open(path))])]
['class1', 'class1', 'class1']

A mistake is a `PipelineError`, whose message says what was expected, what was found, and how to go on:

>>> tl.Workspace("nowhere")
Traceback (most recent call last):
...
tlpipeline.errors.WorkspaceError: expected a workspace at nowhere, found no such folder. Create one with `tlpipeline init DIR`, or name one with --workspace.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from tlpipeline.errors import DataError, PipelineError, WorkspaceError, nearest
from tlpipeline.progress import Event, Progress, silent
from tlpipeline.results import (
    Acceptance,
    Backbones,
    CacheInfo,
    DataCommit,
    Diagnosis,
    Explanation,
    Promotion,
    RegisteredVersion,
    Rollback,
    Versions,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from tlpipeline.data.changes import Changes
    from tlpipeline.flows.deployments import Deployed
    from tlpipeline.params import Params
    from tlpipeline.registry.predict import Model
    from tlpipeline.workspace.release import Summary
    from tlpipeline.workspace.suggest import Suggestions

PROD = "prod"


def _expanded(path: str | Path) -> Path:
    return Path(path).expanduser()


class Workspace:
    """A folder that holds a data set, its settings, and everything that was made from them: a git and DVC repository.

    Args:
        folder: made by `Workspace.init` or `tlpipeline init`.

    Attributes:
        root: the folder.
        registry: the registered versions of its model.
        cache: the features and decoded images that it keeps.

    Raises:
        WorkspaceError: the folder is no workspace.
    """

    def __init__(self, folder: str | Path = ".") -> None:
        from tlpipeline.versioning import lock

        self.root = _expanded(folder)
        lock.require_workspace(self.root)
        self.registry = Registry(self)
        self.cache = Cache(self)

    def __repr__(self) -> str:
        return f"Workspace({str(self.root)!r})"

    @classmethod
    def init(
        cls,
        folder: str | Path,
        images: str | Path | None = None,
        backbone: str = "demonstration",
        weights: str | Path = "DEFAULT",
        remote: str | Path | None = None,
        progress: Progress = silent,
        labels: str | Path | None = None,
        group: str | None = None,
        class_folder: int | None = None,
    ) -> Workspace:
        """Make a workspace.

        Args:
            folder: new or empty.
            images: a folder of `<class>/<image>`, or a zip file of one, which is copied; None takes the embedded sample of handwritten digits.
            labels: a table with the columns path and label, and perhaps split and group; None takes the names of the folders.
            group, class_folder: `data.group` and `data.class_folder` of params.yaml.
            backbone: "demonstration", a torchvision classifier, "timm:NAME", "hf:OWNER/NAME", or "package.module:callable".
            weights: "DEFAULT", a name of torchvision weights, a weights file, or "none".
            remote: the DVC remote, a folder or a URL; None is a folder inside the workspace.

        Raises:
            WorkspaceError: the folder is not empty or cannot be made, or the remote cannot be reached.
            DataError: the images make no data set.
            BackboneError: the network or its weights do not exist.
        """
        from tlpipeline.workspace import create

        pictures = None if images is None else _expanded(images)
        # A URL and a name of weights have no ~ and stay as they are.
        kept = None if remote is None else os.path.expanduser(remote)
        table = None if labels is None else _expanded(labels)
        create.init(_expanded(folder), pictures, backbone, os.path.expanduser(weights), kept, progress, table, group, class_folder)
        return cls(folder)

    @property
    def params(self) -> Params:
        """The settings in params.yaml, read anew.

        Raises:
            ParamsError: the file is missing or wrong.
        """
        from tlpipeline.workspace import layout

        return layout.params_of(self.root)

    @property
    def name(self) -> str:
        """The name under which models are registered: `data.name` in params.yaml."""
        return self.params.data.name

    # --- running ----------------------------------------------------------------------------------------------------------------------

    def run(self, images: str | Path | None = None, progress: Progress = silent, labels: str | Path | None = None) -> Summary:
        """Run the whole flow: version the data, profile, choose, train, evaluate, compare, register, report.

        Without PREFECT_API_URL, Prefect starts a temporary server for it. The first run in a process decides where Prefect keeps its
        records: in its workspace, unless PREFECT_HOME says otherwise.

        Args:
            images: a folder, or a zip file of one, that replaces the workspace's images first.
            labels: a table of labels that comes with them; None keeps the present one.

        Raises:
            PipelineError: as the stage that fails says.
        """
        from tlpipeline.environment import set_prefect, set_thread_waiting
        from tlpipeline.versioning import lock
        from tlpipeline.workspace import create

        set_thread_waiting()  # before torch is imported, which reads it: a Prefect server runs beside
        pictures, table = (None if path is None else _expanded(path) for path in (images, labels))
        if table is not None and pictures is None:
            raise DataError(
                f"expected the images that come with {table}, found no --images. To change labels alone, edit the workspace's table."
            )
        create.check(self.root, pictures, table)  # a mistake is reported before the Prefect server starts
        lock.require_unlocked(self.root)
        lock.require_room(self.root)
        set_prefect(self.root)
        from tlpipeline.flows.retrain import reach, retrain
        from tlpipeline.tasks.pipeline import listener

        reach()
        token = listener.set(progress)
        try:
            return retrain(workspace=self.root, images=pictures, labels=table)
        finally:
            listener.reset(token)

    def stage(self, name: str, progress: Progress = silent) -> None:
        """Run one stage, whether it is up to date or not, as `dvc repro` does.

        Args:
            name: "ingest", "profile", "check", "choose", "train" or "evaluate".

        Raises:
            PipelineError: there is no such stage, or as the stage says.
        """
        from tlpipeline.workspace import stages

        if name not in stages.STAGES:
            raise PipelineError(f"expected a stage, found {name!r}; {nearest(name, stages.STAGES)}")
        try:
            stages.run(self.root, name, progress)
        finally:
            if "ray" in sys.modules:
                from tlpipeline.training import ray_train

                ray_train.shutdown()

    def explain(self) -> Explanation:
        """Return which case was decided, and why.

        Raises:
            WorkspaceError: nothing was decided yet, or by another version.
        """
        from tlpipeline.workspace import release

        return Explanation(*release.load_decision(self.root))

    # --- running unattended -----------------------------------------------------------------------------------------------------------

    def doctor(self) -> Diagnosis:
        """Return whether this workspace can run unattended: packages, git, remotes, disk, devices, and the Prefect server.

        A small file is written to the DVC remote and deleted; nothing else is changed.

        Raises:
            WorkspaceError: this is not a workspace.
        """
        from tlpipeline.environment import set_prefect
        from tlpipeline.workspace import doctor

        found = list(doctor.checks(self.root))
        set_prefect(self.root)
        from tlpipeline.flows import deployments

        return Diagnosis((*found, *deployments.checks(self.root)))

    def deploy(self, take_over: bool = False) -> Deployed:
        """Put the deployments of prefect.yaml on the Prefect server at PREFECT_API_URL, and make their work pool if it is missing.

        Args:
            take_over: also replace deployments of the same name that run in another folder.

        Raises:
            WorkspaceError: as `doctor` says what is missing; or the server refuses, or has these deployments for another folder.
        """
        from tlpipeline.environment import set_prefect
        from tlpipeline.workspace import doctor

        if problems := [check for check in doctor.checks(self.root) if check.status == doctor.PROBLEM]:
            raise WorkspaceError(f"expected a workspace that can run, found: {'; '.join(f'{c.name}: {c.text}' for c in problems)}")
        set_prefect(self.root)
        from tlpipeline.flows import deployments

        return deployments.deploy(self.root, take_over)

    def serve(self, port: int = 4200, on_ready: Callable[[str], None] = lambda api: None) -> None:
        """Run by schedule and by event until interrupted, all in one process: without PREFECT_API_URL it also starts a Prefect server.

        Args:
            port: of that server, on this machine alone.
            on_ready: called with the address of the server, before runs are waited for.

        Raises:
            WorkspaceError: the server does not start or does not answer, or prefect.yaml cannot be read.
        """
        from tlpipeline.environment import set_prefect
        from tlpipeline.workspace import create, layout

        create.check(self.root)
        set_prefect(self.root)
        from tlpipeline.flows import prefect_server

        with prefect_server.running(port, self.root / layout.CACHE.parent / "server.log") as api:
            on_ready(api)
            from tlpipeline.flows import deployments

            deployments.serve_all(self.root)

    # --- data -------------------------------------------------------------------------------------------------------------------------

    def commit_data(self, message: str | None = None) -> DataCommit:
        """Version the images as they are now and push them; tell a Prefect server that they changed, if PREFECT_API_URL names one.

        Args:
            message: of the git commit.

        Raises:
            DataError: the images cannot be versioned.
            WorkspaceError: a remote or server does not answer, or `dvc repro` runs a stage. A run goes on with the data that it began with.
        """
        from tlpipeline.environment import set_prefect
        from tlpipeline.versioning import dvc, git
        from tlpipeline.workspace import create, history
        from tlpipeline.workspace.pinning import beside_a_run

        with beside_a_run(self.root):
            before = git.head(self.root)
            digest, remarks = create.commit_data(self.root, message)
            images = create.count_images(self.root)
            changes = None if dvc.is_stage_output(self.root, self.params.data.images) else history.diff(self.root, before, "HEAD")
        if not os.environ.get("PREFECT_API_URL"):
            return DataCommit(digest, images, changes, tuple(remarks), announced=False)
        set_prefect(self.root)
        from tlpipeline.flows.retrain import announce

        announce(self.name, digest, images)
        if missing := create.missing_trigger(self.root):
            remarks.append(missing)
        return DataCommit(digest, images, changes, tuple(remarks), announced=True)

    def diff(self, since: str = "HEAD", until: str | None = None) -> Changes:
        """Return what changed in the images: files added, removed, replaced, moved, put into another class, and the sizes of classes.

        `drift` of the result says for each class whether its images look different now. It takes features from the cache and computes none.

        Args:
            since: "latest", "v1", or a git revision such as "HEAD~3", a tag or a date ("main@{1 week ago}").
            until: a later one; None is the folder of images as it is now, versioned or not.

        Raises:
            WorkspaceError: no images are versioned at a revision, or their list cannot be fetched.
            RegistryError: there is no such version.
        """
        from tlpipeline.workspace import history

        return history.diff_with_drift(self.root, self._revision(since), None if until is None else self._revision(until))

    def _revision(self, text: str) -> str:
        name = self.registry.full_name(text)
        if name == text:
            return text
        from tlpipeline.registry import versions

        return versions.resolve(self.root, name).commit

    def suggest(self, folder: str | Path, count: int = 50, progress: Progress = silent) -> Suggestions:
        """Return the images of a folder that are most worth a label: the newest model is unsure of them, and they are unlike each other.

        Args:
            folder: unlabeled images, in any layout; those of the data set are left out.
            count: how many.

        Raises:
            WorkspaceError: nothing was trained yet, or a run is in the workspace.
            DataError: the folder is missing, or has no image that is not in the data set.
        """
        from tlpipeline.versioning import lock
        from tlpipeline.workspace import suggest

        with lock.hold(self.root):
            return suggest.suggest(self.root, _expanded(folder), count, progress)

    # --- models -----------------------------------------------------------------------------------------------------------------------

    def load_model(self, model: str | Path = f"#{PROD}", trust: str | Collection[str] = (), device: str = "auto") -> Model:
        """Load a model of this workspace.

        Args:
            model: "latest", "v1", "#prod", "name@v1", "name#prod", or a folder.
            trust, device: as for `tlpipeline.load_model`.

        Raises:
            RegistryError: there is no such version.
        """
        return load_model(self.registry.full_name(model) if isinstance(model, str) else model, self.root, trust, device)

    def promote(self, version: str = "latest", stage: str = PROD, because: str = "", new_stage: bool = False) -> Promotion:
        """Put a version into a stage; the same as `registry.promote`."""
        return self.registry.promote(version, stage, because, new_stage)

    def accept(self, version: str | None = None, *, because: str) -> Acceptance:
        """Overrule the gate's verdict; the same as `registry.accept`."""
        return self.registry.accept(version, because=because)

    def rollback(self, stage: str = PROD) -> Rollback:
        """Put the version back that was in a stage before; the same as `registry.rollback`."""
        return self.registry.rollback(stage=stage)


def list_backbones(
    pattern: str = "*", time: bool = False, size: int | None = None, workspace: str | Path | None = None, progress: Progress = silent
) -> Backbones:
    """Return the networks that `backbone.name` may name: torchvision's, those of timm and Hugging Face where installed, and your own.

    Args:
        pattern: text in the name, or a name with * and ?.
        time: build each with random weights and measure a forward pass of one image on this machine.
        size: side of that image in pixels; None is that of the weights.
        workspace: whose own networks are listed, too.

    Raises:
        BackboneError: no name matches.
    """
    from tlpipeline.backbones import listing

    root = None if workspace is None else _expanded(workspace)
    networks = listing.available(pattern, root)
    if time:
        for i, network in enumerate(networks):
            progress(Event("backbones", i, len(networks), network.name))
            networks[i] = listing.measured(network, root, size)
    return Backbones(networks)


def load_model(model: str | Path, workspace: str | Path = ".", trust: str | Collection[str] = (), device: str = "auto") -> Model:
    """Load a model: a folder, or a version of a workspace's registry.

    Args:
        model: a folder, "name@v1.2.0", "name@v1" (the newest of them), "name@latest", or "name#prod"; in a workspace also "latest", "v1" and
            "#prod".
        workspace: whose registry is asked.
        trust: your own networks as "module:callable", whose code the model may run, besides those that the workspace names in
            params.yaml, now or in a registered version. A folder from elsewhere can name any function.
        device: "cpu", "cuda", or "auto": a GPU where there is one, unless the workspace sets cluster.gpu to false.

    Raises:
        RegistryError: there is no such model.
        WorkspaceError: it is no folder, and `workspace` is no workspace.
        BackboneError: the folder names a network that is not trusted.
    """
    from tlpipeline.registry import predict
    from tlpipeline.versioning import lock
    from tlpipeline.workspace import layout

    root = _expanded(workspace)
    writable = lock.read_only(root) is None
    text = str(_expanded(model))
    if isinstance(model, str) and not _expanded(model).is_dir() and (root / layout.PARAMS).is_file():
        text = Workspace(root).registry.full_name(model)
    with TemporaryDirectory() as elsewhere:
        source = predict.find_model(text, root, None if writable else Path(elsewhere))
        return predict.Model(source, root, [trust] if isinstance(trust, str) else trust, device)


class Registry:
    """The registered versions of a workspace's model: git tags, as GTO writes them."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._root = workspace.root

    def full_name(self, version: str) -> str:
        """Return "name@latest", "name@v1" or "name#prod" for "latest", "v1" or "#prod"; other texts stay as they are."""
        if version.startswith("#"):
            return f"{self._workspace.name}{version}"
        return f"{self._workspace.name}@{version}" if re.fullmatch(r"latest|v\d+(\.\d+)*", version) else version

    def versions(self) -> Versions:
        """Return the registered versions, newest first."""
        from tlpipeline.registry import versions
        from tlpipeline.versioning import dvc

        params = self._workspace.params
        rows = []
        for version in reversed(versions.versions(self._root, params.data.name)):
            reached = versions.accuracy_of(self._root, version)
            rows.append(
                RegisteredVersion(
                    name=str(version),
                    stages=version.stages,
                    verdict=versions.standing(self._root, version),
                    case=versions.case_of(self._root, version),
                    accuracy=reached.accuracy,
                    low=reached.accuracy_low,
                    high=reached.accuracy_high,
                    data=dvc.stage_input(self._root, "ingest", params.data.images, version.commit),
                    commit=version.commit,
                )
            )
        return Versions(rows)

    def show(self, version: str) -> str:
        """Return the model card of a version, as markdown.

        Raises:
            RegistryError: there is no such version.
        """
        from tlpipeline.registry import versions
        from tlpipeline.versioning import git

        known = versions.resolve(self._root, self.full_name(version))
        return git.read_at(self._root, known.commit, versions.CARD) or f"{known} has no {versions.CARD}"

    def promote(self, version: str = "latest", stage: str = PROD, because: str = "", new_stage: bool = False) -> Promotion:
        """Put a version into a stage.

        Args:
            version: "latest", "v1", "name@v1" or "name@latest".
            stage: "prod", or one that a version was in before, unless it is a new_stage.
            because: why, recorded in the message of the tag. A version that was registered with blocking alarms is refused without it.

        Raises:
            RegistryError: there is no such version or stage, alarms block it, or the tag cannot be pushed.
        """
        from tlpipeline.registry import versions

        known = versions.resolve(self._root, self.full_name(version))
        return Promotion(str(known), stage, versions.promote(self._root, known, stage, because, new_stage))

    def accept(self, version: str | None = None, *, because: str) -> Acceptance:
        """Overrule the gate's verdict: register a rejected model, or have an undecided version count as accepted.

        Args:
            version: an undecided version; None is the model that the last run trained.
            because: why, in a sentence; git records it.

        Raises:
            RegistryError: there is no reason or no such model, or it is accepted already. WorkspaceError: a run is in the workspace.
        """
        from tlpipeline.registry import versions
        from tlpipeline.versioning import lock
        from tlpipeline.workspace import release

        with lock.hold(self._root):
            known = None if version is None else versions.resolve(self._root, self.full_name(version), accepted_first=False)
            done = release.accept(self._root, known, because)
        assert done.verdict is not None
        return Acceptance(done.version, done.new, done.promoted, done.verdict.because)

    def rollback(self, name: str | None = None, stage: str = PROD) -> Rollback:
        """Put the version back that was in a stage before.

        Args:
            name: of the model; None is the workspace's.

        Raises:
            RegistryError: no version was in the stage before.
        """
        from tlpipeline.registry import versions

        before, now = versions.rollback(self._root, name or self._workspace.name, stage)
        return Rollback(str(before), str(now), stage)


class Cache:
    """The features and decoded images that a workspace keeps, so that the next run need not compute them."""

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace

    def info(self) -> CacheInfo:
        """Return what the cache holds."""
        from tlpipeline.data import cache
        from tlpipeline.workspace import layout

        folder = self._workspace.root / layout.CACHE
        return CacheInfo(tuple(cache.info(folder)), self._workspace.params.cache.max_gb, folder)

    def clear(self) -> int:
        """Delete the cache; return how many bytes it took.

        Raises:
            WorkspaceError: a run is in the workspace.
        """
        from tlpipeline.data import cache
        from tlpipeline.versioning import lock

        held = self.info()
        with lock.hold(self._workspace.root):  # a run keeps what it computes there
            cache.clear(held.folder)
        return held.bytes
