"""Tracked runs as what came of trainings: the bridge from MLflow's records to the numbers that arms are compared by."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from stn_pipeline.comparing.arms import SinglePair, State, Table, Trained, mcnemar
from stn_pipeline.comparing.measures import LOSS, REQUIRED
from stn_pipeline.config import TrainConfig
from stn_pipeline.tracking import RunRecord, data_digests, read_file

if TYPE_CHECKING:
    from stn_pipeline.comparing.answer import Answer

CIRCUMSTANCES = {  # tags that may make arms differ though their knobs do not, and what to call them
    "engine": "engine",
    "device": "device",
    "processor": "processor",
    "threads": "number of threads",
    "gpu": "GPU",
    "version.code": "training code",
    "version.torch": "torch",
}


def where(configs: Sequence[TrainConfig], title: str) -> str:
    """Return what a block's sentences hold for: its title, and the distortion and epochs that all of its trainings share."""
    shared = {name: values.pop() for name in ("distortion", "epochs") if len(values := {getattr(config, name) for config in configs}) == 1}
    words = [str(shared["distortion"])] if shared.get("distortion", "none") != "none" else []
    words += [f"{shared['epochs']} epoch{'s' * (shared['epochs'] != 1)}"] if "epochs" in shared else []
    return f"{title} ({', '.join(words)})" if words else title


def differences(answer: "Answer") -> list[str]:
    """Return a sentence for each circumstance of training that is not the same in all arms."""
    lines = []
    for arm, by_seed in answer.table.items():
        mixed = [str(seed) for seed, one in by_seed.items() if "went_on_under" in one.tags]
        if mixed:
            lines.append(f"{arm}: seed {', '.join(mixed)} went on under other code or another engine than it began with.")
    for tag, name in CIRCUMSTANCES.items():
        by_arm = {arm: sorted({one.tags[tag] for one in answer.table[arm].values() if tag in one.tags}) for arm in answer.arms}
        known = {arm: values for arm, values in by_arm.items() if values}
        if len(set(map(tuple, known.values()))) > 1:
            told = ", ".join(f"{arm} {' and '.join(values)}" for arm, values in known.items())
            lines.append(f"The {name} differs by arm: {told}.")
    return lines


def trained(record: RunRecord) -> Trained:
    """Return what came of a run."""
    tags, metrics, status = record.data.tags, record.data.metrics, record.info.status
    collapsed, run_id, digests = tags.get("collapsed") == "true", record.info.run_id, data_digests(record)
    if status == "FINISHED" and all(measure.name in metrics for measure in REQUIRED):
        if math.isnan(metrics[LOSS.name]):
            return Trained("diverged", {}, True, run_id, f"its {LOSS.words} is nan", tags, digests)
        return Trained("done", metrics, collapsed, run_id, tags=tags, digests=digests)
    if status == "FAILED" and collapsed:
        state: State = "crashed" if tags.get("crashed") == "true" else "diverged"
        return Trained(state, {}, True, run_id, tags.get("collapsed.why", ""), tags, digests)
    if status == "FAILED":
        return Trained("failed", {}, False, run_id, tags.get("error", "failed, without a reason on its page"), tags, digests)
    return Trained("missing", {}, False, run_id, "it was not trained to the end", tags, digests)


def single_pairs(table: Table, baseline: str) -> tuple[SinglePair, ...]:
    """Return McNemar's test of each seed by itself, where both networks' predictions are kept and are of the same images.

    The same images are those of one digest: equal labels alone may be another set's.
    """
    found = []
    kept: dict[str, dict[str, Any] | None] = {}

    def predictions(run_id: str) -> dict[str, Any] | None:
        if run_id not in kept:
            content = read_file(run_id, "predictions.npz")
            kept[run_id] = None
            if content is not None:
                with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                    kept[run_id] = dict(arrays)
        return kept[run_id]

    for arm in table:
        for seed in sorted(table[arm].keys() & table[baseline].keys() if arm != baseline else ()):
            pair = [table[name][seed] for name in (arm, baseline)]
            if any(one.state != "done" for one in pair) or pair[0].digests.get("test", "") != pair[1].digests.get("test"):
                continue
            one, other = (predictions(trained.run_id) for trained in pair)
            if one is not None and other is not None and np.array_equal(one["label"], other["label"]):
                right = [each["predicted"] == each["label"] for each in (one, other)]
                found.append(SinglePair(arm, seed, *mcnemar(right[0], right[1], one.get("image"))))
    return tuple(found)
