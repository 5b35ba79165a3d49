"""params.yaml: every setting has a default, is explained and checked; a wrong one is refused with its path and a way out."""

import datetime
import json
import re
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from tests.helpers.workspaces import REPOSITORY
from tlpipeline.errors import ParamsError
from tlpipeline.params import RENAMED, RETIRED, GateParams, Params, load, remarks, sections, settings
from tlpipeline.workspace import settings as writer

TEMPLATE = REPOSITORY / "tlpipeline" / "workspace" / "template"
GONE = object()


@pytest.fixture
def changed(tmp_path: Path) -> Any:
    """Return a function that loads the template with one value changed, or taken away."""

    def load_with(key: str, value: Any) -> Params:
        content = yaml.safe_load((TEMPLATE / "params.yaml").read_text(encoding="utf-8"))
        *sections, name = key.split(".")
        section = content
        for part in sections:
            section = section[part]
        if value is GONE:
            del section[name]
        else:
            section[name] = value
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        return load(tmp_path / "params.yaml")

    return load_with


def message(changed: Any, key: str, value: Any) -> str:
    with pytest.raises(ParamsError) as caught:
        changed(key, value)
    return str(caught.value)


def test_the_template_loads() -> None:
    params = load(TEMPLATE / "params.yaml")
    assert params.data.name == "digits"
    assert params.train.epochs == "auto"
    assert params.train.override == {}


def test_the_settings_at_the_root_load() -> None:
    assert load(REPOSITORY / "params.yaml").cluster.workers >= 0


def test_an_unknown_setting_is_refused_with_its_path_and_the_nearest_known_one(changed: Any) -> None:
    text = message(changed, "train.epoch", 5)
    assert "params.yaml: train.epoch:" in text
    assert "did you mean epochs" in text


def test_an_unknown_section_is_refused_with_the_nearest_known_one(changed: Any) -> None:
    text = message(changed, "trains", {})
    assert "params.yaml: trains:" in text
    assert "did you mean train?" in text


def test_a_setting_that_resembles_none_is_refused_with_a_list_of_the_known_ones(changed: Any) -> None:
    text = message(changed, "data.zzz", 1)
    assert "data.zzz" in text
    assert "name, images, size" in text


def test_each_missing_setting_has_its_default(changed: Any) -> None:
    for section, keys in yaml.safe_load((TEMPLATE / "params.yaml").read_text(encoding="utf-8")).items():
        for key in keys:
            assert getattr(getattr(changed(f"{section}.{key}", GONE), section), key) == getattr(getattr(Params(), section), key)


@pytest.mark.parametrize("value", [GONE, None, {}])
def test_a_missing_or_empty_section_has_its_defaults(changed: Any, value: Any) -> None:
    assert changed("gate", value).gate == GateParams()


def test_the_template_holds_the_defaults() -> None:
    assert load(TEMPLATE / "params.yaml") == Params()


def test_a_section_that_holds_no_settings_is_refused_with_those_it_could_hold(changed: Any) -> None:
    assert "params.yaml: evaluate: expected a section with settings such as confidence, found a list" in message(changed, "evaluate", [1])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.size", 32.5, "auto or a whole number of at least 8, found 32.5"),
        ("data.images", 7, "text that is not empty, found 7"),
        ("backbone.weights_md5", 0, "none or 32 hexadecimal digits, found 0"),
        ("profile.images", "many", "a whole number of at least 16, found 'many'"),
        ("profile.seed", None, "a whole number from 0 to 9223372036854775807, found nothing"),
        ("choose.gain", "1", "a number from 0 to 100, found '1'"),
        ("choose.draws", 1e3, "a whole number from 100 to 100000, found 1000.0"),
        ("train.flip", "false", "true or false, found 'false'"),
        ("train.flip", "no", "true or false, found the word no"),
        ("train.flip", 1, "true or false, found 1"),
        ("train.epochs", True, "auto or a whole number of at least 1, found true"),
        ("choose.gain", True, "a number from 0 to 100, found true"),
        ("train.override", [], "names of recipe values, each with one value, found a list"),
        ("gate.rule", False, "better or not_worse, found false"),
        ("cluster.workers", [2], "a whole number of at least 0, found a list"),
        ("train.seed", datetime.date(2026, 1, 2), "found 2026-01-02 (date)"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_path_and_what_is_expected(changed: Any, key: str, value: Any, expected: str) -> None:
    assert expected in message(changed, key, value)
    assert f"params.yaml: {key}: expected " in message(changed, key, value)


def test_a_recipe_value_of_no_plain_type_is_refused_with_its_path(changed: Any) -> None:
    text = message(changed, "train.override", {"clip": datetime.date(2026, 1, 2)})
    assert "train.override.clip: expected a number, a word, true or false, found 2026-01-02" in text


@pytest.mark.parametrize("key", ["train.epochs", "train.batch_size", "profile.images", "choose.gain", "cluster.workers"])
@pytest.mark.parametrize("word", ["yes", "no", "true"])
def test_yes_and_no_are_no_numbers(tmp_path: Path, key: str, word: str) -> None:
    section, name = key.split(".")
    (tmp_path / "params.yaml").write_text(f"{section}:\n  {name}: {word}\n", encoding="utf-8")
    with pytest.raises(ParamsError, match=rf"{section}\.{name}: expected .*, found '?{word}"):
        load(tmp_path / "params.yaml")


def test_numbers_are_read_as_dvc_reads_them(tmp_path: Path) -> None:
    from dvc.utils.serialize import load_yaml

    path = tmp_path / "params.yaml"
    path.write_text("train: {seed: 010, budget_minutes: 1e1}\n", encoding="utf-8")
    params = load(path)
    assert load_yaml(str(path))["train"] == {"seed": params.train.seed, "budget_minutes": params.train.budget_minutes}
    assert params.train.seed == 10


def test_a_setting_given_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("train:\n  seed: 1\n  seed: 2\n", encoding="utf-8")
    with pytest.raises(ParamsError, match='line 3: found duplicate key "seed"'):
        load(tmp_path / "params.yaml")


def test_aliases_of_aliases_are_refused_before_they_grow(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    (tmp_path / "params.yaml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ParamsError, match=r"line 2: expected a value, found \*a0"):
        load(tmp_path / "params.yaml")


def test_an_alias_of_a_value_is_that_value(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("train: {seed: &seed 5}\nprofile: {seed: *seed}\n", encoding="utf-8")
    assert load(tmp_path / "params.yaml").profile.seed == 5


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("data.name", "Digits", "lower-case letters"),
        ("data.name", "7up", "a letter first"),
        ("data.name", "été", "lower-case letters"),
        ("data.name", "digits-", "no dash last"),
        ("data.name", "", "lower-case letters"),
        ("data.images", "", "not empty"),
        ("data.size", 4, "auto or a whole number of at least 8"),
        ("data.size", "large", "auto or a whole number of at least 8"),
        ("backbone.weights_md5", "1234", "none or 32 hexadecimal digits"),
        ("profile.images", 15, "at least 16"),
        ("profile.seed", -1, "0 to 9223372036854775807"),
        ("train.seed", 2**70, "0 to 9223372036854775807"),
        ("choose.race_below", 1.01, "0 to 1"),
        ("choose.alpha", 0.0, "0.001 to 0.5"),
        ("choose.gain", float("nan"), "0 to 100"),
        ("choose.draws", 99, "100 to 100000"),
        ("choose.draws", 10**10, "100 to 100000"),
        ("train.override", {1: "x"}, "names of recipe values"),
        ("train.epochs", 0, "auto or a whole number of at least 1"),
        ("train.batch_size", 1, "at least 2"),
        ("evaluate.confidence", 95, "0.5 to 0.999"),
        ("gate.rule", "best", "better or not_worse"),
        ("gate.undecided", "t", "register or reject"),
        ("gate.class_floor", -1.0, "none or a number from 0 to 100"),
        ("gate.margin", -1, "0 to 100"),
        ("gate.promote", "yes", "manual or auto"),
        ("cluster.workers", -1, "at least 0"),
        ("cluster.gpu", "maybe", "auto, true or false"),
        ("cluster.storage", "", "not empty"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_path_and_the_range(changed: Any, key: str, value: Any, allowed: str) -> None:
    text = message(changed, key, value)
    assert f"{key}: expected" in text
    assert allowed in text


@pytest.mark.parametrize(
    ("key", "value"), [("data.size", 8), ("choose.race_below", 1), ("train.epochs", 1), ("cluster.workers", 0), ("cluster.gpu", True)]
)
def test_the_bounds_themselves_are_allowed(changed: Any, key: str, value: Any) -> None:
    section, name = key.split(".")
    assert getattr(getattr(changed(key, value), section), name) == value


def test_a_whole_number_is_taken_where_a_fraction_is_expected(changed: Any) -> None:
    gain = changed("choose.gain", 2).choose.gain
    assert (gain, type(gain)) == (2.0, float)


def test_a_missing_file_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"found no such file.*tlpipeline init"):
        load(tmp_path / "params.yaml")


@pytest.mark.parametrize("content", [b"data: [", b"data: \xff\xfe\n", b"\tdata: 1\n", b"train: {seed: 2026-13-45}\n"])
def test_a_file_that_is_no_yaml_is_refused_with_the_way_back(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ParamsError, match=r"(?s)expected YAML in .*git show HEAD:params.yaml"):
        load(tmp_path / "params.yaml")


@pytest.mark.parametrize("content", ["", "- data\n", "7\n"])
def test_a_file_without_sections_is_refused_with_the_sections_it_should_have(tmp_path: Path, content: str) -> None:
    (tmp_path / "params.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ParamsError, match="expected sections such as data, backbone"):
        load(tmp_path / "params.yaml")


def test_params_cannot_be_changed_after_they_were_read() -> None:
    params = load(TEMPLATE / "params.yaml")
    with pytest.raises(AttributeError):
        params.train.seed = 1  # type: ignore[misc]


def test_a_new_file_shows_at_most_twenty_settings_each_with_a_comment_in_words() -> None:
    lines = [line for line in (TEMPLATE / "params.yaml").read_text(encoding="utf-8").splitlines() if line.startswith("  ")]
    assert 15 <= len(lines) <= 20
    for line in lines:
        assert len(line.partition(" # ")[2].split()) >= 3, line


def test_every_setting_is_explained_and_says_what_it_allows() -> None:
    for section, cls in sections().items():
        for name, setting in settings(cls).items():
            assert len(setting.text.split()) >= 3, f"{section}.{name}"
            assert setting.allowed, f"{section}.{name}"


@pytest.mark.parametrize(
    ("path", "text"), [(writer.TEMPLATE, writer.template), (writer.REFERENCE, writer.reference)], ids=["template", "reference"]
)
def test_what_is_written_from_the_settings_is_as_they_are_now(path: Path, text: Callable[[], str]) -> None:
    assert path.read_text(encoding="utf-8") == text(), f"it is stale: run `{writer.COMMAND}`"


def test_the_root_is_a_workspace_made_of_the_template(tmp_path: Path) -> None:
    shutil.copy(TEMPLATE / "params.yaml", tmp_path)
    writer.change(tmp_path / "params.yaml", {"train.flip": False})  # digits must not be mirrored
    assert (REPOSITORY / "params.yaml").read_text(encoding="utf-8") == (tmp_path / "params.yaml").read_text(encoding="utf-8")


# --- changing a file ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["no", "on # off", "1.5", "plain", "größer", "a: b", "[x", "0x1F", "null", ""])
def test_text_is_read_as_it_was_written(tmp_path: Path, value: str) -> None:
    shutil.copy(TEMPLATE / "params.yaml", tmp_path)
    writer.change(tmp_path / "params.yaml", {"backbone.weights": value})
    assert YAML(typ="safe").load(tmp_path / "params.yaml")["backbone"]["weights"] == value


@pytest.mark.parametrize("style", ["as it is", "four spaces", "flow", "flow in lines", "quoted"])
def test_a_change_keeps_the_other_values_and_all_comments_however_the_file_is_laid_out(tmp_path: Path, style: str) -> None:
    path = tmp_path / "params.yaml"
    text = (TEMPLATE / "params.yaml").read_text(encoding="utf-8")
    whole = yaml.safe_load(text)
    flow = json.dumps(whole["choose"])
    text = {
        "as it is": text,
        "four spaces": text.replace("\n  ", "\n    "),
        "flow": re.sub(r"(?s)\nchoose:\n.*?\n\n", f"\nchoose: {flow}  # all of it\n\n", text),
        "flow in lines": re.sub(r"(?s)\nchoose:\n.*?\n\n", "\nchoose: " + flow.replace(", ", ",\n  ") + "\n\n", text),
        "quoted": text.replace("\n  slice: auto ", '\n  "slice":   "auto" '),
    }[style]
    path.write_text(text, encoding="utf-8")
    writer.change(path, {"choose.slice": "layer1, layer2", "profile.images": 64})
    whole["choose"]["slice"], whole["profile"] = "layer1, layer2", {"images": 64}
    assert yaml.safe_load(path.read_text(encoding="utf-8")) == whole
    assert re.findall("# .*", path.read_text(encoding="utf-8")) == re.findall("# .*", text)


def test_a_change_leaves_the_other_lines_of_a_new_file_as_they_are(tmp_path: Path) -> None:
    shutil.copy(TEMPLATE / "params.yaml", tmp_path)
    before = (tmp_path / "params.yaml").read_text(encoding="utf-8").splitlines()
    writer.change(tmp_path / "params.yaml", {"train.seed": 7})
    after = (tmp_path / "params.yaml").read_text(encoding="utf-8").splitlines()
    assert [(old.split()[:2], new.split()[:2]) for old, new in zip(before, after, strict=True) if old != new] == [
        (["seed:", "0"], ["seed:", "7"])
    ]


# --- the pipeline, and files of earlier versions --------------------------------------------------------------------------------------


def test_where_training_runs_is_no_parameter_of_the_pipeline() -> None:
    assert "cluster" not in (TEMPLATE / "dvc.yaml").read_text(encoding="utf-8")


def test_a_setting_with_another_name_is_taken_under_its_old_one(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("train: {precision: float32, override: {optimiser: sgd}}\n", encoding="utf-8")
    params = load(path)
    assert (params.backbone.precision, params.train.override) == ("float32", {"optimizer": "sgd"})
    assert remarks(path) == [
        "params.yaml: train.precision is now backbone.precision; its value is used",
        "params.yaml: train.override.optimiser is now train.override.optimizer; its value is used",
    ]


def test_the_new_name_wins_over_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("backbone: {precision: auto}\ntrain: {precision: float32}\n", encoding="utf-8")
    assert load(path).backbone.precision == "auto"


@pytest.mark.parametrize("name", RETIRED)
def test_a_setting_without_effect_is_ignored_with_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / "params.yaml"
    content: Any = 3
    for part in reversed(name.split(".")):
        content = {part: content}
    path.write_text(json.dumps(content), encoding="utf-8")
    assert load(path) == Params()
    assert remarks(path) == [f"params.yaml: without effect in this version: {name}: {RETIRED[name]}"]


def test_several_settings_without_effect_take_one_line(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("choose: {rule: measured, race_above: 0.1}\n", encoding="utf-8")
    (line,) = remarks(path)
    assert line.startswith("params.yaml: without effect in this version: choose.rule, choose.race_above. Remove them, or see")


def test_every_retired_setting_is_gone_and_every_renamed_one_is_there() -> None:
    known = {f"{section}.{name}" for section, cls in sections().items() for name in settings(cls)}
    assert not known & {*RETIRED, *RENAMED}
    assert {new for new in RENAMED.values() if "override" not in new} <= known


def test_reading_settings_loads_no_torch() -> None:
    code = "import sys, tlpipeline.params; print(sorted({'torch', 'numpy', 'prefect', 'ray', 'dvc'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_number_with_a_leading_zero_is_decimal_as_yaml_1_2_says(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("train:\n  seed: 010\n")
    assert load(tmp_path / "params.yaml").train.seed == 10


def test_aliases_of_aliases_are_refused_before_they_take_memory(tmp_path: Path) -> None:
    lines = ["a: &a [0, 0, 0, 0, 0, 0, 0, 0, 0]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghij")]
    (tmp_path / "params.yaml").write_text("\n".join(lines))
    tracemalloc.start()
    try:
        with pytest.raises(ParamsError, match=r"line 2: expected a value, found \*a, an alias of a section or list"):
            load(tmp_path / "params.yaml")
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [touch MARK]", "!!python/name:os.system", "!!python/module:os", "!own {a: 1}"]
)
def test_nothing_but_plain_data_is_made_of_a_settings_file(tag: str, tmp_path: Path) -> None:
    """Neither when it is read, nor when one value of it is changed and the rest is written back."""
    path, mark = tmp_path / "params.yaml", tmp_path / "mark"
    path.write_text(f"data:\n  name: digits\nextra: {tag.replace('MARK', str(mark))}\n")
    writer.change(path, {"data.name": "flowers"})
    assert tag.split()[0] in path.read_text()
    with pytest.raises(ParamsError):
        load(path)
    assert not mark.exists()
