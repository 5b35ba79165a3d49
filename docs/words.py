"""Print the words a sentence (median, 90 % point, most) of README and each page: python docs/words.py [--long] prints the long ones, too."""

import re
import sys
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
MOST = 25  # words of a sentence
EXEMPT = ("log.md", "architectures.md")  # a diary, and a generated table


def pages() -> list[Path]:
    """Return README and the pages under docs/ that are written for readers."""
    return [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if p.name not in EXEMPT)]


def sentences(text: str) -> list[str]:
    """Return the sentences of a page; code, tables and headings are no sentences."""
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
    parts = [part.strip() for p in paragraphs for part in re.split(r"(?<=[.!?])[)*_\"']*\s+(?=[A-Z`\"'*_(])", p)]
    return [part for part in parts if count_words(part)]


def count_words(sentence: str) -> int:
    """Return how many words a sentence has."""
    return sum(bool(re.search(r"\w", word)) for word in sentence.split())


def percentile_90(lengths: list[int]) -> int:
    """Return how long nine sentences of ten are at most."""
    return sorted(lengths)[int(0.9 * (len(lengths) - 1))]


if __name__ == "__main__":
    print(f"{'page':60} {'sentences':>9} {'median':>6} {'p90':>4} {'most':>4}")
    for page in pages():
        written = sentences(page.read_text(encoding="utf-8"))
        if lengths := list(map(count_words, written)):
            name = page.relative_to(ROOT)
            print(f"{name!s:60} {len(lengths):9} {median(lengths):6.0f} {percentile_90(lengths):4} {max(lengths):4}")
        if "--long" in sys.argv:
            print(*(f"    {count_words(s)}: {s}" for s in written if count_words(s) > MOST), sep="\n", end="\n")
