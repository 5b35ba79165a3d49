"""Draw accuracy lost against cost: `python docs/images/cost.py` writes cost.svg from the first table of docs/benchmarks.md."""

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROW = re.compile(r"^\| (?P<rule>[^|]+) \| (?P<low>-?[\d.]+) to (?P<high>-?[\d.]+) \| [^|]+ \| [^|]+ \| (?P<cost>\d+) % \|$", re.M)
LEFT, RIGHT, TOP, BOTTOM, WIDTH, HEIGHT = 74, 730, 76, 346, 792, 402
MOST = 2.2  # points on the vertical axis
OURS = "tlpipeline"
ON_THE_LEFT = ("always fine-tuning as usual", OURS)  # whose name would cross the border, or another name

STYLE = """
  svg { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
  .page { fill: #ffffff; } text { fill: #1f2933; } .quiet { fill: #52606d; } .grid { stroke: #e1e5ea; }
  .bar { stroke: #3b6ea5; } .ours { stroke: #b35c00; } .mine { fill: #b35c00; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #161b22; } text { fill: #e6edf3; } .quiet { fill: #a9b4c0; } .grid { stroke: #2d3643; }
    .bar { stroke: #6ea3d8; } .ours { stroke: #e08e3e; } .mine { fill: #e08e3e; }
  }
"""


def drawing() -> str:
    """Return the chart as SVG: one bar for each rule, from the lower to the upper bound of its mean regret."""
    table = (HERE.parent / "benchmarks.md").read_text(encoding="utf-8").split("### All rules")[0]
    parts = [f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="12"/>']
    parts.append(
        '<text x="24" y="30" font-size="15" font-weight="600">Accuracy lost against the best case, and what choosing and training cost</text>'
    )
    for points in (0, 0.5, 1, 1.5, 2):
        parts.append(f'<path class="grid" d="M{LEFT} {y(points):.0f} H{RIGHT}"/>')
        parts.append(f'<text class="quiet" x="{LEFT - 10}" y="{y(points) + 4:.0f}" font-size="13" text-anchor="end">{points:g}</text>')
    for share in (0, 25, 50, 75, 100):
        parts.append(f'<text class="quiet" x="{x(share):.0f}" y="{BOTTOM + 22}" font-size="13" text-anchor="middle">{share} %</text>')
    parts.append(
        f'<text class="quiet" x="{RIGHT}" y="{HEIGHT - 12}" font-size="13" text-anchor="end">cost, as a share of always fine-tuning as usual</text>'
    )
    parts.append('<text class="quiet" x="24" y="54" font-size="13">points lost, lower to upper bound of the mean</text>')
    for row in ROW.finditer(table):
        rule = re.sub(r"( \(|,).*", "", row["rule"])
        ours = rule == OURS
        center, low, high = x(int(row["cost"])), y(float(row["low"])), y(float(row["high"]))
        side, anchor = (-10, "end") if rule in ON_THE_LEFT else (10, "start")
        parts.append(
            f'<path class="{"ours" if ours else "bar"}" stroke-width="6" stroke-linecap="round" d="M{center:.0f} {low:.0f} V{high:.0f}"/>'
        )
        parts.append(
            f'<text class="{"mine" if ours else ""}" x="{center + side:.0f}" y="{(low + high) / 2 + 4:.0f}" font-size="13.5" '
            f'font-weight="{700 if ours else 400}" text-anchor="{anchor}">{rule}</text>'
        )
    body = "\n".join(f"  {part}" for part in parts)
    title = "Accuracy lost against the best case, over cost: tlpipeline and five simple rules"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="title">\n'
        f'  <title id="title">{title}</title>\n  <style>{STYLE}  </style>\n{body}\n</svg>\n'
    )


def x(percent: float) -> float:
    """Return where a cost lies."""
    return LEFT + 12 + percent / 104 * (RIGHT - LEFT - 12)


def y(points: float) -> float:
    """Return where a loss lies; 0 is above the bottom, because a loss can be below it."""
    return BOTTOM - 16 - points / MOST * (BOTTOM - 16 - TOP)


if __name__ == "__main__":
    (HERE / "cost.svg").write_text(drawing(), encoding="utf-8")
