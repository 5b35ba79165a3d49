"""Do families of timm and Hugging Face go through all four cases?

Each network is built with random weights, its taps are found, and under every row of the table of cases it is cut, trained for one step in
this process, exported and reloaded. Frozen tensors must be those of the start, the others must have moved, and the reloaded model must
predict what the uncut network with its tensors predicts. Networks of Hugging Face have small configurations.

    python -m benchmarks.packages run [NETWORK ...] [--again]
    python -m benchmarks.packages table

`run` appends a row to benchmarks/results/packages.csv for each network and case that has none yet, and fails if one failed. `table` prints the
table of the rows and writes it to docs/package-networks.md.
"""

import argparse
import copy
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
import transformers

from benchmarks.architectures import first_line
from research.grid import append, rewrite, rows_of
from tests.helpers.architectures import CLASSES, check, decide, inputs, only_read, paint_images, scaled, step
from tests.helpers.package_networks import FAMILIES, folder_of
from tlpipeline.backbones import catalogue
from tlpipeline.backbones.taps import measure_taps
from tlpipeline.choice.cases import CASES
from tlpipeline.data import dataset
from tlpipeline.data.loader import Images

HERE = Path(__file__).resolve().parent
ROWS = HERE / "results" / "packages.csv"
PAGE = HERE.parent / "docs" / "package-networks.md"
COLUMNS = ("network", "family", "library", "case", "size", "taps", "first", "cut", "last", "layout", "parameters", "ok", "seconds", "error")


def run(names: list[str], again: bool) -> int:
    """Run what has no row yet; return how many rows say that something failed."""
    kept = [row for row in rows_of(ROWS) if row["ok"] == "yes" and not (again and (not names or row["network"] in names))]
    rewrite(ROWS, COLUMNS, kept)
    done = {row["network"] for row in kept}
    with tempfile.TemporaryDirectory(prefix="packages-") as place:
        manifest = paint_images(Path(place))
        for name, family, _ in FAMILIES:
            if name not in done and (not names or name in names):
                for row in rows_for(name, family, manifest, Path(place)):
                    append(ROWS, COLUMNS, row)
                    print(*(row[column] for column in ("network", "case", "cut", "seconds", "error")), flush=True)
    failed = [row for row in rows_of(ROWS) if row["ok"] == "no"]
    for row in failed:
        print(f"FAILED {row['network']} {row['case']}: {row['error']}", file=sys.stderr)
    return len(failed)


def rows_for(name: str, family: str, manifest: Path, place: Path) -> list[dict[str, object]]:
    """Take a network through the four cases; return a row for each."""
    made: list[dict[str, object]] = []
    try:
        backbone = catalogue.load(folder_of(name, place / "configurations"), catalogue.NONE)
        size = backbone.transforms.size
        taps = measure_taps(only_read(backbone), size)
        rows = sorted(dataset.read_manifest(manifest).used("train"), key=lambda row: row.path.split("/")[::-1])[:4]
        images, shown = (Images(manifest.parent / "images", part, backbone.transforms) for part in (rows, rows[:1]))
        # Without statistics of their own, hardly anything of an image arrives at the last layer of a random network.
        start = copy.deepcopy(scaled(backbone.name, inputs(images), size))
        for key, value in start.items():
            # Residual branches that start closed would get no gradient in the first step.
            if key.endswith("weight") and value.dim() == 1 and not value.any():
                value.fill_(1)
    except Exception as error:  # whatever a network does wrong is a row
        empty = dict.fromkeys(COLUMNS, "") | {"network": name, "family": family, "ok": "no", "error": first_line(error)}
        return [{**empty, "case": case.name} for case in CASES]
    for case in CASES:
        started = time.perf_counter()
        row: dict[str, object] = {
            "network": name, "family": family, "library": " ".join(backbone.library.split(" ")[:2]), "case": case.name, "size": size,
            "taps": len(backbone.tap_names), "first": backbone.tap_names[0], "last": backbone.tap_names[-1],
            "layout": backbone.layouts.get(backbone.tap_names[-1], ""), "parameters": taps[-1].parameters, "ok": "yes", "error": "", "cut": "",
        }  # fmt: skip
        try:
            backbone.module.load_state_dict(start)
            decision = decide(backbone.tap_names, taps, size, case)
            labels = [CLASSES.index(image.label) for image in rows]
            trained = step(backbone, start, decision, images, labels, shown, place / "model")
            check(backbone, decision, trained, shown)
            row["cut"] = decision.slice
        except Exception as error:  # whatever a network does wrong is a row
            row |= {"ok": "no", "error": first_line(error)}
        row["seconds"] = round(time.perf_counter() - started, 1)
        made.append(row)
    return made


# --- the page -------------------------------------------------------------------------------------------------------------------------

HEAD = """# Networks of timm and Hugging Face

<!-- Written by `python -m benchmarks.packages table` from the rows that `python -m benchmarks.packages run` measured. -->

Networks of each family were built with random weights and taken through the four cases. Each was cut, trained for one step, exported and
reloaded. Frozen tensors stayed the same bit for bit. The reloaded model predicted what the uncut network with its tensors predicts. The
same code finds the taps of other networks ([how](backbones.md#how-taps-are-found)), but they were not tried.

The networks named `hf:` have small configurations of their type.

| column | meaning |
|---|---|
| parameters | millions, without the old head |
| input | side in pixels |
| tokens | class and register tokens, where the last tap gives tokens |
| cases | how many of the four cases passed |

| network | family | parameters | input | taps | first tap | cut in the slicing case | last tap | tokens | cases |
|---|---|---|---|---|---|---|---|---|---|
"""


def page() -> str:
    """Return docs/package-networks.md."""
    rows = rows_of(ROWS)
    lines = []
    for name, family, _ in FAMILIES:
        mine = [row for row in rows if row["network"] == name]
        if mine:
            row, passed = mine[0], sum(row["ok"] == "yes" for row in mine)
            cut = next((r["cut"] for r in mine if r["cut"] != r["last"] and r["cut"]), "")
            tokens = row["layout"].removeprefix("tokens") if row["layout"].startswith("tokens") else ""
            lines.append(
                f"| `{name}` | {family} | {int(row['parameters'] or 0) / 1e6:.2f} | {row['size']} | {row['taps']} | `{row['first']}` | `{cut}` | "
                f"`{row['last']}` | {tokens} | {passed} |\n"
            )
    libraries = sorted({row["library"] for row in rows if row["library"]})
    return HEAD + "".join(lines) + f"\nMeasured with {' and '.join(libraries)}.\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("networks", nargs="*", help="only these")
    parser.add_argument("--again", action="store_true", help="run what has a row, too")
    options = parser.parse_args()
    if options.verb == "run":
        sys.exit(1 if run(options.networks, options.again) else 0)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"torch {torch.__version__}, timm {timm.__version__}, transformers {transformers.__version__}\n\n{page()}")


if __name__ == "__main__":
    main()
