"""Tracked runs as what came of trainings: the bridge from MLflow's records to the numbers that arms are compared by."""

import io
from typing import Any

import numpy as np

from stn_pipeline.comparing.arms import MEASURES, SinglePair, Table, Trained, mcnemar
from stn_pipeline.tracking import RunRecord, read_file


def trained(record: RunRecord) -> Trained:
    """Return what came of a run."""
    tags, metrics = record.data.tags, record.data.metrics
    collapsed, run_id = tags.get("collapsed") == "true", record.info.run_id
    if record.info.status == "FINISHED" and all(measure.name in metrics for measure in MEASURES):
        return Trained("done", metrics, collapsed, run_id, tags=tags)
    if record.info.status == "FAILED" and collapsed:
        return Trained("diverged", {}, True, run_id, tags.get("collapsed.why", ""), tags)
    if record.info.status == "FAILED":
        return Trained("failed", {}, False, run_id, tags.get("error", "failed, without a reason on its page"), tags)
    return Trained("missing", {}, False, run_id, "it was not trained to the end", tags)


def single_pairs(table: Table, baseline: str) -> tuple[SinglePair, ...]:
    """Return McNemar's test of each seed by itself, where both networks' predictions are kept and are of the same images."""
    found = []
    kept: dict[str, tuple[Any, Any] | None] = {}

    def predictions(run_id: str) -> tuple[Any, Any] | None:
        if run_id not in kept:
            content = read_file(run_id, "predictions.npz")
            kept[run_id] = None
            if content is not None:
                with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                    kept[run_id] = arrays["label"], arrays["predicted"]
        return kept[run_id]

    for arm in table:
        for seed in sorted(table[arm].keys() & table[baseline].keys() if arm != baseline else ()):
            pair = [table[name][seed] for name in (arm, baseline)]
            if any(one.state != "done" for one in pair):
                continue
            one, other = (predictions(trained.run_id) for trained in pair)
            if one is not None and other is not None and np.array_equal(one[0], other[0]):
                found.append(SinglePair(arm, seed, *mcnemar(one[1] == one[0], other[1] == other[0])))
    return tuple(found)
