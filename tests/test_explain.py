"""The explanation: every number is the decision's, in the terminal, as markdown, as JSON and on the report page, whatever the layout."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from tests.helpers.workspaces import REPOSITORY
from tlpipeline import records
from tlpipeline.backbones.classifier import Start
from tlpipeline.choice import explain, reasons
from tlpipeline.choice.cases import CASES, find
from tlpipeline.choice.decision import Arm, CutGain, Decision, InterimResult, OutOfRange, Race, TuningGain, Turning
from tlpipeline.data.dataset import Manifest
from tlpipeline.evaluation.metrics import ClassMetrics, Metrics
from tlpipeline.evaluation.verdict import Forgotten, Verdict
from tlpipeline.profiling.profile import Head, Probe, Profile
from tlpipeline.registry.versions import Registration
from tlpipeline.report import page as report
from tlpipeline.training.config import Epoch
from tlpipeline.workspace import create, release

NAMES = ("conv1", "conv2", "conv3", "fc1", "fc2")
ACCURACIES = (0.61, 0.72, 0.93, 0.85, 0.81)
LONG = "backbone.encoder.layers.encoder_layer_11.self_attention.out_projection.of.a.very.deep.network"


def profile(names: tuple[str, ...] = NAMES, accuracies: tuple[float, ...] = ACCURACIES) -> Profile:
    """A profile of 1,234 images whose third tap is the best."""
    taps = tuple(
        Probe(
            n, 8, 4, 4, 1000 * (i + 1), 50_000 * (i + 1), (1, 2), a, a - 0.03, a + 0.02, a, a - accuracies[-1], 0.01, 0.1, "ff" * 64, (n,)
        )
        for i, (n, a) in enumerate(zip(names, accuracies, strict=True))
    )

    def head(*read: str) -> Head:
        best = max(t.accuracy for t in taps if t.name in read)
        return Head(read, best, best - 0.03, best + 0.02, "ff" * 64, best)

    cut = head(names[2], names[1]) if len(names) > 2 else None
    learning_curve = ((128, 0.876), (256, 0.913), (512, 0.934))
    return Profile(
        "net",
        "w",
        32,
        "batch",
        1234,
        7,
        0.201,
        90,
        240,
        137,
        512,
        130,
        7,
        0.31,
        learning_curve,
        taps,
        head(names[-1]),
        head(*names[-3:][::-1]),
        cut,
    )


def decision(case: str = "small_different", seen: Profile | None = None) -> Decision:
    """A decision for a case, by a profile in whose middle it is cut; its two axes lie far in the case's quadrant."""
    seen, row = seen or profile(), find(case)
    large, different = row.size == "large", row.likeness == "different"
    gain, won = (0.021, 0.039) if large else (0.002, 0.039)
    won = won if different else 0.004
    tuning = TuningGain(gain, gain - 0.012, gain + 0.009, gain, 0.005, large, "prediction")
    why = "corrected" if large else "confirmed" if different else "not_significant"
    counted = won - 0.002 if large else won if different else 0.0
    cutting = CutGain("conv3", "conv3", won, won - 0.002, 0.001 if different else 0.21, counted, 0.01, different, why)
    at = seen.taps[2] if row.keep == "slice" else seen.taps[-1]
    arms = (
        Arm("frozen", 0.812, 0.781, 0.839, 1508.0),
        Arm("cut", 0.934, 0.911, 0.953, 904.8),
        Arm("multi", 0.921, 0.898, 0.941, 1508.0),
        Arm("tuned", 0.945, 0.902, 0.967, 40000.0),
    )
    return Decision(
        case=case,
        slice=at.name,
        head="cut" if row.keep == "slice" else "last",
        readings=(at.reading, seen.taps[1].reading) if row.keep == "slice" else (at.reading,),
        size=32,
        freeze=row.freeze,
        init=row.init,
        recipe=row.recipe,
        tuning=tuning,
        cutting=cutting,
        arms=arms,
        regret=0.0123,
        p_within_tolerance=0.83,
        race=None,
        race_wanted=False,
        no_race="quick",
        judges_needed=100,
        evpi=0.0004,
        turning=Turning(3134, 5000, gain),
        saved_parameters=round(1 - at.parameters / seen.parameters, 4),
        saved_ops=round(1 - at.forward_ops / seen.forward_ops, 4),
        outside=(),
        weak=(),
        forced=(),
    )


def raced(case: str = "large_different") -> Decision:
    """A decision after two looks of a race that fine-tuning won."""
    looks = (
        InterimResult(3, 9, 134, 0.8134, 0.8061, 0.0141, 0.31, 0.62, 0.01, 0.02),
        InterimResult(6, 9, 134, 0.8134, 0.9174, 0.0127, 0.97, 0.99, 0.03, 0.0),
    )
    return replace(
        decision(case),
        race=Race(looks, "tuned", "ahead", 31000.0),
        turning=None,
        tuning=TuningGain(0.001, -0.01, 0.02, 0.03, 0.005, True, "race"),
    )


def flat(words: str) -> str:
    """The words without their line breaks."""
    return " ".join(words.split())


def both(made: Decision, seen: Profile) -> list[str]:
    """The explanation for a wide terminal and as markdown, without line breaks."""
    return [flat(explain.text(made, seen, 110)), flat(explain.markdown(made, seen))]


# --- what is said ---------------------------------------------------------------------------------------------------------------------


def test_a_cut_says_what_it_saves_and_what_the_head_reads() -> None:
    for words in both(decision(), profile()):
        assert "small_different: cut after conv3, the network stays frozen, a new head reads conv3 + conv2" in words
        assert "The cut removes 40.0% of the 5,000 parameters and saves 40.0% of the operations" in words


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("small_similar", "small_similar: the network stays frozen, a new head reads fc2 Fine-tuning"),
        ("large_similar", "large_similar: the whole network is fine-tuned Fine-tuning"),
        ("large_different", "large_different: the whole network is fine-tuned Fine-tuning"),
    ],
)
def test_without_a_cut_nothing_is_said_to_be_saved(case: str, says: str) -> None:
    for words in both(decision(case), profile()):
        assert says in words
        assert "cut off" not in words
        assert "The cut removes" not in words
        assert "Only the old head is replaced; all 5,000 parameters below it stay." in words


def test_random_weights_are_spoken_of_where_there_are_images_for_them() -> None:
    many = replace(profile(), images=decision("large_different").recipe.scratch_from)
    for words in both(decision("large_different"), many):
        assert "the whole network is fine-tuned, and trained from random weights where that is better" in words


def test_every_arm_stands_with_its_accuracy_interval_and_relative_cost_and_the_chosen_one_is_marked() -> None:
    lines = explain.text(decision(), profile(), 80).splitlines()
    found = [line.split() for line in lines if re.search(r"% +\d+\.\d to ", line)]
    assert found == [
        ["frozen", "81.2%", "78.1", "to", "83.9", "3.8%"],
        ["→", "cut", "93.4%", "91.1", "to", "95.3", "2.3%"],
        ["multi-tap", "92.1%", "89.8", "to", "94.1", "3.8%"],
        ["fine-tuned", "94.5%", "90.2", "to", "96.7", "100.0%"],
    ]
    assert "against 40,000 of a fine-tuning run" in flat("\n".join(lines))
    assert "| → | fine-tuned | 94.5% | 90.2 to 96.7 | 100.0% |" in explain.markdown(decision("large_similar"), profile())
    assert "| → | frozen | 81.2% |" in explain.markdown(decision("small_similar"), profile())
    assert "| → | multi-tap | 92.1% |" in explain.markdown(replace(decision("small_similar"), head="multi"), profile())


def test_a_forced_cut_that_was_not_weighed_borrows_nobody_s_accuracy() -> None:
    made = replace(decision(), slice="conv2", readings=(profile().taps[1].reading,), forced=("choose.slice",))
    assert explain.chosen(made, profile()) is None
    for words in both(made, profile()):
        assert "a cut after conv2, is none of these: its accuracy was not measured" in words
        assert "→ cut" not in words


def test_the_summary_the_changes_the_loss_and_the_warnings_are_those_of_the_decision() -> None:
    made = replace(decision(), weak=("few_judges",), outside=(OutOfRange("images", 100.0, 200.0, 3332.0),))
    for words in both(made, profile()):
        assert reasons.summary(made, profile()) in words
        for sentence in (*reasons.changes(made, profile()), *reasons.warnings(made, profile())):
            assert f"- {sentence}" in words
        assert "With about 1,900 more images fine-tuning would pay" in words
        assert "The choice is expected to lose 1.2 points against the best of these, and with probability 0.83 not more" in words
        assert "Out of range: images 100; the prediction was fitted on 200 to 3,332." in words


@pytest.mark.parametrize(
    ("case", "says"),
    [
        (
            "small_similar",
            "Fine-tuning is expected to gain 0.2 points (-1.0 to +1.1), less than the tolerance of 0.5, so the network stays frozen. The best "
            "earlier layer, conv3, predicts the labels 0.4 points better than the last, fc2, which may be chance (p = 0.21), so all layers stay.",
        ),
        (
            "small_different",
            "Fine-tuning is expected to gain 0.2 points (-1.0 to +1.1), less than the tolerance of 0.5, so the network stays frozen. Cutting "
            "after conv3 gains 3.9 points against the last layer, fc2, more than the 1 point required, so the layers after conv3 are cut off.",
        ),
        (
            "large_similar",
            "Fine-tuning is expected to gain 2.1 points (0.9 to 3.0), more than the tolerance of 0.5, so the whole network is trained. The best "
            "earlier layer, conv3, predicts the labels 0.4 points better than the last, fc2 (0.2 corrected for taking the best of 4), less than "
            "the 1 point required, so the data are like the source and the recipe is the gentle one.",
        ),
    ],
)
def test_the_summary_says_why_this_case(case: str, says: str) -> None:
    assert reasons.summary(decision(case), profile()) == says


def test_a_forced_case_is_said_to_be_forced_and_nothing_is_concluded() -> None:
    forced = replace(decision(), case="large_similar", forced=("choose.case",))
    words = reasons.summary(forced, profile())
    assert words.startswith("large_similar is set by choose.case. Fine-tuning is expected to gain 0.2 points")
    assert ", so " not in words


@pytest.mark.parametrize("why", ["one_tap", "weak_labels", "corrected", "not_significant", "below_border", "not_confirmed", "several_taps"])
def test_every_reason_why_nothing_is_cut_is_a_sentence(why: str) -> None:
    made = decision("small_similar")
    made = replace(made, cutting=replace(made.cutting, why=why))
    assert reasons.summary(made, profile()).endswith(", so all layers stay.")


def test_gains_that_look_like_their_border_do_not_contradict_it() -> None:
    tuning = TuningGain(0.00499, 0.0, 0.01, 0.00499, 0.005, False, "prediction")
    assert "gain 0.5 points (0.0 to 1.0), not above the tolerance of 0.5" in reasons.summary(replace(decision(), tuning=tuning), profile())
    tuning = replace(tuning, counted=0.00501, exceeds=True)
    assert "just above the tolerance of 0.5" in reasons.summary(replace(decision(), tuning=tuning), profile())


def test_each_code_of_weak_evidence_is_a_sentence() -> None:
    said = reasons.warnings(replace(decision(), weak=tuple(reasons.WEAK)), profile())
    assert len(said) == len(reasons.WEAK)
    assert all(sentence.endswith(".") and "{" not in sentence for sentence in said)


def test_a_race_is_told_look_by_look_with_its_cost() -> None:
    for words in both(raced(), profile()):
        assert "Yes. Fine-tuning won: fine-tuning is clearly ahead." in words
        assert "It cost 31,000 forward passes of one image, 78% of a fine-tuning run" in words
        assert "Accuracy on 134 validation images that selected nothing" in words
        assert (
            "Fine-tuning and the frozen head were both trained: +10.4 points on 134 validation images; fine-tuning is clearly ahead, so"
            in words
        )
    table = explain.markdown(raced(), profile())
    assert "| 3 of 9 | 81.3% | 80.6% | -0.7 ± 1.4 | 0.31 |\n| 6 of 9 | 81.3% | 91.7% | +10.4 ± 1.3 | 0.97 |" in table


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "No. choose.effort is quick."),
        ({"race_wanted": True}, "Not yet: the choice is open, and `tlpipeline run` or `dvc repro choose`"),
        ({"no_race": "few_judges"}, "No. 137 validation images are left to compare on, and it takes 100."),
        ({"no_race": "clear"}, "knowing the gain beforehand would be worth 0.0 points, with a tolerance of 0.5."),
    ],
)
def test_why_there_was_no_race(changes: dict[str, object], says: str) -> None:
    for words in both(replace(decision(), **changes), profile()):  # type: ignore[arg-type]
        assert says in words


def test_a_race_without_a_look_has_no_table() -> None:
    made = replace(raced(), race=Race((), "frozen", "budget", 2000.0))
    for words in both(made, profile()):
        assert (
            "The frozen head won: train.budget_minutes ended it before it was decided, so the cheaper way is taken. It cost 2,000" in words
        )
        assert "difference" not in words


def test_what_else_was_measured_is_said_where_it_was_and_only_there() -> None:
    for words in both(decision(), profile()):
        assert "87.6% with 128 images, 91.3% with 256 images, 93.4% with 512 images. The last doubling gained +2.1 points" in words
        assert "Head similarity S = 0.31" in words
    bare = replace(profile(), learning_curve=((40, 0.5),), head_similarity=None)
    for words in both(decision(), bare):
        for absent in ("Learning curve", "Head similarity", "What else"):
            assert absent not in words


# --- drawings -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 57, 80, 200])
@pytest.mark.parametrize("case", [c.name for c in CASES])
@pytest.mark.parametrize("counted", [None, -0.9, 0.00499, 0.005, 0.00501, 0.9])
def test_the_marker_lies_on_the_side_that_was_chosen(case: str, width: int, counted: float | None) -> None:
    made, row = decision(case), find(case)
    if counted is not None:  # at the border, and where a race was won against what its last analysis expects
        made = replace(made, tuning=replace(made.tuning, counted=counted), cutting=replace(made.cutting, counted=counted))
    lines = [line for line in explain.text(made, profile(), width).splitlines() if "●" in line and "┼" in line]
    for line, yes in zip(lines, (row.size == "large", row.likeness == "different"), strict=True):
        assert (line.index("●") > line.index("┼")) is yes
    (point,) = [r for r in explain.plane_rows(made) if r["what"] == "data set"]
    (chosen,) = [r for r in explain.plane_rows(made) if r["what"] == "chosen case"]
    assert chosen["name"] == case
    assert chosen["tuning"] < point["tuning"] < chosen["right"]
    assert chosen["cutting"] < point["cutting"] < chosen["top"]


def test_the_probe_curve_has_a_line_for_each_tap_on_one_scale_and_the_cut_below_its_tap() -> None:
    lines = explain.text(decision(), profile(), 80).splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ["tap", "probe"])
    rows = [line.split() for line in lines[start + 1 : start + 7]]
    assert [row[0] for row in rows] == ["conv1", "conv2", "conv3", "╌" * len(rows[3][0]), "fc1", "fc2"]
    assert [row[1] for row in rows] == ["61.0%", "72.0%", "93.0%", "cut", "85.0%", "81.0%"]
    assert [" ".join(row[3:]) for row in rows if row[1] != "cut"] == ["kept", "read", "read", "cut off", "cut off"]
    low, high = (float(end.rstrip("%")) / 100 for end in lines[start].split()[2:])
    for row, accuracy in zip([r for r in rows if r[1] != "cut"], ACCURACIES, strict=True):
        length = len(row[2])
        for mark, value in (("├", accuracy - 0.03), ("●", accuracy), ("┤", accuracy + 0.02)):
            assert abs(row[2].index(mark) / (length - 1) - (value - low) / (high - low)) <= 0.51 / (length - 1)


def test_one_tap_only() -> None:
    seen = profile(("conv1",), (0.8,))
    made = replace(decision("small_similar", profile()), slice="conv1", readings=(seen.taps[0].reading,), arms=decision().arms[::3])
    for words in both(made, seen):
        assert "Only the old head is replaced; all 1,000 parameters below it stay." in words
        assert "cut off" not in words


@pytest.mark.parametrize("accuracy", [0.0, 1.0])
def test_probes_that_are_all_equal_are_drawn(accuracy: float) -> None:
    seen = profile(accuracies=(accuracy,) * 5)
    seen = replace(seen, taps=tuple(replace(t, low=accuracy, high=accuracy) for t in seen.taps))
    assert explain.text(decision(), seen, 60).count("●") == 5 + 2


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("made", [decision(), raced()], ids=["unraced", "raced"])
def test_no_line_is_wider_than_the_terminal(made: Decision, width: int, long: bool) -> None:
    seen = profile()
    if long:
        names = tuple(f"{LONG}.{name}" for name in NAMES)
        seen = profile(names)
        made = replace(made, slice=f"{LONG}.{made.slice}", readings=tuple(replace(r, tap=f"{LONG}.{r.tap}") for r in made.readings))
        made = replace(made, cutting=replace(made.cutting, tap=f"{LONG}.conv3", earlier=f"{LONG}.conv3"))
    words = explain.text(made, seen, width)
    assert max(map(len, words.splitlines())) <= width
    assert "\x1b" not in words
    for figure in ("93.4%", "100.0%", "40,000", "93.0%", "0.83"):
        assert figure in words
    for name in NAMES if long else ():
        assert re.search(rf"…\S*{name} ", words), name


def test_color_changes_no_word() -> None:
    colored = explain.text(raced(), profile(), 80, color=True)
    assert "\x1b[1m" in colored
    plain = re.sub(r"\x1b\[[\d;]*m", "", colored)
    assert [line.rstrip() for line in plain.splitlines()] == explain.text(raced(), profile(), 80).splitlines()


def test_the_tables_of_the_markdown_are_well_formed() -> None:
    hostile = profile(("a|b", "c*d", "e`f", "<g>", "h"))
    made = replace(decision(), slice="e`f", readings=(hostile.taps[2].reading,))
    for words in (explain.markdown(made, hostile), explain.markdown(raced(), profile())):
        tables = re.findall(r"(?:^\|.*\|\n)+", re.sub(r"```.*?```", "", words, flags=re.S), re.M)
        assert len(tables) in (3, 4)
        for table in tables:
            header, rule, *rows = table.splitlines()
            columns = {len(re.findall(r"(?<!\\)\|", line)) for line in (header, rule, *rows)}
            assert len(columns) == 1
            assert re.fullmatch(r"\|( -{3}:? \|)+", rule)
            assert rows
        assert re.findall(r"^#+ ", words, re.M)[0] == "## "
    assert "&lt;g&gt;" in explain.markdown(made, hostile)


def test_what_is_drawn_in_the_markdown_is_as_wide_in_every_fixed_width_font() -> None:
    words = explain.markdown(decision(), profile())
    for drawn in re.findall(r"`([^`]*)`", words):
        assert drawn.isascii(), drawn
    assert re.search(r"\| cutting \| \+3\.9 \| `\.*\+\.*o\.*` \| 1\.0 \|", words)
    assert re.search(r"\| conv3 \| 93\.0% \| `\.*\[-*o-*\]\.*` \| read \|", words)
    assert re.search(r"\| probe \| \d+% to \d+% \|", words)


# --- plots ----------------------------------------------------------------------------------------------------------------------------


def test_rows_for_plots() -> None:
    rows = explain.plane_rows(decision())
    assert rows[-1] == {"tuning": 0.2, "cutting": 3.9, "right": 0.2, "top": 3.9, "name": "this data set", "what": "data set"}
    assert {r["name"] for r in rows[:-1] if r["right"] == 0.5} == {"small_similar", "small_different"}
    assert {r["name"] for r in rows[:-1] if r["top"] == 1.0} == {"small_similar", "large_similar"}
    assert [r["name"] for r in rows if r["what"] == "chosen case"] == ["small_different"]
    assert [r["what"] for r in rows].count("case") == 3
    probes = explain.probe_rows(profile(), decision())
    assert [(r["tap"], r["use"]) for r in probes] == [
        ("conv1", "kept"), ("conv2", "read"), ("conv3", "read"), ("fc1", "cut off"), ("fc2", "cut off"),
    ]  # fmt: skip
    assert probes[2] == {"tap": "conv3", "accuracy": 0.93, "low": 0.93 - 0.03, "high": 0.93 + 0.02, "use": "read"}


def fields(template: object) -> set[str]:
    """The names that a Vega-Lite template reads from the rows; those that it makes itself left out."""
    read, made = set[str](), {"rev"}

    def walk(node: object) -> None:
        if isinstance(node, dict):
            made.update([node["as"]] if isinstance(node.get("as"), str) else [])
            read.update([node["field"]] if isinstance(node.get("field"), str) else [])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)
        elif isinstance(node, str):
            read.update(re.findall(r"datum\.(\w+)", node), re.findall(r"datum\['([^']+)'\]", node))

    walk(template)
    return read - made


@pytest.mark.parametrize("name", ["plane", "probe"])
def test_dvc_draws_the_decision_by_columns_that_are_written(name: str) -> None:
    pipeline = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    (plot,) = [p[f"plots/{name}.csv"] for p in pipeline["choose"]["plots"] if f"plots/{name}.csv" in p]
    assert plot["template"] == name
    rows = {
        "plane": explain.plane_rows(decision()),
        "probe": [{"layer": ""} | row for row in explain.probe_rows(profile(), decision())],
    }[name]
    template = (create.TEMPLATE / f"{name}.json").read_text()
    assert (REPOSITORY / ".dvc" / "plots" / f"{name}.json").read_text() == template, "the root is a workspace, too"
    assert "<DVC_METRIC_DATA>" in template
    filled = template.replace("<DVC_METRIC_X>", plot["x"]).replace("<DVC_METRIC_Y>", plot["y"])
    found = fields(json.loads(filled))
    assert {plot["x"], plot["y"]} <= found <= set(rows[0])
    # What the template asks for by its words is what is written.
    for column, word in re.findall(r"datum\.(\w+) [!=]= '([^']+)'", filled):
        assert word in {row[column] for row in rows}
    assert {row["use"] for row in rows if "use" in row} <= set(re.findall(r'"(read|kept|cut off)"', template))


# --- the command, the artifact, the page ----------------------------------------------------------------------------------------------


def put(folder: Path, made: Decision, seen: Profile) -> Path:
    """Write what `choose` and `profile` write, beside the files that make a folder a workspace."""
    for name in (".git", ".dvc"):
        (folder / name).mkdir(exist_ok=True)
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(create.TEMPLATE / name, folder)
    (folder / "case.json").write_text(json.dumps(made.to_json()))
    (folder / "profile.json").write_text(json.dumps(seen.to_json()))
    return folder


def command(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `tlpipeline explain` in a process of its own, its output piped."""
    line = [sys.executable, "-m", "tlpipeline", "explain", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.mark.slow
def test_the_command_prints_text_as_wide_as_the_terminal(tmp_path: Path) -> None:
    done = command("-w", put(tmp_path, decision(), profile()), COLUMNS="60")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == explain.text(decision(), profile(), 60)
    done = command("-w", tmp_path, COLUMNS="60", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == explain.text(decision(), profile(), 60).encode("ascii", "replace").decode()


def test_the_command_prints_markdown_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tlpipeline import cli

    put(tmp_path, raced(), profile())
    cli.explain(tmp_path, markdown=True)
    assert capsys.readouterr().out == explain.markdown(raced(), profile()) == release.decision_markdown(tmp_path)
    cli.explain(tmp_path, json=True)
    content = json.loads(capsys.readouterr().out)
    assert records.parse(Decision, json.dumps(content["decision"]), "case.json", "") == raced()
    assert content["plane"] == explain.plane_rows(raced())
    assert content["probes"] == explain.probe_rows(profile(), raced())


def test_what_is_said_to_be_trained_is_what_train_override_makes_of_it(tmp_path: Path) -> None:
    made = raced()
    several = replace(made, readings=(*made.readings, profile().taps[1].reading))
    put(tmp_path, several, profile())
    last = f"After fine-tuning, a final head is solved on {' + '.join(r.tap for r in several.readings)}."
    assert last in release.decision_markdown(tmp_path)
    assert [row["use"] for row in explain.probe_rows(profile(), several)].count("read") == 2
    changed = (tmp_path / "params.yaml").read_text().replace("override: {}", "override: {refit_head: false}")
    assert "refit_head" in changed
    (tmp_path / "params.yaml").write_text(changed)
    assert "After fine-tuning" not in release.decision_markdown(tmp_path)
    assert [row["use"] for row in explain.probe_rows(*reversed(release.load_decision(tmp_path)))].count("read") == 1


def test_mistakes_of_the_command_are_one_sentence_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tlpipeline import cli

    def refused(*words: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["tlpipeline", "explain", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert end.value.code == 2
        said = capsys.readouterr()
        assert said.out == ""
        (line,) = said.err.splitlines()
        return line

    assert "found both. Leave one out" in refused("--json", "--markdown")
    assert "found no such folder. Create one with `tlpipeline init DIR`" in refused("-w", tmp_path / "nowhere")
    for name in (".git", ".dvc"):
        (tmp_path / name).mkdir()
    (tmp_path / "dvc.yaml").touch()
    message = refused("-w", tmp_path)
    assert f"expected a decision in {tmp_path / 'profile.json'}, found no such file. Run `tlpipeline run` or `dvc repro choose`" in message
    put(tmp_path, decision(), profile())
    (tmp_path / "case.json").unlink()
    assert f"expected a decision in {tmp_path / 'case.json'}, found no such file" in refused("-w", tmp_path)
    for damaged in ('{"case": "small_similar"}', "{", "[]"):
        (tmp_path / "case.json").write_text(damaged)
        assert "as this version writes it, but" in refused("-w", tmp_path)
    put(tmp_path, replace(decision(), slice="layer4"), profile())
    assert "found one that cuts at layer4, which is not one of its taps" in refused("-w", tmp_path)


def test_the_evaluation_in_markdown_is_a_table_whatever_the_classes_are_called(tmp_path: Path) -> None:
    classes = {"a|b": ClassMetrics(5, 1.0, 0.9, 0.9), "none": ClassMetrics(0, 0.0, 0.0, 0.0)}
    figures = asdict(Metrics(0.9, 0.8, 0.95, 0.95, 0.9, 0.9, 0.1, 0.1, "a|b", 1.0, 5, ("none",), classes))
    (tmp_path / "classes.json").write_text(json.dumps(figures.pop("classes")))
    (tmp_path / "metrics.json").write_text(json.dumps(figures))
    *_, first, second = release.evaluation_markdown(tmp_path).splitlines()
    assert (first, second) == (r"| a\|b | 5 | 1.000 | 0.900 |", "| none | 0 | not evaluated |  |")


def rendered(made: Decision, seen: Profile, start: Start | None = None, verdict: Verdict | None = None) -> str:
    """The report of a decision, with an epoch of fine-tuning if it says where training started."""
    return report.page(
        name="toys", registration=Registration("", False, "", verdict, "nothing new"), case=made, start=start, profile=seen,
        metrics=Metrics(0.9, 0.8, 0.95, 0.95, 0.9, 0.9, 0.1, 0.1, "a", 0.5, 5, ()), matrix=(), manifest=Manifest((), (), ()),
        history=(Epoch(1, "fine-tune", 0.5, 0.9, 0.3),) if start else (), examples=report.Examples((), (), ()), reliability=(), forecast=(),
        findings=(), changes=None, seconds={}, training={}, data_hash="", commit="",
    )  # fmt: skip


@pytest.mark.parametrize("made", [decision(), decision("small_similar"), raced()], ids=["cut", "frozen", "raced"])
def test_the_report_tells_the_same(made: Decision) -> None:
    seen = profile()
    explained = {s.key: s for s in explain.sections(made, seen)}
    words = rendered(made, seen)
    shown = flat(re.sub(r"<[^>]*>", " ", words)).replace("&#39;", "'").replace("&gt;", ">")
    for key, section in explained.items():
        for part in section.parts if key not in ("axes", "probes") else ():
            for text in [part] if isinstance(part, str) else part.rows[0] if isinstance(part, explain.Table) else part.lines:
                assert flat(text).replace("`", "") in shown.replace("`", ""), text
    (x, y) = re.search(r'<circle cx="([\d.]+)" cy="([\d.]+)"', words).groups()  # type: ignore[union-attr]
    quadrants = {name: (float(x), float(y)) for x, y, name in re.findall(r'<rect x="(\d+)" y="(\d+)".*?<text[^>]*>(\w+)<', words, re.S)}
    left, top = quadrants[made.case]
    assert left < float(x) < left + 130
    assert top < float(y) < top + 130


@pytest.mark.parametrize(
    "name",
    [
        "<img src=x onerror=alert(1)>",
        "a|b",
        "[a](javascript:b)",
        "`a`",
        "**a**",
        "__a__",
        "a\n# b",
        "&lt;",
        "\\|",
        "\x1b[31m",
        "$(rm)",
        "; rm",
        "-rf",
    ],
)
def test_a_name_means_itself_in_markdown(name: str) -> None:
    shown = explain.cell(name)
    assert not re.search(r"[\x00-\x1f]|[<>]|(?<!\\)(\\\\)*[|*`\[\]]|(?<![\\\w])_", shown)
    assert re.sub(r"\\(.)", r"\1", html.unescape(shown)) == re.sub(r"[\x00-\x1f]", " ", name)


def test_a_name_inside_which_an_underscore_stands_is_left_as_it_is() -> None:
    assert explain.cell("features.denoise_layer2 (10 %)") == "features.denoise_layer2 (10 %)"


def test_the_report_has_a_table_of_what_a_warm_model_forgot() -> None:
    start = Start("shop@v0.1.0", True, None, 0.9, 40)
    verdict = Verdict(
        "accepted", "shop@v0.1.0", 30, 30, 0, "accuracy", 0.9, 0.8, 4, 1, 0.01, 0.0, 0.1, (), (), 0.5, 100, "It is better.",
        forgotten=(Forgotten("tulip", 10, 0.9, 0.7),),
    )  # fmt: skip
    shown = flat(re.sub(r"<[^>]*>", " ", rendered(raced(), profile(), start, verdict)))
    assert "Warm: from the weights of shop@v0.1.0 (90.0% with this start, on 40 validation images)." in shown.replace("90.0 %", "90.0%")
    assert "recognized less often than by shop@v0.1.0" in shown
    assert re.search(r"tulip\s+10\s+90\.0 ?%\s+70\.0 ?%", shown)
    assert "No class is recognized less often" not in shown
    assert "No class is recognized less often" in flat(rendered(raced(), profile(), start, replace(verdict, forgotten=())))
    assert "recognized less often" not in rendered(raced(), profile(), None, None)
