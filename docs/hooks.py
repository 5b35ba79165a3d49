"""Pages of the site that stand elsewhere or are made from the code: home, changelog, contributing, the command line."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
COPIED = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}
MOVED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "README.md": "index.md"}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that no file in docs/ holds."""
    pages = {name: copied((ROOT / source).read_text(encoding="utf-8")) for name, source in COPIED.items()}
    for name, text in {**pages, "commands.md": commands()}.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links from a page to a file beside docs/ to the page that the site has of it."""
    return re.sub(r"\]\((?:\.\./)+(CHANGELOG|CONTRIBUTING|README)\.md", lambda m: f"]({MOVED[m[1] + '.md']}", markdown)


def copied(text: str) -> str:
    """Return a page of the repository's root with links that hold within docs/; files that the site lacks lose their link."""
    text = re.sub(r"\]\(docs/", "](", text)
    text = re.sub(r"\]\((CHANGELOG|CONTRIBUTING)\.md", lambda m: f"]({MOVED[m[1] + '.md']}", text)
    return re.sub(r"\[([^\]]+)\]\((LICENSE|benchmarks/[^)]*|research/[^)]*)\)", r"\1", text)


def commands() -> str:
    """Return the reference of the command line, from its own help: each verb, its arguments, its options."""
    from typer.main import get_command

    from tlpipeline.cli import app

    parts = [
        "# Command line",
        "",
        "Every verb with its arguments and options, as `--help` says them. Every setting is a key of `params.yaml`.",
        "",
    ]
    for path, command in verbs(get_command(app), ("tlpipeline",)):
        parts += [f"## {' '.join(path[1:])}", "", usage(path, command), "", command.help or "", ""]
        rows = [f"| `{spelled(p)}` | {(getattr(p, 'help', None) or '').replace('<', '&lt;')} | {default(p)} |" for p in parameters(command)]
        if rows:
            parts += ["| argument or option | what it is | default |", "|---|---|---|", *rows, ""]
    return "\n".join(parts)


def parameters(command: Any) -> list[Any]:
    """Return a command's arguments and options that are not hidden, without --help."""
    return [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]


def usage(path: tuple[str, ...], command: Any) -> str:
    """Return the line that calls a command."""
    words = [
        p.name.upper() + ("..." if p.nargs == -1 or getattr(p, "multiple", False) else "")
        for p in command.params
        if p.param_type_name == "argument"
    ]
    if hasattr(command, "commands"):
        words.append("COMMAND")
    options = ["[OPTIONS]"] if any(p.param_type_name == "option" for p in parameters(command)) else []
    return f"```text\n{' '.join([*path, *options, *words])}\n```"


def spelled(parameter: Any) -> str:
    """Return how an argument or option is written."""
    if parameter.param_type_name == "argument":
        return str(parameter.name.upper())
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def default(parameter: Any) -> str:
    """Return what holds where an argument or option is left out."""
    if parameter.required:
        return "required"
    value = parameter.default
    return "" if value is None or value is False or callable(value) else f"`{value}`"


def verbs(command: Any, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], Any]]:
    """Return all verbs below a command that are not hidden, each with its path."""
    rows = [] if len(path) == 1 else [(path, command)]
    for name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            rows += verbs(child, (*path, name))
    return rows
