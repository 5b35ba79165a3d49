"""The settings file of a workspace: written, changed with its comments kept, and documented.

`python -m tlpipeline.workspace.settings` in a checkout writes the template of params.yaml and docs/params.md from `tlpipeline/params.py`.
"""

import inspect
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from tlpipeline.files import write_bytes
from tlpipeline.params import NONE, RENAMED, RETIRED, sections, settings

TEMPLATE = Path(__file__).with_name("template") / "params.yaml"
REFERENCE = Path(__file__).parents[2] / "docs" / "params.md"
COMMAND = "python -m tlpipeline.workspace.settings"
_TABLE = "${data.labels}"
_COMMENT_COLUMN = 24
_HEAD = """\
# The settings of this workspace. A setting that is not here has its default; docs/params.md of tlpipeline lists all of them.
# The stages in dvc.yaml name the sections, so a section stays here even if it is empty: `profile: {}`.
"""


def change(path: Path, values: Mapping[str, Any]) -> None:
    """Change values of a params.yaml, each given by its path such as train.seed; comments and order are kept."""
    yaml = _round_trip()
    content = yaml.load(path.read_text(encoding="utf-8"))
    for name, value in values.items():
        section, _, key = name.partition(".")
        if not content.get(section):
            content[section] = CommentedMap()
        if key in content[section] or not content[section]:
            content[section][key] = value
        else:
            content[section].insert(len(content[section]) - 1, key, value)  # before the last one, which the empty line belongs to
    text = io.StringIO()
    yaml.dump(content, text)
    write_bytes(text.getvalue().encode(), path)


def add_missing_sections(path: Path, pipeline: Path, stage: str) -> None:
    """Add to a params.yaml each section that the stage names in dvc.yaml and the file does not hold: DVC wants it there.

    Args:
        path: the params.yaml; one that does not exist, or cannot be parsed, stays as it is: whoever reads it next says so.
        pipeline: the dvc.yaml; the same.
        stage: name of the stage.
    """
    if not path.is_file() or not pipeline.is_file():
        return
    yaml = YAML(typ="safe")
    try:
        content, stages = yaml.load(path), (yaml.load(pipeline) or {}).get("stages") or {}
    except YAMLError:
        return
    named = [name for name in (stages.get(stage) or {}).get("params") or [] if isinstance(name, str)]
    missing = [name for name in named if isinstance(content, dict) and name in sections() and name not in content]
    if missing:
        text = path.read_text(encoding="utf-8").rstrip("\n")
        write_bytes((text + "\n\n" + "".join(f"{name}: {{}}\n" for name in missing)).encode(), path)


def add_inputs(path: Path, pipeline: Path) -> bool:
    """Have the stage ingest depend on what the settings name: the section data, and a table of labels. Return whether dvc.yaml changed.

    The dvc.yaml of an older workspace names `data.images` alone, and stays as it is until one of the settings is used.

    Args:
        path: the params.yaml; pipeline: the dvc.yaml. One that does not exist or cannot be parsed stays as it is.
    """
    if not path.is_file() or not pipeline.is_file():
        return False
    try:
        content = YAML(typ="safe").load(path)
        yaml = _round_trip()
        whole = yaml.load(pipeline.read_text(encoding="utf-8"))
    except YAMLError:
        return False
    data = (content.get("data") or {}) if isinstance(content, dict) else {}
    stage = ((whole or {}).get("stages") or {}).get("ingest")
    if not isinstance(data, dict) or not stage:
        return False
    names, inputs = stage.get("params") or [], stage.get("deps") or []
    changed = False
    if "data" not in names and any(name in data for name in ("labels", "group", "class_folder", "rename", "drop")):
        stage["params"] = ["data", *(name for name in names if not str(name).startswith("data."))]
        changed = True
    if (data.get("labels", NONE) != NONE) != (_TABLE in inputs):
        stage["deps"] = [*inputs, _TABLE] if _TABLE not in inputs else [name for name in inputs if name != _TABLE]
        changed = True
    if changed:
        text = io.StringIO()
        yaml.dump(whole, text)
        write_bytes(text.getvalue().encode(), pipeline)
    return changed


def template() -> str:
    """Return the params.yaml of a new workspace: the settings that most users change, each with its default and a comment."""
    parts = [_HEAD]
    named = _named_by_stages()
    for section, cls in sections().items():
        shown = {name: setting for name, setting in settings(cls).items() if setting.shown}
        lines = [f"  {name}: {_written(getattr(cls(), name))}".ljust(_COMMENT_COLUMN) + f"  # {s.text}" for name, s in shown.items()]
        if lines:
            parts.append("\n".join([f"{section}:", *lines]) + "\n")
        elif section in named:
            parts.append(f"{section}: {{}}".ljust(_COMMENT_COLUMN) + f"  # {_summary(cls)}; empty: the defaults\n")
    return "\n".join(parts)


def reference() -> str:
    """Return docs/params.md: every setting with its default, what it allows and what it does."""
    parts = [
        f"<!-- Written by `{COMMAND}` from tlpipeline/params.py. Change the text there. -->\n",
        "# Settings\n",
        "The settings of a workspace are in its `params.yaml`. A new file lists the settings that most users change.\n"
        "Every setting on this page can be added to its section. A setting that the file does not hold has its default.\n",
        "The file is YAML 1.2: write `true` and `false`, not `yes` and `no`. An unknown setting is refused with its path.\n"
        "Keep `data.name` and `data.images` in the file, and every section that `dvc.yaml` names, even if it is empty (`profile: {}`):\n"
        "DVC reads them itself. A stage runs again when a section that it names changes.\n",
    ]
    for section, cls in sections().items():
        stages = _named(section)
        parts.append(f"## {section}\n\n{inspect.getdoc(cls)}\n")
        parts.append(f"A change reruns: {', '.join(stages)}.\n" if stages else "A change reruns no stage.\n")
        rows = ["| setting | default | allowed | what it does |", "|---|---|---|---|"]
        for name, setting in settings(cls).items():
            rows.append(f"| `{section}.{name}` | `{_written(getattr(cls(), name))}` | {setting.allowed} | {setting.text} |")
        parts.append("\n".join(rows) + "\n")
    parts.append("## Settings of earlier versions\n\nAn old file may hold these. Each run names those that it finds.\n")
    old = [f"| `{name}` | now `{new}` |" for name, new in RENAMED.items()] + [f"| `{name}` | {text} |" for name, text in RETIRED.items()]
    parts.append("\n".join(["| setting | instead |", "|---|---|", *old]) + "\n")
    return "\n".join(parts)


def _named(section: str) -> list[str]:
    """Return the stages that name the section, or one setting of it, which is then given."""
    named = [(stage, name) for stage, content in _pipeline()["stages"].items() for name in content["params"]]
    return [stage if name == section else f"{stage} (`{name}`)" for stage, name in named if name.partition(".")[0] == section]


def _named_by_stages() -> set[str]:
    return {name for stage in _pipeline()["stages"].values() for name in stage["params"]}


def _pipeline() -> Any:
    return YAML(typ="safe").load(TEMPLATE.with_name("dvc.yaml"))


def _summary(cls: type) -> str:
    line = (inspect.getdoc(cls) or "").splitlines()[0].rstrip(".")
    return line[0].lower() + line[1:]


def _written(value: Any) -> str:
    """Return a value as YAML writes it."""
    if isinstance(value, tuple):
        return str(list(value))
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    value = list(value) if isinstance(value, tuple) else value
    text = io.StringIO()
    yaml = _round_trip()
    yaml.default_flow_style = True
    yaml.dump([value], text)
    return text.getvalue().strip().removeprefix("[").removesuffix("]")


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.preserve_quotes = True
    yaml.width = 4096
    return yaml


if __name__ == "__main__":
    TEMPLATE.write_text(template(), encoding="utf-8")
    REFERENCE.write_text(reference(), encoding="utf-8")
