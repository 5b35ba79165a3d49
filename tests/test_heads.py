"""The head solver: the same optimum whether features are in memory, mapped, or rotated; the penalty is found where it should be."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tlpipeline.backbones.features import scaling
from tlpipeline.data.cache import Column, FeatureTable
from tlpipeline.training import heads
from tlpipeline.training.heads import (
    PENALTIES,
    START,
    Features,
    Problem,
    Span,
    image_weights,
    inverse_temperature,
    judged_penalty,
    score,
    solve_head,
    solve_kernel,
)

BLOCKS = [7, 5]


def drawn(n: int, classes: int, separation: float = 1.0, seed: int = 0, width: int = 12) -> tuple[torch.Tensor, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    x = rng.normal(size=(n, width)) * np.linspace(0.1, 5, width) + separation * rng.normal(size=(classes, width))[labels] + 3
    return torch.from_numpy(x).float(), labels


def mapped(x: torch.Tensor, folder: Path, blocks: list[int] = BLOCKS) -> FeatureTable:
    names = [hashlib.md5(str(i).encode()).hexdigest() for i in range(len(x))]
    columns = [Column(folder / str(number)) for number in range(len(blocks))]
    for column, part in zip(columns, x.split(blocks, 1), strict=True):
        for start in range(0, len(x), 100):
            column.add(names[start : start + 100], part[start : start + 100])
    return FeatureTable([column.rows(names) for column in columns])


@pytest.mark.parametrize("classes", [2, 5])
def test_mapped_features_give_the_head_that_features_in_memory_give(classes: int, tmp_path: Path) -> None:
    x, labels = drawn(300, classes)
    wanted = solve_head(x, labels, BLOCKS, classes, 10, 0)
    table = Features(mapped(x, tmp_path), in_memory_bytes=0, chunk=128)
    assert not isinstance(table.source, torch.Tensor)
    weight, bias, penalty = solve_head(table, labels, BLOCKS, classes, 10, 0)
    assert penalty == wanted[2]
    assert torch.allclose((x @ weight.T + bias).softmax(1), (x @ wanted[0].T + wanted[1]).softmax(1), atol=0.02)


def test_features_in_memory_are_walked_in_parts_where_their_logits_would_have_no_room() -> None:
    x, labels = drawn(300, 5)
    whole = Problem(Features(x), labels, 5, image_weights(labels, 10), None)
    problem = Problem(Features(x, walked=5 * 128, chunk=64), labels, 5, image_weights(labels, 10), None)
    at = np.random.default_rng(0).normal(size=5 * 13)
    assert [len(part) for _, part in whole.features.parts(5)] == [300]
    assert [len(part) for _, part in problem.features.parts(5)] == [128, 128, 44]
    assert [len(part) for _, part in problem.features.parts(50)] == [64, 64, 64, 64, 44]
    loss, gradient = problem(at, 1e-3)
    wanted = whole(at, 1e-3)
    assert loss == pytest.approx(wanted[0], rel=1e-6)
    assert gradient == pytest.approx(wanted[1], rel=1e-6, abs=1e-6)


def test_the_scaling_of_mapped_features_is_that_of_the_same_in_memory(tmp_path: Path) -> None:
    x, _ = drawn(300, 3)
    x[:, 3] = 2.0  # a dead channel
    found, wanted = Features(mapped(x, tmp_path), in_memory_bytes=0).scaling(BLOCKS), scaling(x, BLOCKS)
    assert torch.allclose(found.mean, wanted.mean)
    assert torch.allclose(found.scale, wanted.scale)


def test_the_gradient_is_that_of_the_loss() -> None:
    x, labels = drawn(80, 3)
    scale = scaling(x, BLOCKS)
    shares = image_weights(labels, imbalance=1.01)
    assert len(set(shares)) > 1
    problem = Problem(Features(x), labels, 3, shares, scale)
    at = np.random.default_rng(0).normal(size=3 * 13)
    loss, gradient = problem(at, 0.1)
    both = torch.from_numpy(at).view(3, 13).requires_grad_(True)
    logits = scale(x) @ both[:, :-1].T + both[:, -1]
    each = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels), reduction="none")
    wanted = (each * torch.from_numpy(shares)).sum() + 0.05 * both[:, :-1].square().sum()
    wanted.backward()
    assert both.grad is not None
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert np.allclose(gradient, both.grad.reshape(-1).numpy(), atol=1e-5)


def test_two_classes_are_penalized_as_any_number_is() -> None:
    """Softmax with two rows, whichever solver: weights of opposite sign."""
    x, labels = drawn(200, 2)
    weight, bias, _ = solve_head(x, labels, BLOCKS, 2, 10, 0, 1e-3)
    assert torch.allclose(weight[0], -weight[1], atol=1e-3)
    assert float((x @ weight.T + bias).argmax(1).numpy().astype(int).__eq__(labels).mean()) > 0.6


def test_noise_wants_a_strong_penalty_and_clean_classes_a_weak_one() -> None:
    noise, labels = drawn(400, 3, separation=0.0, width=200)
    assert solve_head(noise, labels, [200], 3, 10, 0)[2] >= 1e-2
    clean, labels = drawn(400, 3, separation=6.0)
    assert solve_head(clean, labels, BLOCKS, 3, 10, 0)[2] <= 1e-4


class Counted(Features):
    """Counts how often the solver walks over them."""

    walks = 0

    def parts(self, classes: int) -> Iterator[tuple[slice, torch.Tensor]]:
        self.walks += 1
        return super().parts(classes)


def test_a_known_start_ends_at_the_same_head_in_fewer_steps() -> None:
    x, labels = drawn(600, 4)
    first, again = Counted(x), Counted(x)
    cold = solve_head(first, labels, BLOCKS, 4, 10, 0, 1e-3)
    warm = solve_head(again, labels, BLOCKS, 4, 10, 0, 1e-3, cold[:2])
    assert 0 < again.walks < first.walks / 2
    assert torch.allclose((x @ cold[0].T + cold[1]).softmax(1), (x @ warm[0].T + warm[1]).softmax(1), atol=5e-3)


@pytest.mark.parametrize(("images", "classes"), [(90, 3), (1500, 4)])
def test_features_that_know_their_images_by_heart_are_judged_by_others(images: int, classes: int) -> None:
    """What a network was trained on lies closer to its class; images that it never saw say how sure its head may be."""
    every, of_all = drawn(2400 + images, classes, separation=1.5)
    (judges, others, x), (truth, unseen, labels) = (torch.split(torch.as_tensor(v), [400, 2000, images]) for v in (every, of_all))
    centers = torch.stack([x[labels == c].mean(0) for c in range(classes)])[labels]
    x, kind = centers + 0.5 * (x - centers), (BLOCKS, classes, 10.0, 0)
    truth, unseen, labels = truth.numpy(), unseen.numpy(), labels.numpy()

    def loss(penalty: float | None, near: tuple[torch.Tensor, torch.Tensor] | None = None) -> float:
        weight, bias, _ = solve_head(x, labels, *kind, penalty, near)
        return score((others @ weight.T + bias).softmax(1), unseen)[1]

    penalty, near = judged_penalty(x, labels, judges, truth, *kind)
    assert PENALTIES[0] > penalty > PENALTIES[-1]
    assert loss(penalty, near) < 0.95 * loss(None)  # by themselves they want hardly any
    assert loss(penalty, near) < 1.1 * min(loss(each) for each in PENALTIES)
    assert judged_penalty(x, labels, judges, truth, *kind, expired=lambda: True)[0] == PENALTIES[START]


def wide(n: int = 150) -> tuple[torch.Tensor, np.ndarray]:
    """Fewer images than features, two of them alike: their span has fewer dimensions than there are images."""
    x, labels = drawn(n, 3, separation=0.3, width=400)
    x[1] = x[0]
    return x, labels


@pytest.mark.parametrize("penalty", [1e-2, 1e-5])
def test_in_the_span_of_the_images_the_head_is_the_one_among_all_features(penalty: float, tmp_path: Path) -> None:
    x, labels = wide()
    new, _ = drawn(100, 3, separation=0.3, width=400)
    inside = solve_head(x, labels, [400], 3, 10, 0, penalty, tolerance=1e-7)
    again = solve_head(x, labels, [400], 3, 10, 0, penalty, start=inside[:2], tolerance=1e-7)
    features = Features(mapped(x, tmp_path, [400]), in_memory_bytes=0)  # only those in memory are solved in the span
    among_all = solve_head(features, labels, [400], 3, 10, 0, penalty, tolerance=1e-7)
    for weight, bias, _ in (inside, again):
        assert torch.allclose((new @ weight.T + bias).softmax(1), (new @ among_all[0].T + among_all[1]).softmax(1), atol=2e-3)


@pytest.mark.parametrize("precision", [torch.float64, torch.float32])
def test_a_head_of_inner_products_says_of_new_images_what_a_head_of_features_says(precision: torch.dtype) -> None:
    x, labels = wide()
    new, _ = drawn(100, 3, separation=0.3, width=400)
    weight, bias, _ = solve_head(x, labels, [400], 3, 10, 0, tolerance=1e-6)
    scale = scaling(x, [400])
    mine, others = scale(x).to(precision), scale(new)
    alpha, offset = solve_kernel((mine @ mine.T).double().numpy(), labels, 3, 10, 0, tolerance=1e-6)
    found = others @ scale(x).T @ alpha.T + offset
    assert torch.allclose(found.softmax(1), (new @ weight.T + bias).double().softmax(1), atol=5e-3)


def test_inner_products_that_rounding_made_impossible_are_lifted_as_far_as_it_takes() -> None:
    kernel = np.eye(20) - 1e-4 * np.ones((20, 20)) * 20 / 2  # an eigenvalue of 1 - 0.02
    kernel[0, 0] = kernel[1, 1] = 1
    kernel[0, 1] = kernel[1, 0] = 1.001  # and one below 0
    span = Span(kernel, heads.ROUNDED)
    assert np.allclose((span.lower @ span.lower.T).numpy(), kernel, atol=0.02)
    nothing = Span(np.zeros((5, 5)), heads.EXACT)
    assert nothing.rows.isfinite().all()


def test_a_thin_problem_is_walked_by_one_thread_and_the_others_are_given_back() -> None:
    x, labels = drawn(200, 3)
    seen: list[int] = []

    class Watched(Problem):
        def __call__(self, flat: np.ndarray, penalty: float) -> tuple[float, np.ndarray]:
            seen.append(torch.get_num_threads())
            return super().__call__(flat, penalty)

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        problem = Watched(Features(x), labels, 3, image_weights(labels, 10), scaling(x, BLOCKS))
        problem.minimize(np.zeros(3 * 13), 1e-2, 5, 1e-3)
        assert torch.get_num_threads() == 3
        assert set(seen) == {1}
        problem.features = Features(torch.empty(1, 1).expand(400_000, 4_000))
        assert problem.threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("images", [100, 900], ids=["in the span", "in the features"])
def test_a_solver_whose_time_is_up_takes_a_few_steps_and_tries_no_other_penalty(images: int) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = np.arange(images) % 3
    x = torch.randn(images, 200, generator=generator) + 0.3 * torch.from_numpy(labels)[:, None]
    asked: list[bool] = []  # at each step from the 20th on, and before another penalty is tried

    def solved(late: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
        asked.clear()
        return solve_head(x, labels, (200,), 3, 10, 0, tolerance=1e-8, expired=lambda: asked.append(late) or late)  # type: ignore[func-returns-value]

    whole, steps = solved(False), len(asked)
    late = solved(True)
    assert whole[2] != heads.PENALTIES[heads.START]
    assert 2 < len(asked) <= 2 + heads.FOLDS + 1  # no penalty below or above is tried, and each solver ends when it first asks
    assert len(asked) < steps / 2

    def accuracy(head: tuple[torch.Tensor, torch.Tensor, float]) -> float:
        return float(((x @ head[0].T + head[1]).argmax(1).numpy() == labels).mean())

    assert accuracy(late) > accuracy(whole) - 0.1
    assert late[2] == heads.PENALTIES[heads.START]


def test_classes_weigh_alike_from_more_than_so_many_times_the_images_on() -> None:
    for rare, weight in ((3, 1 / 33), (2, 1 / 4)):
        labels = np.array([0] * 30 + [2] * rare)
        shares = image_weights(labels, imbalance=10)
        assert shares.sum() == pytest.approx(1)
        assert shares[-1] == pytest.approx(weight)  # half of the loss for two images, or as much as any other


def test_the_penalty_is_found_on_images_of_all_classes_in_whatever_order_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder is read class by class, and no more than a thousand images are held out from."""
    x, labels = drawn(1500, 5)
    order = np.argsort(labels, kind="stable")
    there: list[list[int]] = []

    class Watched(Problem):
        def __init__(self, features: Features, labels: np.ndarray, *rest: object) -> None:
            there.append(np.bincount(labels).tolist())
            super().__init__(features, labels, *rest)

    monkeypatch.setattr(heads, "Problem", Watched)
    solve_head(x[torch.from_numpy(order)], labels[order], BLOCKS, 5, 10, 0)
    assert len(there) == 2  # one fold, and the head of all images
    assert sum(there[0]) == pytest.approx(heads.CV_IMAGES * (1 - 1 / heads.FOLDS), abs=5)
    assert min(there[0]) > 90


def test_both_ends_of_the_penalties_are_reached() -> None:
    for best in range(len(PENALTIES)):
        asked: list[int] = []
        assert heads._downhill(lambda i, best=best, asked=asked: asked.append(i) or abs(i - best), heads.never) == best
        assert set(asked) <= set(range(len(PENALTIES)))


def test_a_class_with_a_single_image_is_survived() -> None:
    x, labels = drawn(60, 3)
    labels[labels == 2] = 0
    labels[7] = 2
    weight, bias, _ = solve_head(x, labels, BLOCKS, 3, 10, 0)
    assert weight.isfinite().all()
    assert bias.isfinite().all()


def test_the_penalty_is_found_with_each_image_s_own_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are shuffled before they are held out: their weights have to be shuffled with them."""
    x, _ = drawn(240, 2)
    labels = np.arange(240) % 12 // 11  # 220 against 20
    weighed: list[np.ndarray] = []

    class Watched(Problem):
        def __init__(self, features: Features, labels: np.ndarray, classes: int, shares: np.ndarray, scale: object) -> None:
            weighed.append(np.bincount(labels, shares))
            super().__init__(features, labels, classes, shares, scale)

    monkeypatch.setattr(heads, "Problem", Watched)
    solve_head(x, labels, BLOCKS, 2, 10, 0)
    assert len(weighed) == heads.FOLDS + 1
    assert np.allclose(weighed, 0.5, atol=0.03)


def test_the_moments_of_parts_that_drift_apart_are_those_of_the_whole() -> None:
    x, _ = drawn(300, 3)
    x += torch.linspace(-20, 40, 300)[:, None]
    found, wanted = Features(x, chunk=70).scaling(BLOCKS), scaling(x, BLOCKS)
    assert torch.allclose(found.mean, wanted.mean, rtol=1e-5)
    assert torch.allclose(found.scale, wanted.scale, rtol=1e-5)


def test_inner_products_that_are_no_numbers_are_an_error_and_no_endless_search() -> None:
    with pytest.raises(RuntimeError, match="cholesky"):
        Span(np.full((4, 4), np.nan), heads.ROUNDED)


def test_a_start_that_lacks_a_class_is_as_good_as_one_that_has_it() -> None:
    """A head of some images knows nothing of classes that have none among them: the next one must not have to climb out of that."""
    x, labels = drawn(400, 8, separation=2.0)
    x, known = x[np.argsort(labels, kind="stable")], np.sort(labels)
    there = known < 6
    *part, _ = solve_head(x[torch.from_numpy(there)], known[there], BLOCKS, 8, 10, 0, 1e-3)
    assert float(part[1][6:].max()) < -1000
    alone, after = Counted(x), Counted(x)
    cold = solve_head(alone, known, BLOCKS, 8, 10, 0, 1e-3)
    warm = solve_head(after, known, BLOCKS, 8, 10, 0, 1e-3, (part[0], part[1]))
    assert 0 < after.walks <= alone.walks
    assert torch.allclose((x @ warm[0].T + warm[1]).softmax(1), (x @ cold[0].T + cold[1]).softmax(1), atol=0.02)


def test_a_head_of_many_classes_becomes_as_sure_as_it_is_right_and_answers_as_before() -> None:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(100, 64))

    def some(each: int) -> tuple[torch.Tensor, np.ndarray]:
        labels = np.repeat(np.arange(100), each)
        return torch.from_numpy(centers[labels] + 1.5 * rng.normal(size=(len(labels), 64))).float(), labels

    (x, known), (val, truth), (test, wanted) = some(12), some(2), some(5)
    weight, bias, _ = solve_head(x, known, (64,), 100, 10, 0)
    by = inverse_temperature((val @ weight.T + bias).softmax(1), truth)
    assert by > 1.5
    logits = test @ weight.T + bias
    before, after = logits.softmax(1), (logits * by).softmax(1)
    assert torch.equal(before.argmax(1), after.argmax(1))
    right = float((after.argmax(1).numpy() == wanted).mean())
    assert abs(float(after.max(1).values.mean()) - right) < 0.05 < 0.15 < right - float(before.max(1).values.mean())
    assert score(after, wanted)[1] < 0.8 * score(before, wanted)[1]


def test_a_few_images_hardly_change_how_sure_a_head_is_and_none_do_not() -> None:
    chances = torch.full((2, 3), 0.25)
    chances[:, 0] = 0.5
    assert 1 < inverse_temperature(chances, np.array([0, 0])) < 1.1
    assert 0.9 < inverse_temperature(chances, np.array([1, 2])) < 1
    assert inverse_temperature(torch.zeros(0, 3), np.zeros(0, dtype=np.int64)) == 1
    impossible = torch.tensor([[1.0, 0.0, 0.0]])
    assert math.isfinite(inverse_temperature(impossible, np.array([1])))
