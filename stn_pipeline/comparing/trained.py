"""Tracked runs as what came of trainings: the bridge from MLflow's records to the numbers that arms are compared by."""

from stn_pipeline.comparing.arms import MEASURES, Trained
from stn_pipeline.tracking import RunRecord


def trained(record: RunRecord) -> Trained:
    """Return what came of a run."""
    tags, metrics = record.data.tags, record.data.metrics
    collapsed, run_id = tags.get("collapsed") == "true", record.info.run_id
    if record.info.status == "FINISHED" and all(measure.name in metrics for measure in MEASURES):
        return Trained("done", metrics, collapsed, run_id)
    if record.info.status == "FAILED" and collapsed:
        return Trained("diverged", {}, True, run_id, tags.get("collapsed.why", ""))
    if record.info.status == "FAILED":
        return Trained("failed", {}, False, run_id, tags.get("error", "failed, without a reason on its page"))
    return Trained("missing", {}, False, run_id, "it was not trained to the end")
