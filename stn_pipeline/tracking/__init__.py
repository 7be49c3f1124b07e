"""MLflow, and nothing else imports it: where the runs are kept, a server that is away, runs written to and found again."""

from stn_pipeline.tracking.away import in_a_hurry, is_away, tell, watched
from stn_pipeline.tracking.found import (
    RunRecord,
    filter_runs,
    find_run,
    is_complete,
    load_checkpoint,
    metric_by_epoch,
    metric_history,
    only_trainer,
    read_file,
    resuming,
    search_runs,
)
from stn_pipeline.tracking.opening import (
    CHILD_OF,
    adopt_run,
    close_dead,
    close_opened,
    close_orphans,
    closing,
    create_run,
    disown_run,
    environment,
    open_run,
)
from stn_pipeline.tracking.runs import CHAMPION, Run
from stn_pipeline.tracking.text import escaped
from stn_pipeline.tracking.where import experiment_id, is_on_disk, knock, reachable, settings, settle, store

__all__ = [
    "CHAMPION",
    "CHILD_OF",
    "Run",
    "RunRecord",
    "adopt_run",
    "close_dead",
    "close_opened",
    "close_orphans",
    "closing",
    "create_run",
    "disown_run",
    "environment",
    "escaped",
    "experiment_id",
    "filter_runs",
    "find_run",
    "in_a_hurry",
    "is_away",
    "is_complete",
    "is_on_disk",
    "knock",
    "load_checkpoint",
    "metric_by_epoch",
    "metric_history",
    "only_trainer",
    "open_run",
    "reachable",
    "read_file",
    "resuming",
    "search_runs",
    "settings",
    "settle",
    "store",
    "tell",
    "watched",
]
