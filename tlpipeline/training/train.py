"""Training as a plain torch job: solve the new head on frozen features, then, if the plan says so, train everything.

The job knows neither Ray nor Prefect. A `DistributedContext` tells it who the other workers are and keeps its checkpoints; one process, plain
gloo processes and Ray workers each bring their own.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from tlpipeline.backbones import catalogue, taps
from tlpipeline.backbones.classifier import Classifier, Description, load_trunk, save
from tlpipeline.backbones.precision import extracts_in_bfloat16
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import read_manifest
from tlpipeline.errors import ClusterError
from tlpipeline.files import write_checksums, write_json
from tlpipeline.training.budget import TimeBudget
from tlpipeline.training.checkpoint import FINE_TUNE, HEAD, MODEL, SCRATCH, STATE, Checkpoints, State
from tlpipeline.training.config import TrainingConfig, TrainingPlan
from tlpipeline.training.distributed import DistributedContext
from tlpipeline.training.frozen import refit_head, train_head
from tlpipeline.training.images import Datasets
from tlpipeline.training.progress import ProgressWriter
from tlpipeline.training.recipe import BUDGET
from tlpipeline.training.trainer import Run, Trainer, batch_size


def run(config: TrainingConfig, context: DistributedContext, scratch: Path, clock: Callable[[], float] = time.monotonic) -> Path | None:
    """Train the decided case.

    Args:
        scratch: an empty folder of this worker for writing checkpoints.
        clock: returns seconds; the time budget and the checkpoints go by it.

    Returns:
        On the first worker the folder with the finished model (weights.safetensors, model.json) and history.json, or with the checkpoint of a
        job that is `checkpoint_only`; None on the others.
    """
    plan, recipe = config.plan, config.plan.recipe
    torch.manual_seed(config.seed)
    manifest = read_manifest(Path(config.manifest))
    backbone = catalogue.load(
        config.backbone, config.weights, md5=config.weights_md5, code_md5=config.code_md5, root=Path(config.workspace), size=plan.size, seed=config.seed,
    )  # fmt: skip
    if config.champion:
        load_trunk(backbone, Path(config.champion))
    datasets = Datasets.of(config.image_folder, manifest, backbone.transforms.at(plan.size))
    _check(config, context, len(datasets.train))
    half = extracts_in_bfloat16(context.device, config.precision)
    model = Classifier(backbone, plan.head_taps, len(manifest.classes), plan.freeze, half).to(context.device)
    checkpoints = Checkpoints(context, scratch, model, config.cadence.checkpoint_share, clock, config.champion_md5)
    restored = checkpoints.restore(Path(config.start) if config.start else None)
    state = restored or State(phase=HEAD, champion=config.champion_md5)
    budget = TimeBudget(config.budget_minutes, context, state.seconds, clock)
    store = Store(Path(config.cache) if config.cache else None, config.cache_bytes)
    job = Run(config, context, datasets, state, checkpoints, store, budget, ProgressWriter(Path(config.history), context.rank), scratch)
    for sentence in checkpoints.damaged:
        job.on_progress(0, 0, f"{sentence}; {'continues from an earlier one' if restored else 'training starts anew'}", important=True)
    if restored is None:
        if plan.init not in ("random", "plain"):
            train_head(model, job)
        state.seconds = budget.spent
        checkpoints.write(state)
    if state.finished:
        model = _finished_model(model, plan, checkpoints)
    elif not plan.freeze:
        blocks: list[list[str]] = []
        if recipe.layer_decay(backbone.normalization) != 1:
            blocks = [[f"trunk.{name}" for name in block] for block in taps.parameters_by_tap(backbone, plan.slice)]
        _train_all(Trainer(model, job, backbone.normalization, blocks), model)
        if config.checkpoint_only:
            checkpoints.write(state)
            return checkpoints.written if context.rank == 0 else None
        checkpoints.load_best()
        if recipe.refit_head:
            model = refit_head(model, job)
    # If fine-tuning was undone, the backbone is as it came, and its features are those that the head was solved on.
    pretrained = not config.champion and (plan.freeze or state.best.phase == HEAD)
    if context.rank:
        context.report({"accuracy": state.best.accuracy}, None)
        return None
    description = Description(
        config.backbone,
        plan.slice,
        model.readings,
        manifest.classes,
        datasets.transforms,
        pretrained,
        in_bfloat16=pretrained and half,
        indices=manifest.indices,
    )
    return _finish(model, description, state, context, scratch / "finished")


def _check(config: TrainingConfig, context: DistributedContext, images: int) -> None:
    """Raise ClusterError for what cannot work, before anything is computed."""
    if images < 2 * context.size:
        raise ClusterError(
            f"expected at least two training images for each of {context.size} workers, found {images}. Set cluster.workers lower, or to 0."
        )
    if not config.plan.freeze:
        batch_size(config, config.plan.recipe, images, context)


def _train_all(trainer: Trainer, model: Classifier) -> None:
    """Fine-tune, or continue where the state stands; then train from random weights, if the plan asks for it and a whole model is wanted."""
    config, recipe, state, budget = trainer.config, trainer.recipe, trainer.state, trainer.run.budget
    plan, images = config.plan, len(trainer.datasets.train)
    lr = recipe.lr(trainer.normalization, plan.size)
    if plan.init != "random" and state.phase in (HEAD, FINE_TUNE):
        if state.phase == HEAD and state.history and budget.expired():
            state.remark(f"{BUDGET} ended before fine-tuning began: the result is the head on frozen features")
            trainer.checkpoints.keep_best()
        else:
            trainer.fit(FINE_TUNE, config.epochs if isinstance(config.epochs, int) else recipe.epochs(images), lr)
    if config.checkpoint_only:
        return
    again = plan.init == "auto" and images >= recipe.scratch_from and len(trainer.datasets.val) > 0 and not state.gained
    if plan.init == "random" or state.phase == SCRATCH or (again and not budget.expired()):
        if state.phase != SCRATCH:
            fresh = catalogue.load(
                config.backbone, catalogue.NONE, code_md5=config.code_md5, root=Path(config.workspace), size=plan.size, seed=config.seed
            )
            model.load_state_dict(Classifier(fresh, model.readings, model.head.out_features, frozen=False).state_dict())
        longer = round(recipe.scratch_times * config.epochs) if isinstance(config.epochs, int) else recipe.scratch_epochs(images)
        trainer.fit(SCRATCH, longer, min(lr * recipe.scratch_times, 0.1))


def _finished_model(model: Classifier, plan: TrainingPlan, checkpoints: Checkpoints) -> Classifier:
    """Return the model of a finished run, with the head that was solved last if there was one."""
    if len(checkpoints.best["head.weight"][0]) != model.head.in_features:
        device = model.head.weight.device
        model = Classifier(model.backbone[0], plan.final_head_taps, model.head.out_features, model.frozen, model.in_bfloat16).to(device)
    model.load_state_dict(checkpoints.best)
    return model


def _finish(model: Classifier, description: Description, state: State, context: DistributedContext, finished: Path) -> Path:
    """Write the finished model and its history, and report it."""
    save(model, replace(description, remarks=tuple(state.remarks)), finished / MODEL, model.backbone[0].code)
    speed = {"images_per_second": state.speed, "waited_for_data": state.waited}
    result = {"phase": state.best.phase, "validation": state.summary(), "remarks": state.remarks, "speed": speed, "history": state.history}
    write_json(result, finished / "history.json")
    write_json(asdict(state) | {"finished": True}, finished / STATE)
    write_checksums(finished)
    context.report({"accuracy": state.best.accuracy}, finished)
    return finished
