"""The chart of the regret report: regret against cost, and the reliability of the product's probability."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from research.figures import Figures, reliability
from tlpipeline.stats import wilson

FAR = ("always frozen", "size only (n >= 1000)", "random")  # so much regret that the others would share a corner
PRODUCT, BASELINE = "#b3372f", "#2563a8"
# Alignment of the names that would cover another name or bar: (horizontal, vertical); all others stand to the right of the middle of the bar.
LABELS = {
    "product (auto)": ("left", "bottom"),
    "product (quick)": ("right", "top"),
    "always multi": ("left", "bottom"),
    "always plain FT": ("right", "bottom"),
    "textbook 2x2, our recipe": ("left", "top"),
    "P_max >= .88": ("right", "center"),
    "P_max >= .88, our recipe": ("right", "bottom"),
    "oracle, our recipe": ("right", "top"),
}


def draw(figures: Mapping[str, Figures], path: Path) -> None:
    """Write the chart as SVG; the same figures give the same file."""
    with mpl.rc_context({"svg.hashsalt": "tlpipeline", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 10}):
        figure = Figure(figsize=(12, 5.6), layout="constrained")
        costs, probabilities = figure.subplots(1, 2, width_ratios=(5, 4))
        _regret_against_cost(costs, {name: f for name, f in figures.items() if not name.startswith(FAR)})
        _reliability(probabilities, figures["product (auto)"])
        figure.savefig(path, metadata={"Date": None})


def _regret_against_cost(axes: Axes, figures: Mapping[str, Figures]) -> None:
    """Draw a bar from the lower to the upper bound of the mean regret of each rule."""
    for name, f in figures.items():
        low, high, cost = max(f.half.mean(), 0.0), f.raw.mean(), f.cost.mean()
        color = PRODUCT if name.startswith("product") else BASELINE
        axes.plot([cost, cost], [low, high], color=color, linewidth=3, marker="_", markersize=5)
        side, place = LABELS.get(name, ("left", "center"))
        at = {"top": low, "bottom": high, "center": (low + high) / 2}[place]
        axes.annotate(name, (cost, at), xytext=(4 if side == "left" else -4, 0), textcoords="offset points", ha=side, va=place, color=color)
    axes.set(xlim=(0, 1.2), ylim=(-0.12, None), xlabel="cost in forward passes (always LP-FT = 100 %)", ylabel="mean regret (points)")
    axes.set_title("Mean regret against cost: from the lower to the upper bound")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.grid(color="#e3e7ec")
    axes.set_axisbelow(True)


def _reliability(axes: Axes, product: Figures) -> None:
    """Draw the share of good choices against the predicted probability, with 90 % Wilson intervals."""
    axes.plot([0, 1], [0, 1], color="#c4ccd6", linestyle="--")
    for predicted, share, units in reliability(product):
        low, high = wilson(round(share * units), units, 0.9)
        axes.errorbar(predicted, share, yerr=[[share - low], [high - share]], fmt="o", color=PRODUCT)
    axes.set(
        xlim=(0, 1),
        ylim=(0, 1.02),
        xlabel="predicted probability, five bins of equal size",
        ylabel="share within the tolerance, 90 % interval",
    )
    axes.set_title("P(within the tolerance of the best): predicted and observed")
