"""params.yaml: every key is there, explained and checked; a wrong one is refused with its path and a way out."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.workspaces import REPOSITORY
from tlpipeline.errors import ParamsError
from tlpipeline.params import Params, load

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


def test_an_unknown_key_is_refused_with_its_path_and_the_nearest_known_one(changed: Any) -> None:
    text = message(changed, "train.epoch", 5)
    assert "train.epoch:" in text
    assert "did you mean epochs" in text


def test_an_unknown_section_is_refused_with_the_nearest_known_one(changed: Any) -> None:
    text = message(changed, "trains", {})
    assert "params.yaml: trains:" in text
    assert "did you mean train?" in text


def test_a_key_that_resembles_none_is_refused_with_a_list_of_the_known_ones(changed: Any) -> None:
    text = message(changed, "data.zzz", 1)
    assert "data.zzz" in text
    assert "name, images, size" in text


def test_every_missing_key_is_refused_with_its_path(changed: Any) -> None:
    content = yaml.safe_load((TEMPLATE / "params.yaml").read_text(encoding="utf-8"))
    for section, keys in content.items():
        for key in keys:
            text = message(changed, f"{section}.{key}", GONE)
            assert f"{section}.{key}: expected this key, found none" in text
            assert "tlpipeline init" in text


def test_a_missing_section_is_refused_with_its_name(changed: Any) -> None:
    assert "params.yaml: gate: expected this key, found none" in message(changed, "gate", GONE)


def test_a_section_that_holds_no_keys_is_refused_with_the_keys_it_should_hold(changed: Any) -> None:
    text = message(changed, "evaluate", None)
    assert "evaluate: expected a section with the keys confidence, found None" in text


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("data.size", 32.5, "int or str"),
        ("data.images", 7, "str"),
        ("backbone.weights_md5", 0, "str"),
        ("profile.images", "many", "int"),
        ("profile.seed", None, "int"),
        ("choose.gain", "1", "float"),
        ("choose.draws", 1e3, "int"),
        ("train.flip", "false", "bool"),
        ("train.flip", 1, "bool"),
        ("train.override", [], "dict"),
        ("gate.rule", False, "str"),
        ("cluster.workers", [2], "int"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_with_its_path_and_both_types(changed: Any, key: str, value: Any, expected: str) -> None:
    assert f"{key}: expected {expected}, found {value!r} ({type(value).__name__})" in message(changed, key, value)


@pytest.mark.parametrize("key", ["train.epochs", "train.batch_size", "profile.images", "choose.gain", "cluster.workers"])
@pytest.mark.parametrize("word", ["yes", "no"])
def test_yes_and_no_are_no_numbers(tmp_path: Path, key: str, word: str) -> None:
    section, name = key.split(".")
    lines = (TEMPLATE / "params.yaml").read_text(encoding="utf-8").splitlines()
    start = lines.index(next(line for line in lines if line.startswith(f"{section}:")))
    at = next(i for i in range(start, len(lines)) if lines[i].startswith(f"  {name}:"))
    lines[at] = f"  {name}: {word}"
    (tmp_path / "params.yaml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ParamsError, match=rf"{section}\.{name}: expected .*, found (True|False) \(bool\)"):
        load(tmp_path / "params.yaml")


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("data.name", "Digits", "lower-case letters"),
        ("data.name", "7up", "a letter first"),
        ("data.name", "été", "lower-case letters"),
        ("data.name", "digits-", "no dash last"),
        ("data.name", "", "lower-case letters"),
        ("data.images", "", "not empty"),
        ("data.size", 4, "auto or at least 8"),
        ("data.size", "large", "auto or at least 8"),
        ("backbone.weights_md5", "1234", "none or 32 hexadecimal digits"),
        ("profile.images", 15, "at least 16"),
        ("profile.seed", -1, "0 to 9223372036854775807"),
        ("train.seed", 2**70, "0 to 9223372036854775807"),
        ("choose.race_above", 1.01, "0 to 1"),
        ("choose.alpha", 0.0, "0.001 to 0.5"),
        ("choose.gain", float("nan"), "0 to 100"),
        ("choose.draws", 99, "100 to 100000"),
        ("choose.draws", 10**10, "100 to 100000"),
        ("train.override", {1: "x"}, "names of recipe values"),
        ("train.epochs", 0, "auto or at least 1"),
        ("train.batch_size", 1, "at least 2"),
        ("evaluate.confidence", 95, "0.5 to 0.999"),
        ("gate.rule", "best", "better or not_worse"),
        ("gate.test", "t", "mcnemar or bootstrap"),
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
    ("key", "value"), [("data.size", 8), ("choose.race_above", 1), ("train.epochs", 1), ("cluster.workers", 0), ("cluster.gpu", True)]
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


@pytest.mark.parametrize("content", [b"data: [", b"data: \xff\xfe\n", b"\tdata: 1\n"])
def test_a_file_that_is_no_yaml_is_refused_with_the_way_back(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "params.yaml").write_bytes(content)
    with pytest.raises(ParamsError, match=r"(?s)expected YAML in .*git show HEAD:params.yaml"):
        load(tmp_path / "params.yaml")


@pytest.mark.parametrize("content", ["", "- data\n", "7\n"])
def test_a_file_without_sections_is_refused_with_the_sections_it_should_have(tmp_path: Path, content: str) -> None:
    (tmp_path / "params.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ParamsError, match="expected a section with the keys data, backbone"):
        load(tmp_path / "params.yaml")


def test_params_cannot_be_changed_after_they_were_read() -> None:
    params = load(TEMPLATE / "params.yaml")
    with pytest.raises(AttributeError):
        params.train.seed = 1  # type: ignore[misc]


def test_every_key_of_the_template_is_explained_by_a_comment() -> None:
    keys = [line for line in (TEMPLATE / "params.yaml").read_text(encoding="utf-8").splitlines() if line.startswith("  ")]
    assert len(keys) > 20
    for line in keys:
        assert len(line.partition(" # ")[2].split()) >= 3, line


@pytest.mark.parametrize("name", ["dvc.yaml", "prefect.yaml", "params.yaml"])
def test_the_root_is_a_workspace_made_of_the_template(name: str) -> None:
    root, template = (REPOSITORY / name).read_text(encoding="utf-8"), (TEMPLATE / name).read_text(encoding="utf-8")
    if name == "params.yaml":  # the root's own values, under the same keys
        assert {s: set(keys) for s, keys in yaml.safe_load(root).items()} == {s: set(keys) for s, keys in yaml.safe_load(template).items()}
    else:
        assert root == template


def test_the_pipeline_names_only_parameters_that_exist() -> None:
    params = yaml.safe_load((TEMPLATE / "params.yaml").read_text(encoding="utf-8"))
    for name, stage in yaml.safe_load((TEMPLATE / "dvc.yaml").read_text(encoding="utf-8"))["stages"].items():
        for key in stage["params"]:
            section, _, value = key.partition(".")
            assert section in params, (name, key)
            assert not value or value in params[section], (name, key)


def test_where_training_runs_is_no_parameter_of_the_pipeline() -> None:
    assert "cluster" not in (TEMPLATE / "dvc.yaml").read_text(encoding="utf-8")
