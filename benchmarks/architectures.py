"""Do all of torchvision's classifiers go through all four cases, and what does a cut save in each?

Every network that torchvision lists, with random weights from a file, under every row of the table of cases: its taps are described, it is cut as the
row says (behind the last tap, or behind a middle one with a head that reads there and at two taps before), trained for one real step by
`train.run` on two workers of a gloo group, exported, and reloaded. Frozen tensors must be those of the start, the others must have moved,
and the reloaded model must say what the uncut network with its tensors says. Few images, at the smallest size that the network takes.

    python -m benchmarks.architectures run [NETWORK ...] [--again] [--memory-gb 12] [--work DIR] [--case CASE ...]
    python -m benchmarks.architectures taps
    python -m benchmarks.architectures table

`run` appends a row to benchmarks/results/architectures.csv for each network and case that has none yet, smallest networks first, so it can
be interrupted at any moment; what failed is tried again, and with --again everything that is asked for. It fails if a row says so. Where two workers, each with its gradients and its
optimizer, need more than --memory-gb, one process takes the step, and where that is too much as well, none does: the row says which.
`taps` notes the taps of the networks that have not been run, which takes seconds each and no memory: PyTorch's meta device counts without
computing. `table` writes docs/architectures.md from the rows.
"""

import argparse
import gc
import hashlib
import json
import re
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from research.grid import append, rewrite, rows_of
from tests.helpers.architectures import (
    BATCH,
    CLASSES,
    Trained,
    check,
    decide,
    described,
    inputs,
    only_read,
    outline,
    paint_images,
    scaled,
    smallest,
    undrawn,
)
from tests.helpers.processes import start_member
from tlpipeline.backbones import catalogue, classifier
from tlpipeline.backbones.taps import Backbone, Tap
from tlpipeline.choice.cases import CASES, Case
from tlpipeline.choice.decision import Decision
from tlpipeline.data import dataset, splits
from tlpipeline.data.loader import Images
from tlpipeline.files import write_tensors
from tlpipeline.training.checkpoint import MODEL, STATE
from tlpipeline.training.config import TrainingConfig
from tlpipeline.training.heads import score

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
START = "start.safetensors"
ROWS, TAPS = "architectures.csv", "architectures-taps.csv"
PAGE = HERE.parent / "docs" / "architectures.md"
COLUMNS = ("network", "case", "size", "minimum", "taps", "cut", "parameters", "parameters_kept", "forward_ops", "forward_ops_left",
           "trained_at", "workers", "step_ok", "seconds", "error")  # fmt: skip
TAP_COLUMNS = ("network", "size", "minimum", "tap", "channels", "height", "width", "parameters", "forward_ops")
WORKERS = 2
NOT_RUN = "not run"
TIMEOUT = 1800
TOGETHER, MOST_TOGETHER = 60_000_000, 8
# This process, a worker besides its network, and how often a worker holds the network's tensors: frozen, beside the uncut one and the file;
# trained, with gradients, DistributedDataParallel's buckets, the best epoch, and the optimizer's state twice (its own and the checkpoint's).
# Measured: two workers on vgg11 (0.53 GB) took 10.6 GB.
PARENT_GB, WORKER_GB = 1.5, 1.5
COPIES_FROZEN, COPIES_SGD, COPIES_ADAM, COPIES_BUCKETS = 2, 6, 8, 1


def networks() -> list[str]:
    """Return torchvision's classifiers, the one with the fewest parameters first."""
    import torchvision.models as models

    names = models.list_models(module=models)
    return sorted(names, key=lambda name: (next(iter(models.get_model_weights(name))).meta["num_params"], name))


def memory_gb(backbone: Backbone, kept: Tap, decision: Decision, workers: int) -> float:
    """Return about how much memory these workers and this process need together."""
    copies = COPIES_FROZEN
    if decision.freeze != "kept":
        copies = (COPIES_ADAM if backbone.normalization == "layer" else COPIES_SGD) + (COPIES_BUCKETS if workers > 1 else 0)
    whole = sum(p.numel() for p in backbone.module.parameters())
    return PARENT_GB + workers * (WORKER_GB + (copies * kept.parameters + whole) * 4 / 1e9)


# --- running --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Plan:
    """What is to be run of one network.

    Attributes:
        size: side at which it is trained; parameters: of the whole network.
        decisions: by case; rows: by case, filled in as it goes.
    """

    name: str
    size: int
    parameters: int
    decisions: dict[str, Decision]
    rows: dict[str, dict[str, object]]


def run(options: argparse.Namespace) -> int:
    """Run what has no row yet; return how many rows say that something failed."""
    path = options.results / ROWS
    wanted = [name for name in networks() if not options.networks or name in options.networks]
    asked = (
        {(name, case.name) for name in wanted for case in CASES if not options.case or case.name in options.case}
        if options.again
        else set()
    )
    kept = [row for row in rows_of(path) if row["step_ok"] == "yes" and (row["network"], row["case"]) not in asked]
    rewrite(path, COLUMNS, kept)
    done = {(row["network"], row["case"]) for row in kept}
    together: list[Plan] = []
    for name in wanted:
        cases = [case for case in CASES if (name, case.name) not in done and (not options.case or case.name in options.case)]
        if cases:
            together.append(planned(name, cases, options))
        # A group of workers takes longer to start than to train a small network.
        if together and (name == wanted[-1] or sum(plan.parameters for plan in together) > TOGETHER or len(together) == MOST_TOGETHER):
            with tempfile.TemporaryDirectory(prefix="architectures-", dir=options.work) as place:
                carry_out(together, Path(place))
            for row in (row for plan in together for row in plan.rows.values()):
                append(path, COLUMNS, row)
                print(*(f"{row[c]}" for c in ("network", "case", "cut", "trained_at", "workers", "seconds", "error")), flush=True)
            together = []
    failed = [row for row in rows_of(path) if row["step_ok"] == "no"]
    for row in failed:
        print(f"FAILED {row['network']} {row['case']}: {row['error']}", file=sys.stderr)
    return len(failed)


def planned(name: str, cases: Sequence[Case], options: argparse.Namespace) -> Plan:
    """Describe a network, note its taps, and decide for each of these cases where it is cut and by how many workers it is trained."""
    row: dict[str, object] = dict.fromkeys(COLUMNS, "") | {"network": name}
    try:
        whole = outline(name)
        taps = described(whole, whole.transforms.size)
        note_taps(options.results / TAPS, whole, taps)
        size = smallest(whole)
        small = outline(name, size)
        there = described(only_read(small), size)
        decisions = {case.name: decide(small.tap_names, there, size, case) for case in map(recipe_of, cases)}
    except Exception as error:  # whatever a network does wrong is a row
        return Plan(name, 0, 0, {}, {case.name: row | {"case": case.name, "step_ok": "no", "error": first_line(error)} for case in cases})
    by_name = {tap.name: tap for tap in taps}
    row |= {
        "size": whole.transforms.size, "minimum": whole.minimum, "taps": len(taps), "parameters": taps[-1].parameters,
        "forward_ops": taps[-1].forward_ops, "trained_at": size,
    }  # fmt: skip
    rows: dict[str, dict[str, object]] = {}
    for case, decision in decisions.items():
        cut = by_name[decision.slice]
        needs = {workers: memory_gb(small, cut, decision, workers) for workers in (WORKERS, 1)}
        workers = next((workers for workers, needed in needs.items() if needed <= options.memory_gb), 0)
        rows[case] = row | {
            "case": case, "cut": cut.name, "parameters_kept": cut.parameters, "forward_ops_left": cut.forward_ops, "workers": workers,
            "step_ok": "" if workers == 0 else "yes",
            "error": f"{NOT_RUN}: needs about {needs[1]:.0f} GB, --memory-gb {options.memory_gb:g}" if workers == 0 else "",
        }  # fmt: skip
    return Plan(name, size, sum(p.numel() for p in whole.module.parameters()), decisions, rows)


def recipe_of(case: Case) -> Case:
    """Return the case with the recipe that is checked: large_similar keeps the head that the workers validated, which can be compared then."""
    return replace(case, recipe=replace(case.recipe, refit_head=case.name != "large_similar"))


def carry_out(plans: Sequence[Plan], place: Path) -> None:
    """Train and check what is planned; what goes wrong is said in the rows."""
    manifest = paint_images(place)
    for plan in plans:
        if plan.decisions:
            (place / plan.name).mkdir()
            try:
                write_start(plan, manifest, place / plan.name / START)
            except Exception as error:  # whatever a network does wrong is a row
                for row in plan.rows.values():
                    row |= {"step_ok": "no", "error": first_line(error)}
                plan.decisions.clear()
            gc.collect()
    for workers in (WORKERS, 1):
        jobs = [
            (plan, case, job_of(plan.name, decision, manifest, place / plan.name))
            for plan in plans
            for case, decision in plan.decisions.items()
            if plan.rows[case]["workers"] == workers
        ]
        train_all(jobs, workers, place)
    for plan in plans:
        checked(plan, manifest, place / plan.name)
        gc.collect()  # traced graphs hold their networks in cycles


def write_start(plan: Plan, manifest: Path, path: Path) -> None:
    """Write the weights that a network starts from: random ones whose running statistics are of the training images.

    In a deep network without them hardly anything of an image arrives at the last tap, and no gradient at the first.
    """
    fresh = catalogue.load(plan.name, catalogue.NONE, size=plan.size)
    images = Images(manifest.parent / "images", dataset.read_manifest(manifest).used(splits.TRAIN), fresh.transforms.at(plan.size))
    write_tensors(scaled(plan.name, inputs(images), plan.size), path)


def md5(path: Path) -> str:
    """Return the md5 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def train_all(jobs: Sequence[tuple[Plan, str, TrainingConfig]], workers: int, place: Path) -> None:
    """Train in a group of so many workers, one after the other; where one fails, the rest go on in a new group."""
    while jobs:
        started = time.time()
        error = in_group(workers, [(job, place / plan.name / case) for plan, case, job in jobs], place / "spec.json")
        for plan, case, _ in jobs:
            finished = place / plan.name / case / "scratch0" / "finished" / STATE
            jobs = jobs[1:]
            failed = not finished.exists()
            ended = time.time() if failed else finished.stat().st_mtime
            plan.rows[case]["seconds"] = round(ended - started, 1)
            started = ended
            if failed:
                plan.rows[case] |= {"step_ok": "no", "error": error or "ended without a model"}
                break


def job_of(name: str, decision: Decision, manifest: Path, place: Path) -> TrainingConfig:
    """Return the job of one epoch with one batch, from the weights in the network's folder."""
    return TrainingConfig(
        workspace=str(place), images=str(manifest.parent / "images"), manifest=str(manifest), backbone=name, weights=START,
        weights_md5=md5(place / START), plan=decision.plan, seed=0, epochs=1, batch_size=BATCH, flip=True,
        precision="float32", history=str(place / f"{decision.case}.jsonl"),
    )  # fmt: skip


def in_group(size: int, jobs: Sequence[tuple[TrainingConfig, Path]], spec: Path) -> str:
    """Run jobs in a gloo group of so many processes; return the first error, "" for none."""
    spec.write_text(json.dumps([{"job": asdict(job), "folder": str(folder)} for job, folder in jobs]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = [spec.with_name(f"stderr{rank}") for rank in range(size)]
    members = []
    for rank in range(size):
        with said[rank].open("w") as stderr:
            members.append(start_member(rank, size, port, spec, stderr=stderr))
    deadline, wrong = time.monotonic() + TIMEOUT, -1
    # A member that fails leaves the others waiting for it.
    while wrong < 0 and any(member.poll() is None for member in members):
        wrong = next((rank for rank, member in enumerate(members) if member.poll()), -1)
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    late = any(member.poll() is None for member in members) and wrong < 0
    for member in members:
        if member.poll() is None:
            member.kill()
        member.wait()
    wrong = next((rank for rank, member in enumerate(members) if member.returncode), -1) if wrong < 0 else wrong
    if late:
        return f"took longer than {TIMEOUT} s"
    if wrong < 0:
        return ""
    text = re.sub(r"^\[rank\d+\]: ", "", said[wrong].read_text(errors="replace"), flags=re.MULTILINE)
    lines = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]
    return (lines or [f"worker {wrong} ended with {members[wrong].returncode}"])[0][:300]


def checked(plan: Plan, manifest: Path, place: Path) -> None:
    """Check each export against the start, and the trainer's own validation; what is wrong goes into the rows."""
    trained = {case: decision for case, decision in plan.decisions.items() if plan.rows[case]["step_ok"] == "yes"}
    if not trained:
        return
    start = load_file(place / START)
    with undrawn():
        backbone = catalogue.load(plan.name, START, md5=md5(place / START), root=place, size=plan.size)
    listed = dataset.read_manifest(manifest)
    transforms = backbone.transforms.at(plan.size)
    shown, val = (Images(manifest.parent / "images", listed.used(side), transforms) for side in (splits.TEST, splits.VAL))
    for case, decision in trained.items():
        scratch = place / case / "scratch0"
        finished = scratch / "finished"
        for key, value in backbone.module.state_dict().items():
            value.copy_(start[key])
        try:
            stepped = load_file(scratch / "checkpoint" / "current.safetensors")
            check(backbone, decision, Trained(start, stepped, finished / MODEL, None), shown)
            exported_again(finished / MODEL, place / "again")
            if decision.freeze != "kept":
                with undrawn():
                    reloaded, _ = classifier.load(finished / MODEL)
                validation = classifier.probabilities(reloaded, val, torch.device("cpu"), lambda done: None)
                history = json.loads((finished / "history.json").read_text())
                same_as_in_training(history, validation, [CLASSES.index(row.label) for row in val.rows], decision.recipe.refit_head)
        except Exception as error:  # whatever a network does wrong is a row
            plan.rows[case] |= {"step_ok": "no", "error": first_line(error)}
        shutil.rmtree(place / case)


def exported_again(folder: Path, again: Path) -> None:
    """Check that a reloaded model is saved as the same bytes."""
    with undrawn():
        classifier.save(*classifier.load(folder), again)
    same = all((folder / name).read_bytes() == (again / name).read_bytes() for name in (classifier.WEIGHTS, classifier.DESCRIPTION))
    shutil.rmtree(again)
    assert same, "a reloaded model is saved otherwise"


def same_as_in_training(history: Mapping[str, object], chances: Tensor, labels: Sequence[int], again: bool) -> None:
    """Check that what was trained is what was kept, and that reloaded it has the validation loss that the workers saw.

    A head that was solved last has seen the validation images: its loss there is only said to be lower than before.
    """
    lines = history["history"]
    assert isinstance(lines, list)
    arms = ["head", "fine-tune", "last head"][: 2 + again]
    assert [line["phase"] for line in lines] == arms, f"the phases were {[line['phase'] for line in lines]}"
    assert history["phase"] == "fine-tune", f"kept was {history['phase']}"
    _, loss = score(chances, np.array(labels))
    if again:
        assert loss < lines[-1]["log_loss"] + 1e-3, f"validation loss {loss:.4f} reloaded, {lines[-1]['log_loss']:.4f} without these images"
        return
    assert abs(loss - lines[-1]["log_loss"]) < 1e-3, f"validation loss {loss:.4f} reloaded, {lines[-1]['log_loss']:.4f} in training"


def first_line(error: Exception) -> str:
    """Return the first line of an error, its kind before it."""
    return f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"[:300]


# --- rows -----------------------------------------------------------------------------------------------------------------------------


def note_taps(path: Path, backbone: Backbone, taps: Sequence[Tap]) -> None:
    """Write the taps of a network at its weights' own size in place of those that were there."""
    others = [row for row in rows_of(path) if row["network"] != backbone.name]
    own = {"network": backbone.name, "size": backbone.transforms.size, "minimum": backbone.minimum}
    rewrite(path, TAP_COLUMNS, [*others, *({**own, **asdict(tap), "tap": tap.name} for tap in taps)])


def note_missing(path: Path) -> None:
    """Note the taps of all networks that have none there."""
    there = {row["network"] for row in rows_of(path)}
    for name in networks():
        if name not in there:
            backbone = outline(name)
            note_taps(path, backbone, described(backbone, backbone.transforms.size))


# --- the page -------------------------------------------------------------------------------------------------------------------------


HEAD = """# Architectures

<!-- Written by `python -m benchmarks.architectures table` from the rows that `python -m benchmarks.architectures run` measured. -->

This page lists {networks} classifiers of torchvision {torchvision}. Each one was tested under each of the four cases, with random weights:

1. Its taps are described, and it is cut.
2. Two workers train it for one real step.
3. Frozen tensors are bit for bit what they were at the start.
4. It is exported and reloaded.
5. It gives the same predictions as the uncut network with these tensors.

{counts}

| column | what it is |
|---|---|
| parameters, cost | millions, and billions of floating-point operations of a forward pass of one image, both without the old head; a multiplication and an addition count as two |
| input | side in pixels at which the weights were trained |
| minimum | smallest side in pixels; vision transformers take multiples of their patch size, which is at the end of their names |
| cut at a third, at two thirds | the tap after which about a third, or two thirds, of the taps are kept |
| parameters left, cost left | what the cut leaves of both |
| cases | how many of the four cases passed |

Every tap of every network is in `benchmarks/results/{taps}`.

| network | parameters | cost | input | minimum | taps | cut at a third | parameters left | cost left | cut at two thirds | parameters left | cost left | cases |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def page(results: Path) -> str:
    """Return docs/architectures.md."""
    import torchvision

    rows, taps = rows_of(results / ROWS), rows_of(results / TAPS)
    names = sorted({row["network"] for row in taps})
    lines = []
    for name in names:
        here = [row for row in taps if row["network"] == name]
        mine = [row for row in rows if row["network"] == name]
        last = here[-1]
        whole = {key: int(last[key]) for key in ("parameters", "forward_ops")}
        cuts = []
        for part in (1, 2):
            at = here[max(round(len(here) * part / 3) - 1, 0)]
            cuts += [f"`{at['tap']}`", *(f"{100 * int(at[key]) / value:.1f} %" for key, value in whole.items())]
        size, minimum = last["size"], last["minimum"]
        passed = sum(row["step_ok"] == "yes" for row in mine)
        figures = [f"{whole['parameters'] / 1e6:.2f}", f"{whole['forward_ops'] / 1e9:.2f}", size, minimum, str(len(here))]
        lines.append(f"| {' | '.join([f'`{name}`', *figures, *cuts, f'{passed} of {len(CASES)}' if mine else 'not run'])} |")
    return (
        HEAD.format(
            networks=len(names),
            torchvision=torchvision.__version__.partition("+")[0],
            counts=counts(rows, len(names) * len(CASES)),
            taps=TAPS,
        )
        + "\n".join(lines)
        + "\n"
        + "".join(remarks(rows))
    )


def counts(rows: Sequence[Mapping[str, str]], pairs: int) -> str:
    """Say in a sentence how many of these pairs went through."""
    passed = [row for row in rows if row["step_ok"] == "yes"]
    alone = sum(row["workers"] == "1" for row in passed)
    failed, skipped = (sum(row["step_ok"] == answer for row in rows) for answer in ("no", ""))
    return (
        f"Of {pairs} pairs of a network and a case, {len(passed)} passed. {alone} of these were trained in one process, because two do not fit into "
        f"the memory.\n{failed} failed, {skipped} do not fit into the memory at all, and {pairs - len(rows)} have not been run."
    )


def remarks(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a line for each row that says something, under a heading."""
    said = [(row, row["error"] or ("one process" if row["workers"] == "1" else "")) for row in rows]
    lines = [f"- `{row['network']}`, `{row['case']}`: {text}\n" for row, text in sorted(said, key=lambda pair: pair[0]["network"]) if text]
    return ["\n## What was not trained by two workers\n\n", *lines] if lines else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "taps", "table"))
    parser.add_argument("networks", nargs="*", help="only these, by torchvision's names")
    parser.add_argument("--case", nargs="+", choices=[case.name for case in CASES], help="only these cases")
    parser.add_argument("--again", action="store_true", help="run what has a row, too: rows do not know which code they are of")
    parser.add_argument("--memory-gb", type=float, default=12, help="what all processes together may use")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where checkpoints and exports go, deleted after")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.verb == "run":
        sys.exit(1 if run(options) else 0)
    if options.verb == "taps":
        note_missing(options.results / TAPS)
    else:
        PAGE.write_text(page(options.results), encoding="utf-8")


if __name__ == "__main__":
    main()
