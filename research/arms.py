"""The arms: a unit is trained in one way, and the row says what it reached and cost.

frozen  a head on the last tap of the frozen network          tuned   all is fine-tuned as the product does it: half the usual schedule,
cut     a head on the tap where the profile would cut                 then a head on several taps is solved
multi   a head on several taps, nothing is cut off            lpft    the usual fine-tuning: twice the epochs, the head of its last step
scratch all is trained from random weights                    plain   the same from a head of zeros
"""

import dataclasses
import json
import resource
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from research.grid import (
    NO_FLIP,
    ROOT,
    SEED,
    SLICES_AT,
    USUAL,
    Unit,
    rank,
)
from tlpipeline import params
from tlpipeline.backbones import catalogue
from tlpipeline.backbones import classifier as models
from tlpipeline.backbones import taps as cutting
from tlpipeline.backbones.features import FeatureExtractor, pooling_at
from tlpipeline.choice import cases, decide, predictor
from tlpipeline.data import dataset, splits
from tlpipeline.data.cache import Store
from tlpipeline.data.dataset import Manifest
from tlpipeline.data.loader import Images
from tlpipeline.data.splits import TEST, TRAIN, VAL
from tlpipeline.profiling import measure
from tlpipeline.profiling.profile import slice_test
from tlpipeline.progress import silent
from tlpipeline.stats import pack
from tlpipeline.training import train
from tlpipeline.training.config import TrainingConfig, TrainingPlan
from tlpipeline.training.distributed import LocalContext
from tlpipeline.training.heads import solve_head
from tlpipeline.training.recipe import Recipe


def case_of(arm: str, similar: float) -> cases.Case:
    """Return the case whose recipe an arm that trains everything follows; P(similar) decides, as in the product."""
    return cases.find("large_different" if arm == "scratch" or similar < 0.5 else "large_similar")


def whole_network(case: cases.Case, last: cutting.Tap, size: int) -> TrainingPlan:
    """Return the plan of this case that cuts nothing off: its head reads the last tap."""
    taps = (pooling_at(last),)
    return TrainingPlan(last.name, size, case.freeze == "kept", case.init, case.recipe, head_taps=taps, final_head_taps=taps)


def train_arm(unit: Unit, arm: str, similar: float, manifest: Manifest, folder: Path, data: Path) -> dict[str, object]:
    """Train an arm of the whole network, tested on the test images, and return its row.

    Args:
        unit: what is trained on.
        arm: one of TRAINED.
        similar: P(similar) of the unit's profile.
        manifest: the images of the unit and their splits.
        folder: of the images.
        data: folder of the weights files.
    """
    net = unit.network
    weights, md5 = (catalogue.NONE, catalogue.NONE) if arm == "scratch" else (str(data / net.weights), net.md5)
    backbone = catalogue.load(net.name, weights, md5=md5, size=net.size, seed=unit.seed)
    taps = cutting.measure_taps(backbone, net.size)
    case = case_of(arm, similar)
    changes = {"tuned": {}, "scratch": {"refit_head": False}}.get(arm, USUAL)
    case = dataclasses.replace(case, recipe=dataclasses.replace(case.recipe, **changes))
    init = {"plain": "plain", "scratch": "random"}.get(arm, "pretrained")
    plan = dataclasses.replace(whole_network(case, taps[-1], net.size), init=init)
    if case.recipe.refit_head:
        quick = dataclasses.replace(params.load(ROOT / "params.yaml").profile, tangent=False)
        profile = measure.measure(backbone, folder, manifest, net.size, quick, lambda _: False, silent, torch.device("cpu"))
        plan = dataclasses.replace(plan, final_head_taps=profile.head_at(taps[-1].name))
    with tempfile.TemporaryDirectory(prefix="regret-") as name:
        here = Path(name)
        dataset.write_manifest(manifest, here / "manifest.parquet", here / "quarantine.csv")
        job = TrainingConfig(
            workspace=name, images=str(folder), manifest=str(here / "manifest.parquet"), backbone=net.name, weights=weights,
            weights_md5=md5, plan=plan, seed=unit.seed, epochs="auto", batch_size="auto", flip=unit.data not in NO_FLIP,
            precision="auto", history=str(here / "history.jsonl"),
        )  # fmt: skip
        started = cpu_seconds()
        (here / "scratch").mkdir()
        finished = train.run(job, LocalContext(here / "kept"), here / "scratch")
        spent = cpu_seconds() - started
        assert finished is not None
        history = json.loads((finished / "history.json").read_text())["history"]
        model, description = models.load(finished / "model", trusts=lambda network, code_md5: True)
        test = manifest.used(TEST)
        probabilities = models.probabilities(
            model, Images(folder, test, description.transforms), torch.device("cpu"), lambda _: None
        ).numpy()
    right = probabilities.argmax(1) == np.array([description.classes.index(r.label) for r in test])
    epochs = [line for line in history if line["phase"] in ("fine-tune", "scratch")]
    train_images, val_images = len(manifest.used(TRAIN)), len(manifest.used(VAL))
    # The interim analyses of a race: after a third, two thirds, and all of the schedule.
    looks = [epochs[max(round(len(epochs) * part / 3), 1) - 1]["correct"] for part in (1, 2, 3)]
    solved = {"tuned": 2, "lpft": 1}.get(arm, 0) * (train_images + val_images)
    return counted(unit, manifest, right) | {
        "arm": arm, "val_hits": round(epochs[-1]["accuracy"] * val_images), "slice": taps[-1].name,
        "rate": case.recipe.lr(backbone.normalization, net.size), "epochs": len(epochs),
        "forward": solved + len(epochs) * (train_images + val_images), "backward": len(epochs) * train_images,
        "cpu_s": round(spent, 1), "looks": " ".join(looks), "bits": history[0]["correct"] if solved else "",
    }  # fmt: skip


def frozen_arms(
    unit: Unit, manifest: Manifest, folder: Path, data: Path, heads: bool, store: Store | None = None
) -> tuple[dict[str, object], list[dict[str, object]]]:
    """Profile a unit as the product does, and train the heads of the frozen network.

    With 500 images a head at every earlier tap is trained as well (arm `at`): they give the regret of the slice point.

    Args:
        unit: what is trained on.
        manifest: the images of the unit and their splits.
        folder: of the images.
        data: folder of the weights files.
        heads: whether the heads are wanted, or the evidence alone.
        store: keeps the features of all taps for other subsets of the same data; None keeps those that are needed, in memory.

    Returns:
        The row of evidence, and the rows of the arms.
    """
    net = unit.network
    backbone = catalogue.load(net.name, str(data / net.weights), md5=net.md5, size=net.size, seed=unit.seed)
    rule = params.load(ROOT / "params.yaml")
    started = cpu_seconds()
    profile = measure.measure(
        backbone,
        folder,
        manifest,
        net.size,
        rule.profile,
        lambda measured: decide.undecided(measured, rule.choose),
        silent,
        torch.device("cpu"),
    )
    profiled = cpu_seconds() - started
    evidence = dataclasses.asdict(predictor.evidence(profile, slice_test(profile, rule.choose.gain / 100, rule.choose.draws)))
    # In forward passes: a gradient counts three.
    looked = profile.sampled + profile.held_out + (3 * profile.tangent.images if profile.tangent else 0)
    key = dict(zip(("data", "backbone", "n", "seed"), unit.key, strict=True))
    judges = pack(np.array([not splits.in_selection_half(r.key) for r in manifest.used(VAL)]))
    row = key | evidence | {"looked": looked, "cpu_s": round(profiled, 2), "judges": judges, "taps": " ".join(t.name for t in profile.taps)}
    if not heads:
        return row, []
    taps = cutting.measure_taps(backbone, net.size)
    taps_of_heads = {"frozen": profile.last.taps, "cut": (profile.cut or profile.last).taps, "multi": profile.multi.taps}
    if unit.n == SLICES_AT:
        taps_of_heads |= {f"at:{tap.name}": tap.head for tap in profile.taps[:-1]}
    needed = {name for names in taps_of_heads.values() for name in names}
    readings = {tap.name: pooling_at(tap) for tap in taps if tap.name in needed or store is not None}
    ops = {tap.name: tap.forward_ops / taps[-1].forward_ops for tap in taps}
    trunk = cutting.cut(backbone, list(readings)).to(memory_format=torch.channels_last)
    transforms = backbone.transforms.at(net.size)
    extractor = FeatureExtractor(store or Store(), backbone, trunk, list(readings.values()), transforms, torch.device("cpu"))
    rows = {split: manifest.used(split) for split in (TRAIN, VAL, TEST)}
    labels = {split: np.array([manifest.classes.index(r.label) for r in rows[split]]) for split in rows}
    features = {}
    for split in rows:
        columns = extractor.extract(Images(folder, rows[split], transforms), lambda _: None)
        features[split] = {name: column.all() for name, column in zip(readings, columns, strict=True) if name in needed}
    out = []
    for arm, names in taps_of_heads.items():
        started = cpu_seconds()
        x = {split: torch.cat([features[split][name] for name in names], dim=1) for split in rows}
        blocks = [b for name in names for b in readings[name].blocks]
        classes, imbalance = len(manifest.classes), Recipe().imbalance
        weight, bias, penalty = solve_head(x[TRAIN], labels[TRAIN], blocks, classes, imbalance, unit.seed)
        right = (x[VAL] @ weight.T + bias).argmax(1).numpy() == labels[VAL]
        # As in training: scored on validation, then solved again with the validation images.
        both = torch.cat([x[TRAIN], x[VAL]]), np.concatenate([labels[TRAIN], labels[VAL]])
        weight, bias, _ = solve_head(*both, blocks, classes, imbalance, unit.seed, penalty)
        predicted = (x[TEST] @ weight.T + bias).argmax(1).numpy()
        images = len(rows[TRAIN]) + len(rows[VAL])
        out.append(counted(unit, manifest, predicted == labels[TEST]) | {
            "arm": arm.partition(":")[0], "val_hits": int(right.sum()), "slice": names[0], "rate": "", "epochs": 0,
            "forward": round(images * ops[names[0]], 1), "backward": 0, "cpu_s": round(cpu_seconds() - started, 2), "looks": "", "bits": pack(right),
        })  # fmt: skip
    return row, out


def counted(unit: Unit, manifest: Manifest, right: npt.NDArray[np.bool_]) -> dict[str, object]:
    """Return the columns that all arms have: the unit, its splits, and the hits on the two halves of the test images."""
    test = manifest.used(TEST)
    first = np.array([rank(SEED, r.md5)[0] in "02468ace" for r in test])
    return {
        "data": unit.data, "backbone": unit.backbone, "n": unit.n, "seed": unit.seed, "classes": len(manifest.classes),
        "train": len(manifest.used(TRAIN)), "val": len(manifest.used(VAL)), "test_a": int(first.sum()), "test_b": int((~first).sum()),
        "hits_a": int(right[first].sum()), "hits_b": int(right[~first].sum()),
    }  # fmt: skip


def cpu_seconds() -> float:
    """Return the CPU seconds of this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
