"""The new head on frozen features: multinomial logistic regression, solved to its optimum.

The loss is convex, so the L2 penalty is all there is to tune. It is chosen on held-out images, as Kornblith, Shlens and Le do for their
probes (2019, arXiv 1805.08974). Features may be mapped from disk: memory is bounded whatever the number of images.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor
from torch.nn import functional

from tlpipeline.backbones.features import Scaling, scaling
from tlpipeline.data.cache import FeatureTable
from tlpipeline.stats import pack

PENALTIES = tuple(10.0**e for e in (-1, -2, -3, -4, -5, -6, -7))
START = 3  # in the middle of them
FOLDS = 3
ONE_FOLD_FROM = 600
CV_IMAGES = 1000
CV_TOLERANCE = 1e-4  # at ten times as much it ends where it began
SPAN_BELOW, SPAN_SHARE = 1000, 0.7  # images, and images a feature, up to which a head is solved in the span of its images
EXACT, ROUNDED = (
    1e-10,
    1e-5,
)  # rounding of inner products, beside an image with itself: in float64, and in float32 with their sum over images
THREAD_OPS = 5e9  # operations of one part of a walk that are worth a thread: below, threads wait for memory and for each other
IN_MEMORY_BYTES = 128 << 20
WALKED = 8 << 20  # logits of one part of a walk; there are three times as many numbers for a moment
CHUNK = 1024

ABSENT = -1e4  # bias of a class without a training image
TEMPERATURE_SPREAD = 0.2  # standard deviation of the temperature's logarithm, before any data (the prior)
LEAST_STEPS = 20  # of a solver whose time is up: fewer give no head that is worth having

Labels = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float64]
IsExpired = Callable[[], bool]


def never() -> bool:
    """Return False: there is no time limit."""
    return False


class Features:
    """Features (n, d) for the solver: in memory if they are few, else mapped from disk and read in parts.

    Args:
        in_memory_bytes: most that mapped features take if they are read into memory.
        walked: most logits of one part of a pass over features in memory; chunk: images of a part otherwise.
    """

    def __init__(
        self, source: Tensor | FeatureTable, in_memory_bytes: int = IN_MEMORY_BYTES, walked: int = WALKED, chunk: int = CHUNK
    ) -> None:
        self.source, self.walked, self.chunk = source, walked, chunk
        if isinstance(source, FeatureTable) and len(source) * source.width * 4 <= in_memory_bytes:
            self.source = source.all()

    def __len__(self) -> int:
        return len(self.source)

    @property
    def width(self) -> int:
        """Features d."""
        return self.source.shape[1] if isinstance(self.source, Tensor) else self.source.width

    def at_once(self, classes: int) -> int:
        """Return how many images a pass takes at once: as many as have room with their logits."""
        return max(self.walked // classes, self.chunk) if isinstance(self.source, Tensor) else self.chunk

    def parts(self, classes: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield (slice, features) for consecutive images, with room for so many logits of each."""
        step = self.at_once(classes)
        for start in range(0, len(self.source), step):
            part = slice(start, min(start + step, len(self.source)))
            yield part, self._part(part)

    def _part(self, where: slice) -> Tensor:
        return self.source[where] if isinstance(self.source, Tensor) else self.source.take(where)

    def take(self, indices: npt.NDArray[np.int64]) -> Tensor:
        """Copy the features of some images."""
        return self.source[torch.from_numpy(indices)] if isinstance(self.source, Tensor) else self.source.take(indices)

    def scaling(self, blocks: Sequence[int]) -> Scaling:
        """Measure mean and scale, as `features.scaling` does, a part at a time: in float64 all of them would be twice as large as they are."""
        n, mean = 0, torch.zeros(self.width, dtype=torch.float64)
        square = torch.zeros_like(mean)
        for start in range(0, len(self), self.chunk):
            x = self._part(slice(start, start + self.chunk)).float()
            own = x.mean(0)
            squares = (x - own).square_().sum(0)
            # Chan, Golub and LeVeque 1979: two parts' moments together, without the cancellation of sums of squares.
            more, apart = len(x), own.double() - mean
            square += squares.double() + apart**2 * (n * more / (n + more))
            mean += apart * (more / (n + more))
            n += more
        # Two images that have this mean and deviation: the floor of dead channels is set in one place.
        deviation = (square / n).sqrt()
        return scaling(torch.stack([mean - deviation, mean + deviation]), blocks)


class Problem:
    """The penalized loss of a linear head on scaled features: mean cross-entropy (weighted by class) + penalty / 2 * |weights|^2.

    Parameters are on scaled features; the scaling is folded into them for each walk, so that the features are never copied.

    Args:
        features: n images.
        labels: (n,) indices into the classes that are there.
        classes: how many; shares: (n,) weight of each image, its sum 1.
    """

    def __init__(self, features: Features, labels: Labels, classes: int, shares: Matrix, scale: Scaling | None) -> None:
        self.features, self.labels, self.classes = features, torch.from_numpy(labels), classes
        self.shares, self.scale = torch.from_numpy(shares), scale

    def logits(self, weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the head with its scaling folded in, in the features' precision: (images, d) to (classes, images).

        The classes come first because they are few: the product is twice as fast that way round.
        """
        if self.scale is not None:
            weight = weight * self.scale.scale
            bias = bias - weight @ self.scale.mean
        w, b = weight.float(), bias.float()
        return lambda x: torch.addmm(b[:, None], w, x.float().T)

    def __call__(self, flat: Matrix, penalty: float) -> tuple[float, Matrix]:
        """Return loss and gradient at flat parameters (classes * (d + 1),)."""
        both = torch.from_numpy(flat).view(self.classes, -1)
        weight, bias = both[:, :-1], both[:, -1]
        head = self.logits(weight, bias)
        loss = 0.0
        gradient, residues = torch.zeros_like(weight), torch.zeros_like(bias)
        for where, x in self.features.parts(self.classes):
            log_probabilities = head(x).log_softmax(0)
            y, share = self.labels[where], self.shares[where]
            index = torch.arange(len(y))
            loss -= float(log_probabilities[y, index].double() @ share)
            residue = log_probabilities.exp()
            residue[y, index] -= 1
            residue *= share.float()
            gradient += (residue @ x.float()).double()
            residues += residue.double().sum(1)
        if self.scale is not None:
            gradient = (gradient - residues[:, None] * self.scale.mean) * self.scale.scale
        gradient += penalty * weight
        loss += penalty / 2 * float(weight.square().sum())
        return loss, torch.cat([gradient, residues[:, None]], 1).reshape(-1).numpy()

    def minimize(self, start: Matrix, penalty: float, steps: int, tolerance: float, expired: IsExpired = never) -> Matrix:
        """Return the parameters at the optimum by L-BFGS, from a start; at the weakest penalties separable data have none, and steps end it."""
        from scipy.optimize import minimize

        taken = 0

        def stepped(_: Matrix) -> None:
            nonlocal taken
            taken += 1
            if taken >= LEAST_STEPS and expired():
                raise StopIteration

        options: dict[str, Any] = {"maxiter": steps, "maxfun": 2 * steps, "gtol": tolerance, "ftol": 1e-9}
        with threadpool_limits(self.threads()):
            solution = minimize(self, start, args=(penalty,), jac=True, method="L-BFGS-B", options=options, callback=stepped)
        return np.asarray(solution.x)

    def threads(self) -> int:
        """Return how many threads a pass keeps busy. It is two thin products for each part: for 24 classes two threads took twice as long as one."""
        images = min(len(self.features), self.features.at_once(self.classes))
        return max(1, min(torch.get_num_threads(), int(4 * images * self.features.width * self.classes / THREAD_OPS)))


def solve_head(
    features: Tensor | FeatureTable | Features,
    labels: Labels,
    blocks: Sequence[int],
    classes: int,
    imbalance: float,
    seed: int,
    penalty: float | None = None,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float | None = None,
    expired: IsExpired = never,
) -> tuple[Tensor, Tensor, float]:
    """Solve multinomial logistic regression by L-BFGS, its L2 penalty chosen on held-out images, standardization folded into the result.

    Where there are fewer images than features the problem is solved in the span of the images (see `solve_kernel`), which changes nothing
    but the cost.

    Args:
        features: (n, d) in consecutive blocks (see Scaling).
        labels: (n,) class indices.
        classes: K; classes without a training image keep zero weights and a strongly negative bias.
        imbalance: classes are weighted alike where the largest has more than this many times the images of the smallest.
        penalty: per image, where it is known.
        start: weight and bias near the optimum, where they are known: of the same head on most of these images.
        tolerance: largest entry of the gradient at which the solver ends: 1e-5, where two starts agree within a point or two of
            probability; 1e-4 from 600 images on, which changed at most 6 of 1,500 answers, and accuracy by less than 0.15 points.
        expired: returns whether the time is up: then no other penalty is tried, and the solver ends where it is, after 20 steps at the earliest.

    Returns:
        weight (K, d), bias (K,) on raw features, and the penalty per image.
    """
    if tolerance is None:
        tolerance = 1e-5 if len(labels) < ONE_FOLD_FROM else 1e-4
    whole = features if isinstance(features, Features) else Features(features)
    scale = whole.scaling(blocks)
    if start is not None:
        w, b = (t.double() for t in start)
        start = w / scale.scale, b + w @ scale.mean
    if len(labels) <= min(SPAN_BELOW, SPAN_SHARE * whole.width) and isinstance(whole.source, Tensor):
        x = scale(whole.source)
        rows = x.numpy()
        span = Span(rows @ rows.T, EXACT)  # numpy sees that both sides are one, and computes half
        if start is not None:
            start = span.inside(x @ start[0].T), start[1]
        w, b, penalty = _solve(Features(span.rows), None, labels, classes, imbalance, seed, penalty, start, tolerance, expired)
        w = span.outside(w) @ x
    else:
        w, b, penalty = _solve(whole, scale, labels, classes, imbalance, seed, penalty, start, tolerance, expired)
    weight = w * scale.scale
    return weight.float(), (b - weight @ scale.mean).float(), penalty


def solve_kernel(kernel: Matrix, labels: Labels, classes: int, imbalance: float, seed: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Solve the head of images from the inner products of their scaled features alone.

    Args:
        kernel: (n, n), rounded as float32 is.

    Returns:
        alpha (K, n) and bias (K,): logits are alpha k + bias, k the inner products (n,) of an image with these.
    """
    span = Span(kernel, ROUNDED)
    w, b, _ = _solve(Features(span.rows), None, labels, classes, imbalance, seed, None, None, tolerance, never)
    return span.outside(w), b


def _solve(
    features: Features,
    scale: Scaling | None,
    labels: Labels,
    classes: int,
    imbalance: float,
    seed: int,
    penalty: float | None,
    start: tuple[Tensor, Tensor] | None,
    tolerance: float,
    expired: IsExpired,
) -> tuple[Tensor, Tensor, float]:
    """Return weight (K, d) and bias (K,) on scaled features, and the penalty, chosen on held-out images if it is not known."""
    present, own = np.unique(labels, return_inverse=True)
    own = own.astype(np.int64)
    shares = image_weights(own, imbalance)
    first = np.zeros(len(present) * (features.width + 1))
    if penalty is None:
        penalty, first = _held_out_penalty(features, own, shares, scale, seed, expired)
    if start is not None:
        known = torch.from_numpy(present)
        first = torch.cat([start[0][known], _begun(start[1][known])[:, None]], 1).reshape(-1).numpy()
    problem = Problem(features, own, len(present), shares, scale)
    both = torch.from_numpy(problem.minimize(first, penalty, 500, tolerance, expired)).view(len(present), -1)
    weight = torch.zeros(classes, features.width, dtype=torch.float64)
    bias = torch.full((classes,), ABSENT, dtype=torch.float64)
    weight[present], bias[present] = both[:, :-1], both[:, -1]
    return weight, bias, penalty


def _begun(bias: Tensor) -> Tensor:
    """Return biases to start from: a class without an image in the start gets the mean of the others.

    Started from ABSENT, with a hundred of 600 classes, the solver did not arrive in 25 times the time (docs/log.md).
    """
    present = bias > ABSENT / 2
    return torch.where(present, bias, bias[present].mean() if bool(present.any()) else torch.zeros((), dtype=bias.dtype))


class Span:
    """Coordinates of images in the space that they span: of X X' = L L' (Cholesky) the rows of L, which have the images' inner products.

    A penalty on the weights is the same in these coordinates: X = L Q with orthonormal rows Q = L^-1 X.

    Args:
        kernel: X X', (n, n).
        rounding: of the kernel, as a share of its mean diagonal; so much is added to the diagonal, ten times as much while it is not enough.
    """

    def __init__(self, kernel: Matrix, rounding: float) -> None:
        mean = max(float(kernel.diagonal().mean()), 1e-12)
        lift, failed = rounding * mean, True
        while failed:
            lifted = torch.from_numpy(np.array(kernel, dtype=np.float64))
            lifted.diagonal().add_(lift)
            # What is lifted by its own size and still no kernel is no number.
            self.lower, info = torch.linalg.cholesky_ex(lifted, check_errors=not lift < mean)
            failed, lift = bool(info), 10 * lift
        self.rows = self.lower.float()

    def outside(self, weight: Tensor) -> Tensor:
        """Return what the images count in weights (K, n) on these coordinates: alpha (K, n), so that the weights on features are alpha X."""
        alpha: Tensor = torch.linalg.solve_triangular(self.lower, weight, upper=False, left=False)
        return alpha

    def inside(self, logits: Tensor) -> Tensor:
        """Return the weights (K, n) on these coordinates that give the images these logits (n, K)."""
        weight: Tensor = torch.linalg.solve_triangular(self.lower, logits, upper=False)
        return weight.T


def image_weights(labels: Labels, imbalance: float) -> Matrix:
    """Return each image's share of the loss (n,), their sum 1: alike, or classes alike where the largest has `imbalance` times the smallest."""
    counts = np.bincount(labels)
    there = counts[counts > 0]
    if there.max() > imbalance * there.min():
        return np.asarray(1 / (len(there) * counts[labels]))
    return np.full(len(labels), 1 / len(labels))


def _held_out_penalty(
    features: Features, labels: Labels, shares: Matrix, scale: Scaling | None, seed: int, expired: IsExpired
) -> tuple[float, Matrix]:
    """Return the penalty with the smallest log loss on held-out images, by walking downhill from the middle of the grid.

    The parameters that one part of the images has at that penalty come with it: a start near the optimum of all.

    At most 1,000 images: a third of them is held out, in turn while there are few. The loss has one valley along the grid, so neighbors
    are tried only as long as they are better.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(labels))[:CV_IMAGES]
    x, y = features.take(order), labels[order]
    scaled, span = x, None
    if scale is not None and len(y) <= SPAN_SHARE * x.shape[1]:
        scaled = scale(x).float()
        span = Span((scaled @ scaled.T).double().numpy(), ROUNDED)
        x, scale = span.rows, None
    fold = np.zeros(len(y), dtype=int)
    for c in np.unique(y):
        members = np.flatnonzero(y == c)
        fold[members] = np.arange(len(members)) % FOLDS
    folds = [k for k in range(FOLDS) if (fold == k).any() and len(np.unique(y[fold != k])) > 1]
    classes = int(labels.max()) + 1
    if not folds:
        return PENALTIES[START], np.zeros(classes * (features.width + 1))
    folds = folds[:1] if len(y) >= ONE_FOLD_FROM else folds
    sides = [(np.flatnonzero(fold != k), np.flatnonzero(fold == k)) for k in folds]
    problems = []
    for a, _ in sides:
        weights = shares[order][a]
        problems.append(Problem(Features(x[torch.from_numpy(a)]), y[a], classes, weights / weights.sum(), scale))
    at = [np.zeros(classes * (x.shape[1] + 1)) for _ in sides]
    losses: dict[int, float] = {}
    reached: dict[int, Matrix] = {}

    def loss(i: int) -> float:
        if i not in losses:
            total = 0.0
            for k, ((_, b), problem) in enumerate(zip(sides, problems, strict=True)):
                at[k] = problem.minimize(at[k], PENALTIES[i], 200, CV_TOLERANCE, expired)
                both = torch.from_numpy(at[k]).view(classes, -1)
                head = problem.logits(both[:, :-1], both[:, -1])
                # Classes that the other folds lack have no images to be right about.
                probabilities = head(x[torch.from_numpy(b)]).T.double().softmax(1)
                total += score(probabilities, y[b])[1] * len(b)
            losses[i], reached[i] = total, at[0]
        return losses[i]

    best = _downhill(loss, expired)
    loss(best)  # it was compared with none where the time was up
    both = torch.from_numpy(reached[best]).view(classes, -1)
    weight = both[:, :-1] if span is None else (span.outside(both[:, :-1]).float() @ scaled).double()
    return PENALTIES[best], torch.cat([weight, both[:, -1:]], 1).reshape(-1).numpy()


def judged_penalty(
    features: Tensor | FeatureTable,
    labels: Labels,
    judges: Tensor | FeatureTable,
    truth: Labels,
    blocks: Sequence[int],
    classes: int,
    imbalance: float,
    seed: int,
    expired: IsExpired = never,
) -> tuple[float, tuple[Tensor, Tensor]]:
    """Return the penalty with which a head on some images has the smallest log loss on others, and that head: weight (K, d), bias (K,).

    For features that were trained on the first ones, which then say nothing of their own fit. At most 1,000 of either.

    Args:
        features, labels: (n, d), (n,) of those that it is solved on; judges, truth: (m, d), (m,) of those that judge.
    """
    rng = np.random.default_rng(seed)
    some, others = (rng.permutation(count)[:CV_IMAGES] for count in (len(labels), len(truth)))
    x, z = Features(features).take(some), Features(judges).take(others).float()
    losses: dict[int, float] = {}
    heads: dict[int, tuple[Tensor, Tensor]] = {}

    def loss(i: int) -> float:
        if i not in losses:
            near = next(reversed(heads.values()), None)
            w, b, _ = solve_head(
                x, labels[some], blocks, classes, imbalance, seed, PENALTIES[i], near, tolerance=CV_TOLERANCE, expired=expired
            )
            heads[i] = w, b
            losses[i] = score((z @ w.T + b).double().softmax(1), truth[others])[1]
        return losses[i]

    best = _downhill(loss, expired)
    loss(best)  # it was compared with none where the time was up
    return PENALTIES[best], heads[best]


def _downhill(loss: Callable[[int], float], expired: IsExpired) -> int:
    """Return the index of the penalty with the smallest loss, searched from the middle of the grid: the loss has one minimum along it."""
    best = START
    for direction in (-1, 1):
        while 0 <= best + direction < len(PENALTIES) and not expired() and loss(best + direction) < loss(best):
            best += direction
        if best != START:
            break
    return best


def inverse_temperature(probabilities: Tensor, labels: Labels) -> float:
    """Return the factor for logits that makes a head as confident as it is accurate: temperature scaling (Guo et al. 2017, arXiv 1706.04599).

    It minimizes the log loss on images that the head was not solved on, drawn towards 1 so that a few images change little. The predicted
    classes stay the same. The penalty that suits them leaves a head of hundreds of classes far too unsure (docs/log.md).

    Args:
        probabilities: (n, K) of those images; labels: (n,) their classes.
    """
    from scipy.optimize import minimize_scalar

    if not len(labels):
        return 1.0
    logits, y = probabilities.double().clamp(min=1e-30).log(), torch.from_numpy(labels)

    def loss(power: float) -> float:
        return float(functional.cross_entropy(logits * math.exp(power), y, reduction="sum")) + power**2 / (2 * TEMPERATURE_SPREAD**2)

    return math.exp(float(minimize_scalar(loss, bounds=(-4, 4), method="bounded").x))


# --- judging --------------------------------------------------------------------------------------------------------------------------


def score(probabilities: Tensor, labels: Labels) -> tuple[float, float]:
    """Return accuracy and mean log loss of probabilities (n, K); (0, infinity) of no images."""
    if not len(labels):
        return 0.0, math.inf
    y = torch.from_numpy(np.asarray(labels)).long()
    accuracy = float((probabilities.argmax(1) == y).double().mean())
    return accuracy, float(-probabilities.double()[torch.arange(len(y)), y].clamp(min=1e-12).log().mean())


def validated(probabilities: Tensor, labels: Labels) -> tuple[float, float, str]:
    """Return accuracy, mean log loss, and which images were classified correctly, as packed bits."""
    return *score(probabilities, labels), pack(probabilities.argmax(1).numpy() == labels)
