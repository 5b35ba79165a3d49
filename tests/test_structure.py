"""Prose and tables are held to the code."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tlpipeline.choice.cases import CASES
from tlpipeline.params import sections
from tlpipeline.workspace.stages import STAGES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SOURCES = sorted(path for folder in ("tlpipeline", "flows", "tasks") for path in (ROOT / folder).rglob("*.py"))
PIPELINE = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))


def test_the_case_table_of_the_readme_has_the_rows_of_cases() -> None:
    table = re.findall(r"^\| `(\w+)` \| (\w+), (\w+) \| ([^|]+) \| ([^|]+) \|", README, re.M)
    assert [(name, size, likeness) for name, size, likeness, _, _ in table] == [(c.name, c.size, c.likeness) for c in CASES]
    assert [("later layers" in cut, "everything" in frozen) for *_, cut, frozen in table] == [
        (c.keep == "slice", c.freeze == "kept") for c in CASES
    ]


def test_dvc_yaml_has_the_stages_and_calls_them() -> None:
    assert list(PIPELINE["stages"]) == list(STAGES)
    assert [s["cmd"] for s in PIPELINE["stages"].values()] == [f"python -m tlpipeline stage {name}" for name in STAGES]


def test_no_stage_is_without_outputs_and_none_depends_on_the_cluster() -> None:
    for stage in PIPELINE["stages"].values():
        assert stage["outs"]
        assert not any(p.startswith("cluster") for p in stage["params"])


def test_the_stages_name_whole_sections_so_that_a_missing_setting_is_no_error_for_dvc() -> None:
    named = {name for stage in PIPELINE["stages"].values() for name in stage["params"]}
    assert named == {
        "data.images",
        "data",
        "backbone",
        "profile",
        "check",
        "choose",
        "train",
        "evaluate",
    }  # DVC itself reads ${data.images}
    assert named - {"data.images"} == set(sections()) - {"gate", "cache", "cluster"}


@pytest.mark.parametrize("name", ["dvc.yaml", "prefect.yaml"])
def test_the_root_is_a_workspace_like_any_other(name: str) -> None:
    assert (ROOT / name).read_text() == (ROOT / "tlpipeline" / "workspace" / "template" / name).read_text()


def test_every_public_name_is_typed_and_documented() -> None:
    missing = []
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), path
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path.name}: {node.name}")
    assert not missing


def test_the_exported_names_are_exactly_those_that_can_be_imported() -> None:
    import tlpipeline

    assert tlpipeline.__all__ == ["CASES", "PipelineError", "Workspace", "__version__", "list_backbones", "load_model"]
    for name in tlpipeline.__all__:
        assert getattr(tlpipeline, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = tlpipeline.nothing_like_it


def test_nothing_asks_which_case_it_is() -> None:
    names = "|".join(c.name for c in CASES)
    for path in SOURCES:
        assert not re.search(rf"==\s*[\"']({names})[\"']", path.read_text(encoding="utf-8")), path


def test_nothing_is_loaded_that_could_execute() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                source = ast.unparse(node)
                assert not source.startswith(("pickle.", "joblib.", "dill.")), source
                if source.startswith("torch.load("):
                    assert "weights_only=True" in source


def test_no_address_of_a_registry_is_committed() -> None:
    for name in ("constraints.txt", "pyproject.toml", "Makefile"):
        assert not re.search(r"https?://|--index-url|--find-links", (ROOT / name).read_text()), name


def test_importing_the_package_loads_nothing_heavy_and_sets_no_environment_variable() -> None:
    code = (
        "import os; before = dict(os.environ); import sys, tlpipeline, tlpipeline.api; tlpipeline.PipelineError, tlpipeline.CASES; "
        "print(sorted({'torch', 'numpy', 'PIL', 'prefect', 'ray', 'dvc', 'rich'} & set(sys.modules)), before == dict(os.environ))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[] True"
