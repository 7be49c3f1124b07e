"""What a trial costs beside its own training, here and on a Ray cluster: `python -m stn_pipeline.bench_pools --ray auto`.

A real study, real runs in an MLflow store of their own, real workers; only the training is a sleep of fixed length. Workers are
warm before they are timed. The places take turns, so that a drifting machine slows both.
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from stn_pipeline import cli
from stn_pipeline.config import Knobs, knob
from stn_pipeline.errors import ConfigError
from stn_pipeline.questions import names

if TYPE_CHECKING:
    pass

EPOCHS = 5


class BenchPoolsConfig(Knobs):
    """One table of overheads."""

    workers: Annotated[tuple[int, ...], BeforeValidator(names)] = knob((1, 2, 4, 8), help="numbers of workers, each in turn")
    trials: int = knob(5, help="timed trials for each worker", ge=1)
    repeats: int = knob(3, help="times that all is done", ge=1)
    ray: str = knob("", help="Ray cluster to time too: auto, or HOST:PORT; it needs a core for each worker")
    out: str = knob("", help="file for the figures as JSON, with the picture beside it as .png; none by default")


def bench_pools(argv: Sequence[str]) -> None:
    """Time as the flags say, print a table and, where asked, write JSON and a picture."""
    knobs = BenchPoolsConfig.parse(cli.parse(BenchPoolsConfig, argv, "Time what a trial costs beside its training."))
    if knobs.out and not Path(knobs.out).parent.is_dir():
        raise ConfigError(f"out={knobs.out}: no folder {Path(knobs.out).parent}: make it first")
    out = Path(knobs.out).resolve() if knobs.out else None

    import torch

    from stn_pipeline.benching.machine import machine
    from stn_pipeline.benching.pictures import pools_picture
    from stn_pipeline.benching.sleeper import EPOCH_S

    trial_s = EPOCHS * EPOCH_S
    places = ["here", *(["Ray"] if knobs.ray else [])]
    walls: dict[tuple[str, int], list[float]] = {(place, n): [] for place in places for n in knobs.workers}
    for repeat in range(knobs.repeats):
        for n in knobs.workers:
            for place in places:
                walls[place, n].append(_time(knobs.ray if place == "Ray" else "", n, n * knobs.trials))
                print(f"repeat {repeat + 1}: {place}, {n} workers: {walls[place, n][-1]:.2f} s", flush=True)
    rows: list[dict[str, Any]] = [
        {
            "place": place,
            "workers": n,
            "trials": n * knobs.trials,
            "wall_s": [round(wall, 3) for wall in taken],
            "trials_per_hour": [round(3600 * n * knobs.trials / wall, 1) for wall in taken],
            "overhead_s": [round(wall / knobs.trials - trial_s, 4) for wall in taken],
        }
        for (place, n), taken in walls.items()
    ]
    print(f"{'':<8}{'workers':>8}{'trials/h':>10}{'overhead, worker-s a trial':>28}")
    for row in rows:
        low, high = min(row["overhead_s"]), max(row["overhead_s"])
        overhead = f"{median(row['overhead_s']):.2f} ({low:.2f} to {high:.2f})"
        print(f"{row['place']:<8}{row['workers']:>8}{median(row['trials_per_hour']):>10.0f}{overhead:>28}")
    if out is not None:
        about = machine(torch.device("cpu")) | {"trial_s": trial_s, "epochs": EPOCHS}
        out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
        title = f"Trials of {trial_s:g} s and {EPOCHS} epochs on {about['cores']} cores ({about['processor']})"
        out.with_suffix(".png").write_bytes(pools_picture(rows, trial_s, title))


def _time(ray: str, n_workers: int, n_trials: int) -> float:
    """Return the seconds that a study of so many trials takes warm workers, from its first start to its last end."""
    from stn_pipeline.benching.sleeper import Sleeper
    from stn_pipeline.jobs import place
    from stn_pipeline.questions import Question

    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.chdir(folder)
        stack.callback(os.chdir, here)
        asked = Question.parse({"name": "bench", "workers": n_workers, "ray": ray})
        somewhere = stack.enter_context(place(asked, lambda line: None))
        pool = somewhere.pool(None, Sleeper)
        stack.callback(pool.close)
        while pool.n_free < n_workers:
            pool.wait(0.1)
        _drive("warm", n_workers, pool)
        return _drive("timed", n_trials, pool)


def _drive(name: str, n_trials: int, pool: Any) -> float:
    from stn_pipeline import tracking
    from stn_pipeline.jobs import drive
    from stn_pipeline.search.source import Search
    from stn_pipeline.search.study import Study
    from stn_pipeline.search.sweepfile import SweepConfig

    keys = {"name": name, "search": ["lr"], "datasets": "digits", "trials": n_trials, "pruner": "none", "final": 0}
    sweep = SweepConfig.parse(keys | {"train": {"epochs": EPOCHS}})
    experiment = tracking.experiment_id()
    parent = tracking.create_run(name, experiment, sweep, {})
    search = Search(Study("sqlite:///study.db", name, sweep, "digits", {}), parent, experiment, "digits", lambda line: None)
    started = time.perf_counter()
    drive(search, pool)
    return time.perf_counter() - started


def main() -> None:
    """Run the entry point."""
    cli.run(bench_pools)


if __name__ == "__main__":
    main()
