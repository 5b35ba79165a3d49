"""How often the gate errs, by simulation: true changes of -3 to +3 points, 50 to 10,000 test images, 52 weeks in a row.

    python -m research.gate

prints the tables of docs/benchmarks.md and draws docs/images/gate.svg. It takes a few minutes on one core.

A model with true accuracy a is right on an image if its skill exceeds the image's difficulty, and both models face the same images:
`phi(share * difficulty + noise) < a`. The share is such that two models of 90 % disagree on about 6 % of the images.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from scipy.stats import binom, norm

from tlpipeline.evaluation.power import critical_region

SIZES = (50, 100, 300, 1000, 3000, 10_000)
CHANGES = (-3, -2, -1, 0, 1, 2, 3)
ALPHA, MARGIN, DELTA = 0.05, 0.01, 0.01
DISCORDANCE = 0.06
DRAWS = 20_000
WEEKS, YEARS = 52, 100
SHARE = 0.95  # of difficulty in what is right: two models of 90 % then disagree on 6 % of the images
CHART = Path(__file__).parents[1] / "docs" / "images" / "gate.svg"

Counts = npt.NDArray[np.int64]
Rule = Callable[[Counts, Counts, int], npt.NDArray[np.bool_]]  # wins, losses, images: whether the challenger is promoted


def better(wins: Counts, losses: Counts, n: int) -> npt.NDArray[np.bool_]:
    """The product's default: significantly better."""
    return np.asarray(wins >= critical_region(n, ALPHA)[losses])


def not_worse(wins: Counts, losses: Counts, n: int) -> npt.NDArray[np.bool_]:
    """Significantly not worse by a point."""
    return np.asarray(wins >= critical_region(n, ALPHA, -MARGIN)[losses])


def conditional(wins: Counts, losses: Counts, n: int) -> npt.NDArray[np.bool_]:
    """The exact conditional McNemar test."""
    return np.asarray(binom.sf(wins - 1, wins + losses, 0.5) < ALPHA)


RULES: dict[str, Rule] = {
    "better": better,
    "not_worse": not_worse,
    "McNemar": conditional,
    ">=": lambda wins, losses, n: wins >= losses,
    "+1 point": lambda wins, losses, n: wins - losses > DELTA * n,
}


def single(n: int, change: float) -> dict[str, float]:
    """Return how often each rule promotes a challenger with a true change, by one comparison on n images."""
    rng = np.random.default_rng([n, round(1000 * (change + 1))])
    shares = [(DISCORDANCE + change) / 2, (DISCORDANCE - change) / 2, 1 - DISCORDANCE]
    wins, losses, _ = rng.multinomial(n, shares, DRAWS).T
    return {name: float(rule(wins, losses, n).mean()) for name, rule in RULES.items()}


def rejected(n: int, change: float) -> float:
    """Return how often the default shows a challenger to be worse."""
    rng = np.random.default_rng([n, round(1000 * (change + 1))])
    wins, losses, _ = rng.multinomial(n, [(DISCORDANCE + change) / 2, (DISCORDANCE - change) / 2, 1 - DISCORDANCE], DRAWS).T
    return float(better(losses, wins, n).mean())


# --- a year ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Year:
    """What 52 weeks led to, over all simulated years.

    Attributes:
        worse, worse_promoted: challengers that were worse than the champion by the margin or more, and those that were promoted.
        gains, gains_refused: challengers that were better by two points or more, and those that were not promoted.
        promotions: in a year.
        change: true accuracy of production at the end minus at the beginning, in points, in each year.
    """

    worse: int
    worse_promoted: int
    gains: int
    gains_refused: int
    promotions: float
    change: npt.NDArray[np.float64]


def year(rule: Rule, n: int, growing: bool) -> Year:
    """Simulate years in which a challenger comes each week, and is judged by the same test images.

    Args:
        n: test images at the end of the year.
        growing: the test images double within the year, and the mean accuracy of the challengers rises from 90 to 93 %; else all stays at 90 %.
            The accuracy of a week's model varies by a point (standard deviation) around the mean.
    """
    rng = np.random.default_rng([n, growing])
    difficulty = rng.standard_normal((YEARS, n)) * SHARE

    def answers(accuracy: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        noise = rng.standard_normal((YEARS, n), dtype=np.float32) * (1 - SHARE**2) ** 0.5
        return np.asarray(difficulty + noise < norm.ppf(accuracy)[:, None])

    def drawn(week: int) -> npt.NDArray[np.float64]:
        mean = 0.90 + 0.03 * growing * week / WEEKS
        return np.asarray(np.clip(mean + 0.01 * rng.standard_normal(YEARS), 0.5, 0.995))

    champion, start = answers(first := drawn(0)), first
    accuracy = first.copy()
    result = Year(0, 0, 0, 0, 0.0, np.zeros(YEARS))
    for week in range(1, WEEKS + 1):
        images = round(n / 2 * (1 + week / WEEKS)) if growing else n
        other = drawn(week)
        challenger = answers(other)
        seen = challenger[:, :images], champion[:, :images]
        promoted = rule((seen[0] & ~seen[1]).sum(1), (~seen[0] & seen[1]).sum(1), images)
        worse, gains = other <= accuracy - MARGIN, other >= accuracy + 0.02
        result.worse += int(worse.sum())
        result.worse_promoted += int((worse & promoted).sum())
        result.gains += int(gains.sum())
        result.gains_refused += int((gains & ~promoted).sum())
        result.promotions += float(promoted.mean())
        champion = np.where(promoted[:, None], challenger, champion)
        accuracy = np.where(promoted, other, accuracy)
    result.change = 100 * (accuracy - start)
    return result


# --- another statistic ----------------------------------------------------------------------------------------------------------------


def log_loss(sharper: float, n: int = 1000, draws: int = 2000) -> tuple[float, float]:
    """Return how often a challenger of the same accuracy passes a paired t-test of log loss, and the exact test of accuracy.

    Args:
        sharper: factor on the champion's log odds, which are half of what calibration asks for; 1: alike.
    """
    rng = np.random.default_rng(0)
    by_loss = by_accuracy = 0
    for _ in range(draws):
        odds = rng.normal(4, 3, n) + rng.normal(0, 0.7, (2, n))  # of the true class, for both models
        losses = np.log1p(np.exp(-odds * np.array([[0.5 * sharper], [0.5]])))
        gain = losses[1] - losses[0]
        by_loss += gain.mean() > norm.isf(ALPHA) * gain.std(ddof=1) / n**0.5
        right = odds > 0
        by_accuracy += bool(better((right[0] & ~right[1]).sum(), (~right[0] & right[1]).sum(), n))
    return by_loss / draws, by_accuracy / draws


# --- what is printed ------------------------------------------------------------------------------------------------------------------


def table(header: list[str], rows: list[list[str]]) -> str:
    """Return a markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def draw(promoted: Mapping[tuple[int, int], Mapping[str, float]], path: Path) -> None:
    """Draw how often each rule promotes, by the true change, a panel for each number of images."""
    with mpl.rc_context({"svg.hashsalt": "tlpipeline", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(11, 5.6), layout="constrained")
        colors = {"better": "#b3372f", "not_worse": "#d98880", ">=": "#5d6b7e", "+1 point": "#2563a8"}
        for panel, n in zip(figure.subplots(2, 3, sharex=True, sharey=True).flat, SIZES, strict=True):
            for name, color in colors.items():
                panel.plot(CHANGES, [promoted[n, change][name] for change in CHANGES], color=color, marker="o", markersize=3, label=name)
            panel.axhline(ALPHA, color="#c4ccd6", linestyle="--", linewidth=1)
            panel.set(title=f"{n:,} test images", ylim=(-0.02, 1.02))
            panel.grid(color="#e3e7ec")
            panel.set_axisbelow(True)
        figure.axes[0].legend(frameon=False)
        figure.supxlabel("true change of accuracy (points)")
        figure.supylabel("share promoted")
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Print the tables and draw the chart."""
    promoted = {(n, change): single(n, change / 100) for n in SIZES for change in CHANGES}
    draw(promoted, CHART)
    print(f"One comparison, {DRAWS:,} draws, {DISCORDANCE:.0%} of the images discordant: share promoted.\n")
    rows = [[f"{n:,}", name, *(f"{promoted[n, change][name]:.1%}" for change in CHANGES)] for n in SIZES for name in RULES]
    print(table(["images", "rule", *(f"{change:+d}" for change in CHANGES)], rows))
    print("\nShown to be worse by the default rule.\n")
    print(table(["images", *(f"{c:+d}" for c in CHANGES)], [[f"{n:,}", *(f"{rejected(n, c / 100):.1%}" for c in CHANGES)] for n in SIZES]))
    for growing in (False, True):
        print(f"\n{WEEKS} weeks, {YEARS} years, {'growing' if growing else 'the same images'}.\n")
        rows = []
        for n in SIZES:
            for name in ("better", "not_worse", ">=", "+1 point"):
                y = year(RULES[name], n, growing)
                low, high = np.quantile(y.change, [0.1, 0.9])
                rows.append(
                    [
                        f"{n:,}",
                        name,
                        f"{y.worse_promoted / max(y.worse, 1):.1%}",
                        f"{y.gains_refused / max(y.gains, 1):.0%}",
                        f"{y.promotions:.1f}",
                        f"{y.change.mean():+.2f} ({low:+.1f} to {high:+.1f})",
                    ]
                )
        print(table(["images", "rule", "worse promoted", "gains refused", "promotions", "change of production (points)"], rows))
    print("\nModels of the same accuracy, 1,000 images: share that passes.\n")
    rows = [[f"{sharper:g}", *(f"{share:.1%}" for share in log_loss(sharper))] for sharper in (1.0, 1.2, 1.5, 2.0)]
    print(table(["sharper by", "paired log loss", "exact test of accuracy"], rows))


if __name__ == "__main__":
    main()
