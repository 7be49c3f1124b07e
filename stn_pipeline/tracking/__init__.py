"""MLflow, and nothing else imports it: where the runs are kept, a server that is away, runs written to and found again."""

from stn_pipeline.tracking.away import in_a_hurry, is_away, watched
from stn_pipeline.tracking.found import (
    RunRecord,
    check_resumable,
    filter_runs,
    find_run,
    load_checkpoint,
    metric_by_epoch,
    metric_history,
    read_file,
    search_runs,
)
from stn_pipeline.tracking.runs import (
    CHAMPION,
    CHILD_OF,
    Run,
    adopt_run,
    close_orphans,
    closing,
    create_run,
    disown_run,
    environment,
    open_run,
)
from stn_pipeline.tracking.where import experiment_id, is_on_disk, knock, reachable, settings, settle, store

__all__ = [
    "CHAMPION",
    "CHILD_OF",
    "Run",
    "RunRecord",
    "adopt_run",
    "check_resumable",
    "close_orphans",
    "closing",
    "create_run",
    "disown_run",
    "environment",
    "experiment_id",
    "filter_runs",
    "find_run",
    "in_a_hurry",
    "is_away",
    "is_on_disk",
    "knock",
    "load_checkpoint",
    "metric_by_epoch",
    "metric_history",
    "open_run",
    "reachable",
    "read_file",
    "search_runs",
    "settings",
    "settle",
    "store",
    "watched",
]
