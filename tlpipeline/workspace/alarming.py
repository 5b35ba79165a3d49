"""The alarms of a workspace: everything wrong that a run says at its top, and that may end it or keep its model from production."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tlpipeline.alarms import BLOCK, STOP, WARN, Alarm, by_severity, from_remark, weighed
from tlpipeline.choice import reasons
from tlpipeline.errors import DataError
from tlpipeline.params import NONE
from tlpipeline.workspace import layout


def of_data(root: Path) -> tuple[Alarm, ...]:
    """Return what is known before training: the remarks of ingest, and the alarms of the stage check. Files that are missing say nothing."""
    from tlpipeline.data import dataset

    alarms: list[Alarm] = []
    if (root / layout.MANIFEST).is_file() and (root / layout.QUARANTINE).is_file():
        alarms += map(from_remark, dataset.read_manifest(root / layout.MANIFEST, root / layout.QUARANTINE).remarks)
    if (root / layout.ALARMS).is_file():
        alarms += layout.read_quality(root).alarms
    return _by_settings(root, alarms)


def of_run(root: Path) -> tuple[Alarm, ...]:
    """Return all alarms of a trained and evaluated model, the gravest first: of its data, its decision, its training and its test.

    Where `gate.on_alarm` is warn, nothing blocks a promotion.
    """
    decided = reasons.alarms(layout.read_case(root), layout.read_profile(root))
    repeated = {alarm.kind for alarm in decided}  # the decision knows more of a missing signal than the probes: what a race showed
    alarms = [
        *(alarm for alarm in of_data(root) if alarm.kind not in repeated),
        *decided,
        *without_copies(root),
        *distribution_shift(root),
        *random_weights(root),
        *(Alarm("bounded", WARN, remark) for remark in training_limits(root)),
    ]
    alarms = list(_by_settings(root, alarms))
    if layout.params_of(root).gate.on_alarm == WARN:
        alarms = [replace(alarm, severity=WARN) if alarm.severity == BLOCK else alarm for alarm in alarms]
    return by_severity(alarms)


def _by_settings(root: Path, alarms: Iterable[Alarm]) -> tuple[Alarm, ...]:
    check = layout.params_of(root).check
    return by_severity(weighed(alarms, check.stop, check.warn))


def refuse_stopped(root: Path) -> None:
    """Check that nothing is so wrong with the data that training on them makes no sense.

    Raises:
        DataError: something is.
    """
    if stopping := [alarm for alarm in of_data(root) if alarm.severity == STOP]:
        raise DataError(
            f"expected data that may be trained on, found {len(stopping)} alarm{'s' * (len(stopping) > 1)} that stop{'s' * (len(stopping) == 1)} "
            f"the run: {'; '.join(str(alarm).rstrip('.') for alarm in stopping)}. Mend the images ({layout.QUALITY} lists them), or let it be a warning "
            "(section `check` of params.yaml), and run again."
        )


def without_copies(root: Path) -> tuple[Alarm, ...]:
    """Return an alarm with the accuracy on the test images that have no near copy in training, if some have one."""
    m = layout.read_metrics(root)
    if m.accuracy_without_copies is None:
        return ()
    text = (
        f"{m.accuracy_without_copies:.1%} ({m.accuracy_without_copies_low:.1%} to {m.accuracy_without_copies_high:.1%}) on the "
        f"{m.images_without_copies} test images without a near copy, or another image of their group, in training; "
        f"{m.accuracy:.1%} on all {m.images}"
    )
    return (Alarm("score", WARN, text),)


def distribution_shift(root: Path) -> tuple[Alarm, ...]:
    """Return an alarm if the test accuracy is significantly below the validation accuracy: then the splits differ in kind.

    The best of several validations is optimistic, so five points are allowed beyond the test interval.
    """
    validated = max(epoch.accuracy for epoch in layout.read_history(root))
    metrics = layout.read_metrics(root)
    if validated <= metrics.accuracy_high + 0.05:
        return ()
    text = (
        f"{validated:.1%} on validation but {metrics.accuracy:.1%} on test: the test images differ from the training images in kind, "
        "or the training split has near copies"
    )
    return (Alarm("shift", BLOCK, text),)


def random_weights(root: Path) -> tuple[Alarm, ...]:
    """Return an alarm if layers with random weights are frozen. An own network may load weights itself, so that is only a warning."""
    backbone = layout.params_of(root).backbone
    if backbone.weights != NONE or not layout.read_case(root).plan.freeze:
        return ()
    from tlpipeline.backbones import catalogue

    is_own = catalogue.is_own(backbone.name)
    text = (
        f"{backbone.name} has random weights (backbone.weights: none){', unless its code loads some' * is_own}, and its layers are frozen, so "
        "they never learn. Give backbone.weights a file, or force a case that trains all layers (choose.case: large_different)"
    )
    return (Alarm("random weights", WARN if is_own else BLOCK, text),)


def training_limits(root: Path) -> tuple[str, ...]:
    """Return remarks on what limited the training of the model: time or memory that ran out."""
    from tlpipeline.training.recipe import BUDGET

    race = layout.read_case(root).race
    ended = race is not None and race.ended == "budget"
    return layout.read_model(root).remarks + (f"{BUDGET} ended the comparison of both ways to train",) * ended
