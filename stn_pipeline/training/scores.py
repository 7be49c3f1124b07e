"""What a network is worth on a split: loss, accuracy and its interval, confusion, precision and recall, calibration.

Legend: N images, K classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from stn_pipeline.data import Split
from stn_pipeline.errors import DataError
from stn_pipeline.model import Network
from stn_pipeline.training.device import arithmetic

SCORING_BATCH = 500
SCORING_PIXELS = 2_000_000  # a batch, all channels; the first feature map takes up to ten times as many numbers
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Scores:
    """The scores of one network on one split.

    loss: mean cross-entropy, nats per image.   accuracy: 0..1.   n: N.   n_classes: K.
    labels, predicted: (N,) int64, 0..K-1.   confidence: (N,) probability of the predicted class.  All on the CPU.
    draws: how often each source image is among the N; see Split.
    """

    loss: float
    labels: Tensor
    predicted: Tensor
    confidence: Tensor
    n_classes: int
    draws: int = 1

    @property
    def n(self) -> int:
        """Number of images scored."""
        return len(self.labels)

    @property
    def source_image(self) -> np.ndarray:
        """(N,) the number of the source image that each image shows."""
        return np.arange(self.n) % (self.n // self.draws)

    @property
    def n_right(self) -> int:
        """Number of images classified rightly."""
        return int((self.predicted == self.labels).sum())

    @property
    def accuracy(self) -> float:
        """Share of the images classified rightly, 0..1."""
        return self.n_right / self.n

    @property
    def confusion(self) -> Tensor:
        """(K, K) counts, rows true, columns predicted."""
        k = self.n_classes
        return torch.bincount(self.labels * k + self.predicted, minlength=k * k).view(k, k)


@torch.inference_mode()
@arithmetic("fp32")
def score(network: Network, split: Split) -> Scores:
    """Score a network on a split, in evaluation mode and fp32; the network is left in the mode it was in.

    Raises: DataError for a split without images, of which there is nothing to tell.
    """
    if not len(split):
        raise DataError("the split has no images: give at least one to be scored")
    was_training = network.training
    network.eval()
    losses, predicted, confidence = [], [], []
    size = max(1, min(SCORING_BATCH, SCORING_PIXELS // split.images[0].numel()))
    for first in range(0, len(split), size):
        batch = slice(first, first + size)
        logits = network(split.images[batch].float() / 255)
        losses.append(F.cross_entropy(logits, split.labels[batch], reduction="none"))
        top = logits.softmax(dim=1).max(dim=1)
        predicted.append(top.indices)
        confidence.append(top.values)
    network.train(was_training)
    return Scores(
        loss=torch.cat(losses).double().mean().item(),
        labels=split.labels.cpu(),
        predicted=torch.cat(predicted).cpu(),
        confidence=torch.cat(confidence).cpu(),
        n_classes=network.classifier.logits.out_features,
        draws=split.draws,
    )


@dataclass(frozen=True)
class Calibration:
    """Reliability by confidence: per bin mean confidence, accuracy (NaN where empty) and count; and the mean gap.

    error: expected calibration error, 0..1, the count-weighted mean of |accuracy - confidence| (Guo et al. 2017, eq. 3).
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    count: np.ndarray
    error: float


def calibration(scores: Scores, n_bins: int = CALIBRATION_BINS) -> Calibration:
    """Return the calibration over bins of equal width, each (low, high]."""
    confidence = scores.confidence.double().numpy()
    right = (scores.predicted == scores.labels).double().numpy()
    bins = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    count = np.bincount(bins, minlength=n_bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bins, confidence, n_bins) / count
        accuracy = np.bincount(bins, right, n_bins) / count
    error = float(np.nansum(np.abs(accuracy - mean_confidence) * count) / count.sum())
    return Calibration(mean_confidence, accuracy, count, error)


def accuracy_interval(scores: Scores) -> tuple[float, float]:
    """Return the ends of the accuracy's 95 % interval: Wilson's; where images are shown several times, by source image.

    Copies of one image are right or wrong together, so they are not as many images: with draws > 1 the interval is Clopper and
    Pearson's at the number of independent images that would have the variance seen between source images.
    Source: Wilson 1927, JASA 22; Korn & Graubard 1998, Survey Methodology 24.   Checked against: simulation.
    """
    from scipy.special import betaincinv
    from scipy.stats import binomtest

    if scores.draws == 1:
        interval = binomtest(scores.n_right, scores.n).proportion_ci(0.95, method="wilson")
        return float(interval.low), float(interval.high)
    right = (scores.predicted == scores.labels).double().numpy()
    of_image = np.bincount(scores.source_image, weights=right) / scores.draws  # 0..1 for each source image
    n, p = len(of_image), scores.accuracy
    variance = of_image.var(ddof=1) / n if n > 1 else 0.0
    effective = float(np.clip(p * (1 - p) / variance, n, scores.n)) if variance else float(n)
    k = p * effective
    low = float(betaincinv(k, effective - k + 1, 0.025)) if k > 0 else 0.0
    high = float(betaincinv(k + 1, effective - k, 0.975)) if k < effective else 1.0
    return low, high


def report(scores: Scores, classes: tuple[str, ...]) -> dict[str, object]:
    """Return everything there is to say of the scores, ready for JSON.

    accuracy_95 is accuracy_interval's; n counts images, n_images source images. Precision, recall and F1 are 0 where a class was
    never predicted or never seen; macro_f1 is the mean over the classes that have images.
    """
    from sklearn.metrics import precision_recall_fscore_support

    precision, recall, f1, support = precision_recall_fscore_support(
        scores.labels.numpy(), scores.predicted.numpy(), labels=range(scores.n_classes), zero_division=0
    )
    per_class = {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "n": int(n)}
        for name, p, r, f, n in zip(classes, precision, recall, f1, support, strict=True)
    }
    return {
        "n": scores.n,
        "n_images": scores.n // scores.draws,
        "loss": scores.loss,
        "accuracy": scores.accuracy,
        "accuracy_95": list(accuracy_interval(scores)),
        "calibration_error": calibration(scores).error,
        "macro_f1": float(np.mean(f1[support > 0])),
        "per_class": per_class,
    }
