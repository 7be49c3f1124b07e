"""What the scores promise: every figure against scikit-learn, a closed formula, a count by hand or a plain loop."""

import io
import json
import math
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import beta, binomtest
from sklearn.metrics import accuracy_score, confusion_matrix, log_loss
from torch import Tensor, nn

from stn_pipeline.comparing.arms import mcnemar
from stn_pipeline.config import TrainConfig
from stn_pipeline.data import Split, load
from stn_pipeline.jobs import trial
from stn_pipeline.model import Network, build
from stn_pipeline.training import Scores, calibration, report, score, scores
from stn_pipeline.training.scores import accuracy_interval

K = 5


# Helpers


class Table(nn.Module):
    """A network whose logits are written down beforehand: row i for the image whose two pixels hold i."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.table = logits
        self.classifier = nn.Module()
        self.classifier.logits = nn.Linear(1, logits.shape[1])

    def forward(self, images: Tensor) -> Tensor:
        low, high = (images[:, 0, 0] * 255).round().long().unbind(1)
        return self.table[low + 256 * high]


def table(n: int, seed: int = 0) -> tuple[Table, Split]:
    """Logits of all sizes, labels that they often hit, class K - 1 never seen."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, K, generator=generator) * 3
    labels = torch.where(torch.rand(n, generator=generator) < 0.6, logits.argmax(1), torch.randint(K, (n,), generator=generator))
    number = torch.arange(n)
    return Table(logits), Split(torch.stack([number % 256, number // 256], 1).to(torch.uint8).view(n, 1, 1, 2), labels % (K - 1))


def real(transform: str = "affine") -> tuple[Network, Split]:
    """A real network, sure of itself, and noise to be scored on."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (53, 1, 8, 8), dtype=torch.uint8, generator=generator)
    network = build(TrainConfig(dataset="digits", transform=transform), (1, 8, 8), 10)
    with torch.no_grad():
        network.classifier.logits.weight.mul_(20)
    return network, Split(images, torch.randint(10, (53,), generator=generator))


def made(labels: list[int], predicted: list[int], confidence: list[float] | None = None, k: int = 2) -> Scores:
    confidence = confidence or [0.5] * len(labels)
    return Scores(0.5, torch.tensor(labels), torch.tensor(predicted), torch.tensor(confidence), k)


def sure(confidence: list[float], right: list[bool]) -> Scores:
    return made([0] * len(right), [0 if ok else 1 for ok in right], confidence)


# Scoring a network


@pytest.mark.parametrize("n", [1, 7, 500, 1234])
def test_loss_accuracy_confidence_and_confusion_are_those_of_scikit_learn(n):
    network, split = table(n)
    found = score(network, split)
    p, labels = softmax(network.table.double().numpy(), axis=1), split.labels.numpy()
    assert found.loss == pytest.approx(log_loss(labels, p, labels=range(K)), rel=1e-6)
    assert found.accuracy == accuracy_score(labels, p.argmax(1))
    assert found.confusion.tolist() == confusion_matrix(labels, p.argmax(1), labels=range(K)).tolist()
    np.testing.assert_allclose(found.confidence, p.max(1), rtol=1e-6)
    assert found.labels.tolist() == labels.tolist() and found.predicted.tolist() == p.argmax(1).tolist()
    assert (found.n, found.n_classes) == (n, K)
    assert found.n_right == round(found.accuracy * n) == found.confusion.trace()


def test_the_rows_of_a_confusion_are_the_true_classes_and_the_columns_the_predicted():
    confusion = made([0, 0, 0, 2], [1, 1, 0, 2], k=4).confusion
    assert confusion.tolist() == [[1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("batch", [1, 7, 52, 53, 54, 10_000])
def test_the_scores_do_not_depend_on_the_scoring_batch(monkeypatch, batch):
    for network, split in (table(53), real()):
        monkeypatch.setattr(scores, "SCORING_BATCH", 500)
        expected = score(network, split)
        monkeypatch.setattr(scores, "SCORING_BATCH", batch)
        found = score(network, split)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert torch.equal(found.predicted, expected.predicted)
        torch.testing.assert_close(found.confidence, expected.confidence)


@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_scored_without_dropout_and_left_in_the_mode_it_was_in(training):
    network, split = real()
    network.train(training)
    before, random = {key: value.clone() for key, value in network.state_dict().items()}, torch.get_rng_state()
    first, second = score(network, split), score(network, split)
    assert all(module.training == training for module in network.modules())
    assert first.loss == second.loss and torch.equal(first.confidence, second.confidence)
    assert torch.equal(torch.get_rng_state(), random), "scoring draws no random number"
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    with torch.no_grad():
        logits = network.eval()(split.images / 255)
    assert first.loss == pytest.approx(log_loss(split.labels, softmax(logits.double().numpy(), axis=1), labels=range(10)), rel=1e-5)


# The report


def wilson(n_right: int, n: int) -> list[float]:
    z, p = 1.959963984540054, n_right / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]


@pytest.mark.parametrize(("n_right", "n"), [(1, 2), (7, 10), (355, 360), (9905, 10_000), (0, 20), (20, 20), (0, 1), (1, 1)])
def test_the_interval_of_the_accuracy_is_wilsons(n_right, n):
    found = report(made([0] * n, [0] * n_right + [1] * (n - n_right)), ("a", "b"))
    low, high = found["accuracy_95"]
    assert [low, high] == pytest.approx(wilson(n_right, n), abs=1e-12)
    assert found["accuracy"] == n_right / n and 0 <= low <= n_right / n <= high <= 1


def test_the_interval_never_shrinks_to_a_point_where_all_is_right_or_wrong():
    z2 = 1.959963984540054**2
    assert report(made([0] * 30, [0] * 30), ("a", "b"))["accuracy_95"] == pytest.approx([30 / (30 + z2), 1])
    assert report(made([0] * 30, [1] * 30), ("a", "b"))["accuracy_95"] == pytest.approx([0, z2 / (30 + z2)])


def test_precision_recall_and_f1_are_the_counts_and_0_for_a_class_never_predicted_or_never_seen():
    #                  cat: 3 of 4 found, 1 dog taken for one; dog: 1 of 2; cow: seen, never predicted; elk: predicted, never seen
    labels = [0, 0, 0, 0, 1, 1, 2]
    predicted = [0, 0, 0, 3, 1, 0, 1]
    found = report(made(labels, predicted, k=5), ("cat", "dog", "cow", "elk", "yak"))["per_class"]
    nothing = {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert found == {
        "cat": pytest.approx({"precision": 3 / 4, "recall": 3 / 4, "f1": 3 / 4, "n": 4}),
        "dog": pytest.approx({"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "n": 2}),
        "cow": nothing | {"n": 1},
        "elk": nothing | {"n": 0},
        "yak": nothing | {"n": 0},
    }


def test_macro_f1_is_the_plain_mean_over_the_classes_that_have_images():
    found = report(made([0, 0, 0, 1, 2], [0, 0, 1, 1, 1], k=4), ("a", "b", "c", "d"))
    assert found["macro_f1"] == pytest.approx((4 / 5 + 1 / 2 + 0) / 3)


def test_a_report_is_plain_json_and_repeats_the_scores():
    network, split = table(1234)
    found = score(network, split)
    summary = report(found, tuple("abcde"))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["n"] == 1234 and summary["loss"] == found.loss and summary["accuracy"] == found.accuracy
    assert summary["calibration_error"] == calibration(found).error
    assert list(summary["per_class"]) == list("abcde")


# Calibration


def naive(confidence: list[float], right: list[bool], n_bins: int) -> tuple[list[int], list[float], list[float], float]:
    """Guo et al. 2017, eq. 3, image by image and bin by bin, in exact fractions: bin m is ((m - 1) / M, m / M]."""
    counts, means, accuracies, error = [], [], [], 0.0
    for m in range(1, n_bins + 1):
        inside = [i for i, c in enumerate(confidence) if Fraction(m - 1, n_bins) < Fraction(c) <= Fraction(m, n_bins) or m == 1 and c == 0]
        counts.append(len(inside))
        means.append(sum(confidence[i] for i in inside) / len(inside) if inside else math.nan)
        accuracies.append(sum(right[i] for i in inside) / len(inside) if inside else math.nan)
        if inside:
            error += len(inside) / len(confidence) * abs(accuracies[-1] - means[-1])
    return counts, means, accuracies, error


answers = st.lists(st.tuples(st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=1, max_size=60)


@settings(deadline=None)
@given(answers, st.integers(1, 20) | st.just(15))
def test_calibration_is_that_of_a_plain_loop(pairs, n_bins):
    confidence, right = [c for c, _ in pairs], [ok for _, ok in pairs]
    counts, means, accuracies, error = naive(confidence, right, n_bins)
    found = calibration(sure(confidence, right), n_bins)
    assert found.count.tolist() == counts and found.count.sum() == len(pairs)
    np.testing.assert_allclose(found.confidence, means, rtol=1e-12)
    np.testing.assert_allclose(found.accuracy, accuracies, rtol=1e-12)
    assert found.error == pytest.approx(error, abs=1e-12)
    assert 0 <= found.error <= 1


def test_calibration_of_a_real_scoring_is_that_of_a_plain_loop_over_15_bins():
    found = score(*table(1234))
    counts, means, accuracies, error = naive(found.confidence.tolist(), (found.predicted == found.labels).tolist(), 15)
    bins = calibration(found)
    assert bins.count.tolist() == counts and bins.error == pytest.approx(error, abs=1e-12) and error > 0.05
    np.testing.assert_allclose(bins.confidence, means)
    np.testing.assert_allclose(bins.accuracy, accuracies)


@pytest.mark.parametrize(
    ("confidence", "n_bins", "at"),
    [(1.0, 15, 14), (0.0, 15, 0), (0.25, 4, 0), (0.25 + 2**-24, 4, 1), (0.5, 4, 1), (0.75, 4, 2), (0.5, 15, 7), (1.0, 1, 0)],
)
def test_a_bin_holds_its_upper_edge_and_not_its_lower(confidence, n_bins, at):
    assert calibration(sure([confidence], [True]), n_bins).count.tolist() == [int(i == at) for i in range(n_bins)]


def test_a_network_that_is_as_right_as_it_is_sure_has_no_calibration_error():
    confidence = [1.0] * 3 + [0.75] * 4 + [0.5] * 2
    assert calibration(sure(confidence, [True] * 3 + [True, True, True, False] + [True, False])).error == 0


def test_a_network_that_is_sure_and_always_wrong_has_the_error_1():
    assert calibration(sure([1.0] * 4, [False] * 4)).error == 1


def test_gaps_to_either_side_add_up_and_never_cancel():
    # half of the images: sure at 0.5, always right (gap +0.5); half: sure at 1, half right (gap -0.5)
    assert calibration(sure([0.5, 0.5, 1.0, 1.0], [True, True, True, False])).error == pytest.approx(0.5)


def test_an_empty_bin_has_no_confidence_and_no_accuracy():
    bins = calibration(sure([1.0], [True]))
    assert np.isnan(bins.confidence[:14]).all() and np.isnan(bins.accuracy[:14]).all()
    assert (bins.confidence[14], bins.accuracy[14]) == (1, 1)


# An image that is shown several times


def shown(right: np.ndarray) -> Scores:
    """Scores of images that are each shown several times: right (draws, images) bool."""
    predicted = torch.from_numpy(~right.ravel()).long()
    return Scores(0.5, torch.zeros_like(predicted), predicted, torch.full((right.size,), 0.5), 2, draws=len(right))


def test_each_copy_knows_its_image():
    scores = replace(made([0] * 6, [0] * 6), draws=3)
    assert scores.source_image.tolist() == [0, 1, 0, 1, 0, 1] and report(scores, ("a", "b"))["n_images"] == 2
    assert made([0] * 6, [0] * 6).source_image.tolist() == list(range(6)) and report(made([0] * 6, [0] * 6), ("a", "b"))["n_images"] == 6


def test_a_distorted_test_split_tells_its_draws_to_the_scores():
    splits = load(TrainConfig(dataset="digits", distortion="rotated", draws=3), announce=lambda line: None)
    network = build(TrainConfig(dataset="digits", transform="none"), (1, 8, 8), 10)
    found = score(network, splits.test)
    assert found.draws == splits.test.draws == 3 and splits.train.draws == 1
    labels = found.labels.numpy()
    assert all(len(set(labels[found.source_image == image])) == 1 for image in range(found.n // 3))
    plain = load(TrainConfig(dataset="digits"), announce=lambda line: None)
    assert plain.test.draws == 1 and splits.test.to(torch.device("cpu")).draws == 3


@pytest.mark.parametrize("draws", [1, 2])
def test_kept_predictions_tell_the_image_where_it_is_shown_several_times(monkeypatch, draws):
    monkeypatch.setattr(trial, "_pictures", lambda *_: {})
    network, split = real()
    kept: dict[str, bytes] = {}
    run = SimpleNamespace(log_scores=lambda *_: None, log_json=lambda *_: None, log_files=kept.update)
    split = Split(split.images.repeat(draws, 1, 1, 1), split.labels.repeat(draws), draws=draws)
    trial.evaluate_run(run, network, split, tuple("abcdefghij"), name="test", title="x")
    with np.load(io.BytesIO(kept["predictions.npz"])) as arrays:
        assert ("image" in arrays) == (draws > 1) and len(arrays["predicted"]) == 53 * draws
        assert draws == 1 or arrays["image"].tolist() == [*range(53)] * 2
        assert draws == 1 or mcnemar(arrays["predicted"] == 0, arrays["label"] == 0, arrays["image"])[:2] != (0, 0)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=2, max_size=40))
def test_copies_make_an_interval_that_holds_the_accuracy_and_lies_between_one_and_all_of_them(pictures):
    right = np.array(pictures).T
    low, high = accuracy_interval(shown(right))
    accuracy = right.mean()
    assert 0 <= low <= accuracy <= high <= 1
    k, n = right.sum(), right.size

    def exact(n_right: float, n: float) -> tuple[float, float]:  # Clopper and Pearson
        return float(beta.ppf(0.025, n_right, n - n_right + 1)), float(beta.ppf(0.975, n_right + 1, n - n_right))

    if 0 < k < n:
        widest, narrowest = exact(accuracy * right.shape[1], right.shape[1]), exact(k, n)
        assert widest[0] - 1e-9 <= low <= narrowest[0] + 1e-9 and narrowest[1] - 1e-9 <= high <= widest[1] + 1e-9
    else:
        assert (low == 0) == (k == 0) and (high == 1) == (k == n) and high - low == pytest.approx(1 - 0.025 ** (1 / right.shape[1]))


def test_copies_that_are_all_alike_are_one_image_each():
    once = np.array([True] * 37 + [False] * 3)
    alike = accuracy_interval(shown(np.tile(once, (10, 1))))
    assert alike == pytest.approx(tuple(binomtest(37, 40).proportion_ci(0.95, method="exact")), abs=0.003)
    wilson_all = wilson(370, 400)
    assert alike[1] - alike[0] > 2 * (wilson_all[1] - wilson_all[0])


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("accuracy", [0.7, 0.9])
def test_the_interval_covers_95_test_sets_of_100_however_alike_the_copies_are(accuracy, correlation):
    rng, sets, images, draws = np.random.default_rng(0), 800, 300, 10
    if correlation in (0.0, 1.0):
        chance = np.full((sets, images), accuracy) if correlation == 0 else (rng.random((sets, images)) < accuracy).astype(float)
    else:  # beta-binomial: the copies' correlation is 1 / (a + b + 1)
        size = 1 / correlation - 1
        chance = rng.beta(accuracy * size, (1 - accuracy) * size, (sets, images))
    right = rng.random((sets, draws, images)) < chance[:, None]
    covered, narrow = 0, 0
    for one in right:
        low, high = accuracy_interval(shown(one))
        covered += low <= accuracy <= high
        naive = wilson(int(one.sum()), one.size)
        narrow += naive[0] <= accuracy <= naive[1]
    assert 0.935 <= covered / sets <= (0.975 if correlation == 1 else 0.965)  # Clopper and Pearson cover a little more of few images
    assert correlation == 0 or narrow / sets < 0.85
