"""The documentation is held to the code: its links resolve, its sentences are short, its commands exist and run."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from docs.words import MOST, count_words, pages, sentences
from tests.helpers.images import paint
from tlpipeline.cli import app

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GENERATED = {"index.md", "commands.md", "changelog.md", "contributing.md"}  # docs/hooks.py adds them to the site
PAGES = pages()


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_no_sentence_has_more_than_25_words(page: Path) -> None:
    assert [sentence for sentence in sentences(page.read_text(encoding="utf-8")) if count_words(sentence) > MOST] == []


@pytest.mark.parametrize("page", [*PAGES, DOCS / "log.md"], ids=names([*PAGES, DOCS / "log.md"]))
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists() or (path.parent == DOCS and path.name in GENERATED), target
        if anchor and path.exists():
            assert anchor in anchors(path), target


@pytest.mark.parametrize("name", ["cases", "cost"])
def test_a_drawing_is_what_its_script_draws_now(name: str) -> None:
    spec = importlib.util.spec_from_file_location(f"drawing_of_{name}", DOCS / "images" / f"{name}.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (DOCS / "images" / f"{name}.svg").read_text(encoding="utf-8") == script.drawing(), f"run: python docs/images/{name}.py"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    code = "\n".join(p.read_text(encoding="utf-8") for folder in ("tlpipeline", "flows", "tasks") for p in (ROOT / folder).rglob("*.py"))
    quoted = re.findall(r"^`(.+?)` ·", (DOCS / "troubleshooting.md").read_text(encoding="utf-8"), re.M)
    assert [words for words in quoted if words not in code] == []
    assert len(quoted) > 30


# --- commands ---------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        note: of the comment before it: why it is not run, or the file that it is.
    """

    page: str
    language: str
    code: str
    note: str

    @property
    def left_out(self) -> str:
        """Why the tests do not run it; empty if they do."""
        return self.note.removeprefix("not run: ") if self.note.startswith("not run: ") else ""

    @property
    def script(self) -> str:
        """The block as shell."""
        if self.language == "bash":
            return self.code
        file = self.note.removeprefix("file: ") if self.note.startswith("file: ") else ""
        return (
            f"cat > {file} <<'END_OF_BLOCK'\n{self.code}END_OF_BLOCK\n" if file else f"python - <<'END_OF_BLOCK'\n{self.code}END_OF_BLOCK\n"
        )


def blocks(page: Path) -> list[Block]:
    """Return the shell and Python blocks of a page."""
    pattern = re.compile(r"(?:<!-- (?P<note>[^>]*?) -->\n)?^```(?P<language>bash|python)\n(?P<code>.*?)^```$", re.M | re.S)
    name = str(page.relative_to(ROOT))
    return [Block(name, m["language"], m["code"], m["note"] or "") for m in pattern.finditer(page.read_text(encoding="utf-8"))]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def verbs(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Give each verb of the command line with its path."""
    for name, child in getattr(command, "commands", {}).items():
        if getattr(child, "commands", None):
            yield from verbs(child, (*path, name))
        elif not child.hidden:
            yield (*path, name), child


VERBS = dict(verbs(get_command(app)))


def test_every_verb_is_used_on_a_page() -> None:
    used = {path for _, path, _ in called()}
    assert set(VERBS) - used == set()


def called() -> Iterator[tuple[str, tuple[str, ...], list[str]]]:
    """Give each call of tlpipeline in the documentation: its line, its verb, the rest."""
    for block in BLOCKS:
        for line in block.code.splitlines() if block.language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["tlpipeline"] and words[1:2] != ["--version"]:
                length = next((n for n in (2, 1) if tuple(words[1 : n + 1]) in VERBS), 0)
                assert length, f"{block.page}: no such verb: {line}"
                yield line, tuple(words[1 : length + 1]), words[length + 1 :]


def test_every_call_has_options_and_arguments_that_the_command_line_takes() -> None:
    for line, path, words in called():
        options = {name: p for p in VERBS[path].params if p.param_type_name == "option" for name in (*p.opts, *p.secondary_opts)}
        arguments = [p for p in VERBS[path].params if p.param_type_name == "argument"]
        given = 0
        rest = iter(words)
        for word in rest:
            if word.startswith("-"):
                assert word.partition("=")[0] in options, line
                if not options[word.partition("=")[0]].is_flag and "=" not in word:
                    next(rest)
            else:
                given += 1
        assert given >= sum(p.required for p in arguments), line
        assert given <= len(arguments) or any(p.nargs == -1 for p in arguments), line


def test_few_blocks_are_left_out_and_each_says_why() -> None:
    reasons = [block.left_out for block in BLOCKS if block.left_out]
    assert all(len(reason.split()) >= 3 for reason in reasons), reasons
    assert len(reasons) <= 6, reasons


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's home with pictures, new ones, and some without labels."""
    home = tmp_path_factory.mktemp("home")
    for folder, start, each in (("pictures", 0, 100), ("new", 200, 4)):
        for label, name in enumerate(("apple", "pear")):
            (home / folder / name).mkdir(parents=True)
            for index in range(start, start + each):
                paint(label, index, 32).save(home / folder / name / f"{index:04d}.jpg", quality=95)
    (home / "unlabeled").mkdir()
    for index in range(8):
        paint(index % 2, 300 + index, 32).save(home / "unlabeled" / f"{index}.jpg", quality=95)
    return home


# An undecided verdict is no mistake of the page.
_UNDECIDED = 'tlpipeline() { local code=0; command tlpipeline "$@" || code=$?; [ $code -eq 3 ] || return $code; }\n'


@pytest.fixture(scope="module")
def catalogue(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace that has run once, which some pages start from."""
    folder = tmp_path_factory.mktemp("ready")
    run("tlpipeline init catalogue --images ~/pictures\ntlpipeline run --workspace catalogue\n", folder, home)
    return folder / "catalogue"


def run(script: str, folder: Path, home: Path) -> None:
    """Run the shell blocks of a page in a folder, as a user with this home does."""
    people = {
        f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in (("NAME", "user"), ("EMAIL", "user@example.org"))
    }
    environment = {**os.environ, **people, "HOME": str(home), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "600"  # beside other tests a server starts slowly
    environment.pop("PREFECT_API_URL", None)
    done = subprocess.run(
        ["bash", "-exo", "pipefail", "-c", _UNDECIDED + script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


RUN = [page for page in PAGES if any(not block.left_out for block in blocks(page)) and page.parent != DOCS / "decisions"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", RUN, ids=names(RUN))
def test_the_commands_of_a_page_run_one_after_the_other(page: Path, home: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "<!-- setup: catalogue -->" in page.read_text(encoding="utf-8"):
        shutil.copytree(request.getfixturevalue("catalogue"), tmp_path / "catalogue", symlinks=True)
    run("\n".join(block.script for block in blocks(page) if not block.left_out), tmp_path, home)
