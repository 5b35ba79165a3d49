"""The documentation is held to the code: its links resolve, its sentences are short, its commands exist and run."""

import importlib.util
import re
import sys
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
GENERATED = {"index.md", "commands.md", "changelog.md", "contributing.md"}  # docs/hooks.py adds them to the site
PAGES = [ROOT / "README.md", *sorted(p for p in DOCS.rglob("*.md") if p.name not in ("log.md", "architectures.md"))]
LONGEST = 25  # words that nine sentences of ten may have


def sentences(text: str) -> list[int]:
    """Return the number of words of each sentence of a page; code, tables and headings are no sentences."""
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    paragraphs = [""]
    for line in map(str.strip, text.splitlines()):
        item = re.match(r"(?:[-*+]|\d+\.)\s+(.*)", line)
        if not line or line.startswith(("#", "|", "<", "---")):
            paragraphs.append("")
        elif item:
            paragraphs.append(item[1])
        else:
            paragraphs[-1] += " " + line
    parts = [part for p in paragraphs for part in re.split(r"(?<=[.!?])[)*_\"']*\s+(?=[A-Z`\"'*_(])", p)]
    return [n for part in parts if (n := sum(bool(re.search(r"\w", word)) for word in part.split()))]


def names(paths: list[Path]) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in paths]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S), re.M)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h).strip().lower()) for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_nine_sentences_of_ten_have_at_most_25_words(page: Path) -> None:
    lengths = sorted(sentences(page.read_text(encoding="utf-8")))
    if lengths:
        assert lengths[int(0.9 * (len(lengths) - 1))] <= LONGEST, (median(lengths), lengths[-5:])


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


def test_the_drawing_of_the_cases_is_what_its_script_draws_of_the_table_of_cases() -> None:
    spec = importlib.util.spec_from_file_location("cases_drawing", DOCS / "images" / "cases.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "images" / "cases.svg").read_text(encoding="utf-8") == module.drawing(), f"{sys.executable} docs/images/cases.py"


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 110
