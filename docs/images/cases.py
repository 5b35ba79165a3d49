"""Draw the four cases on the demonstration network: `python docs/images/cases.py` writes cases.svg beside this file.

The picture is held to the table in tlpipeline/choice/cases.py by a test. It has its own background, so it reads on light and dark pages.
"""

from pathlib import Path

from tlpipeline.choice.cases import CASES, Case

LAYERS = (("conv1", 84), ("conv2", 68), ("conv3", 52), ("fc1", 40), ("fc2", 40), ("fc3", 40))  # name, height; fc3 is the old head
SLICE_AFTER = 3  # where the cut lies in small_different; in a run it is measured
WIDTH, HEIGHT, BLOCK, STEP = 372, 196, 42, 48
LEGEND = (
    ("frozen", "frozen, pretrained weights"),
    ("tuned", "retrained"),
    ("new", "new head, trained"),
    ("cut", "cut off"),
)

STYLE = """
  svg { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
  .page { fill: #ffffff; } .panel { fill: #f4f6f9; stroke: #d4dae3; }
  text { fill: #1f2933; } .quiet { fill: #52606d; } .on { fill: #ffffff; } .code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; }
  .frozen { fill: #3b6ea5; } .tuned { fill: #b35c00; } .new { fill: #2e8b57; } .cut { fill: none; stroke: #9aa5b1; stroke-dasharray: 4 3; }
  .arrow { stroke: #7b8794; stroke-width: 1.5; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #161b22; } .panel { fill: #1f2630; stroke: #38424f; }
    text { fill: #e6edf3; } .quiet { fill: #a9b4c0; } .on { fill: #ffffff; }
    .frozen { fill: #3f78b5; } .tuned { fill: #b8651b; } .new { fill: #2f8f5b; } .cut { stroke: #6b7785; } .arrow { stroke: #8b96a3; }
  }
"""


def states(case: Case) -> list[str]:
    """Return what becomes of each layer of LAYERS: frozen, tuned or cut."""
    kept = SLICE_AFTER if case.keep == "slice" else len(LAYERS) - 1
    return ["cut" if i >= kept else "frozen" if case.freeze == "kept" else "tuned" for i in range(len(LAYERS))]


def words(case: Case) -> str:
    """Return the line under a panel's title."""
    if case.freeze == "kept":
        return "later layers cut, the rest frozen" if case.keep == "slice" else "old head cut, the rest frozen"
    return "all retrained, from pretrained weights" + (" or scratch" if case.init == "auto" else "")


def panel(case: Case, left: int, top: int) -> list[str]:
    """Return the drawing of one case."""
    parts = [
        f'<rect class="panel" x="{left}" y="{top}" width="{WIDTH}" height="{HEIGHT}" rx="10"/>',
        f'<text class="code" x="{left + 18}" y="{top + 30}" font-size="17" font-weight="600">{case.name}</text>',
        f'<text class="quiet" x="{left + 18}" y="{top + 52}" font-size="13.5">{words(case)}</text>',
    ]
    middle = top + 116
    for i, ((name, height), state) in enumerate(zip(LAYERS, states(case), strict=True)):
        x = left + 18 + i * STEP
        parts.append(f'<rect class="{state}" x="{x}" y="{middle - height // 2}" width="{BLOCK}" height="{height}" rx="4"/>')
        parts.append(
            f'<text class="{"quiet" if state == "cut" else "on"}" x="{x + BLOCK / 2}" y="{middle + 4}" font-size="11.5" text-anchor="middle">{name}</text>'
        )
    kept = states(case).count("frozen") + states(case).count("tuned")
    end = left + 18 + kept * STEP - (STEP - BLOCK)  # where what is kept ends
    head = left + 18 + len(LAYERS) * STEP
    parts.append(
        f'<path class="arrow" fill="none" d="M{end - BLOCK / 2} {middle + LAYERS[kept - 1][1] // 2} V{top + 172} H{head + BLOCK / 2} V{middle + 22}"/>'
    )
    parts.append(f'<rect class="new" x="{head}" y="{middle - 22}" width="{BLOCK + 4}" height="44" rx="4"/>')
    parts.append(f'<text class="on" x="{head + 21}" y="{middle + 4}" font-size="11.5" text-anchor="middle">head</text>')
    parts.append(f'<text class="quiet" x="{head + 10}" y="{top + 188}" font-size="12" text-anchor="end">features</text>')
    return parts


def drawing() -> str:
    """Return the whole picture as SVG."""
    width, height = 2 * WIDTH + 3 * 16, 2 * HEIGHT + 3 * 16 + 40
    parts = [f'<rect class="page" width="{width}" height="{height}" rx="12"/>']
    for i, case in enumerate(CASES):
        parts += panel(case, 16 + (i % 2) * (WIDTH + 16), 16 + (i // 2) * (HEIGHT + 16))
    x = 24
    for state, text in LEGEND:
        parts.append(f'<rect class="{state}" x="{x}" y="{height - 40}" width="18" height="18" rx="3"/>')
        parts.append(f'<text x="{x + 26}" y="{height - 26}" font-size="13.5">{text}</text>')
        x += 58 + int(7.4 * len(text))
    title = "The four transfer-learning cases, drawn on the demonstration network: three convolution layers, three fully connected layers"
    body = "\n".join(f"  {part}" for part in parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-labelledby="title">\n'
        f'  <title id="title">{title}</title>\n  <style>{STYLE}  </style>\n{body}\n</svg>\n'
    )


if __name__ == "__main__":
    Path(__file__).with_name("cases.svg").write_text(drawing(), encoding="utf-8")
