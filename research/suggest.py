"""What labels that `tlpipeline data suggest` asks for are worth, against labels of images drawn at random.

    python -m research.suggest [--data FOLDER] --work FOLDER [--only NAME ...]

A hundred images of a real set are labeled, fifty more are chosen out of up to 1,400, and a ridge head on the features of the profile's best tap
is tested on 500 other images. Twenty draws; the error is the standard error of the paired difference.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from scipy.special import softmax

from research.units import command_line, folders
from research.wrong_labels import features_of
from tlpipeline.backbones.features import scaling
from tlpipeline.checking import suggesting
from tlpipeline.profiling.probes import Matrix, one_hot

SETS = ("neu_steel", "sign_digits", "pacs_sketch", "flowers", "caltech24", "eurosat")
LABELED, ADDED, TESTED, DRAWS = 100, 50, 500, 20
RIDGE, SHARPNESS = 0.01, 6.0  # SHARPNESS: of the head's softmax

Labels = npt.NDArray[np.int64]


def head(features: Matrix, labels: Labels) -> Callable[[Matrix], Matrix]:
    """Return a ridge classifier: features to scores of the classes."""
    mean, targets = features.mean(0), one_hot(labels)
    centered = features - mean
    kernel = centered @ centered.T
    kernel += RIDGE * kernel.trace() / len(kernel) * np.eye(len(kernel))
    solution = centered.T @ np.linalg.solve(kernel, targets - targets.mean(0))
    return lambda others: (others - mean) @ solution + targets.mean(0)


def draw(features: Matrix, labels: Labels, seed: int) -> dict[str, float]:
    """Return the accuracy with the labeled images, and with those that each way adds."""
    order: Labels = np.random.default_rng(seed).permutation(len(labels))
    test, rest = order[:TESTED], order[TESTED:]
    first = [int(rest[labels[rest] == k][0]) for k in range(int(labels.max()) + 1)]  # each class has an image
    rest = rest[~np.isin(rest, first)]
    labeled, pool = np.concatenate([first, rest[: LABELED - len(first)]]), rest[LABELED - len(first) :][:1400]
    scores = head(features[labeled], labels[labeled])
    probabilities = softmax(SHARPNESS * scores(features[pool]), axis=1)
    unsure = np.argsort(-suggesting.uncertainty(probabilities), kind="stable")[:ADDED]
    ways = {"random": np.arange(ADDED), "unsure only": unsure, "suggest": np.array(suggesting.choose(probabilities, features[pool], ADDED))}
    reached = {"before": float((scores(features[test]).argmax(1) == labels[test]).mean())}
    for way, chosen in ways.items():
        training = np.concatenate([labeled, pool[chosen]])
        guesses = head(features[training], labels[training])(features[test]).argmax(1)
        reached[way] = float((guesses == labels[test]).mean())
    return reached


def main() -> None:
    """Print the table."""
    arguments = command_line(__doc__, SETS)
    sets = folders(arguments.data, arguments.work)
    print("| data set | with 100 labels | 50 more at random | 50 suggested | gain over random, points | only the unsure ones |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in arguments.only:
        read, reading, labels = features_of(sets[name], arguments.data, arguments.work, 2048)
        scaled = scaling(read, reading.blocks)(read).numpy()
        drawn = [draw(scaled, labels, seed) for seed in range(DRAWS)]
        reached = {way: np.array([values[way] for values in drawn]) for way in drawn[0]}
        gain, plain = (100 * (reached[way] - reached["random"]) for way in ("suggest", "unsure only"))
        means = " | ".join(f"{reached[way].mean():.1%}" for way in ("before", "random", "suggest"))
        print(f"| {name} | {means} | {gain.mean():+.1f} ± {gain.std() / DRAWS**0.5:.1f} | {plain.mean():+.1f} |", flush=True)


if __name__ == "__main__":
    main()
