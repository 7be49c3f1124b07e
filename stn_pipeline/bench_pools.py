"""What a trial costs beside its own training, here and on a Ray cluster: `python -m stn_pipeline.bench_pools --ray auto`.

A real study, real runs in an MLflow store of their own, real workers; only the training is a sleep of fixed length. Workers are
warm before they are timed. The places take turns, so that a drifting machine slows both.
"""

import json
from collections.abc import Sequence
from statistics import median
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BeforeValidator

from stn_pipeline import cli
from stn_pipeline.config import Knobs, knob
from stn_pipeline.paths import for_output
from stn_pipeline.questions import names


class BenchPoolsConfig(Knobs):
    """One table of overheads."""

    workers: Annotated[tuple[int, ...], BeforeValidator(names)] = knob((1, 2, 4, 8), help="numbers of workers, each in turn")
    trials: int = knob(5, help="timed trials for each worker", ge=1, le=10_000)
    repeats: int = knob(3, help="times that all is done", ge=1, le=10_000)
    ray: str = knob("", help="Ray cluster to time too: auto, or HOST:PORT; it needs a core for each worker")
    out: str = knob("", help="file for the figures as JSON, with the picture beside it as .png; none by default")


def bench_pools(argv: Sequence[str]) -> None:
    """Time as the flags say, print a table and, where asked, write JSON and a picture."""
    knobs = BenchPoolsConfig.parse(cli.parse(BenchPoolsConfig, argv, "Time what a trial costs beside its training."))
    out = for_output("out", knobs.out).resolve() if knobs.out else None

    import torch

    from stn_pipeline.benching.machine import machine
    from stn_pipeline.benching.pictures import pools_picture
    from stn_pipeline.benching.pools import EPOCH_S, EPOCHS, Taken, drive_sleepers
    from stn_pipeline.tracking import store

    trial_s = EPOCHS * EPOCH_S
    places = ["here", *(["Ray"] if knobs.ray else [])]
    taken: dict[tuple[str, int], list[Taken]] = {(place, n): [] for place in places for n in knobs.workers}
    for repeat in range(knobs.repeats):
        for n in knobs.workers:
            for place in places:
                taken[place, n].append(drive_sleepers(knobs.ray if place == "Ray" else "", n, n * knobs.trials))
                print(f"repeat {repeat + 1}: {place}, {n} workers: {taken[place, n][-1].wall_s:.2f} s", flush=True)
    rows: list[dict[str, Any]] = [
        {
            "place": place,
            "workers": n,
            "trials": n * knobs.trials,
            "wall_s": [round(one.wall_s, 3) for one in times],
            "trials_per_hour": [round(3600 * n * knobs.trials / one.wall_s, 1) for one in times],
            "overhead_s": [round(one.wall_s / knobs.trials - trial_s, 4) for one in times],
            "driver_ms_a_trial": [round(1e3 * one.driver_s / (n * knobs.trials), 2) for one in times],
        }
        for (place, n), times in taken.items()
    ]
    print(f"{'':<8}{'workers':>8}{'trials/h':>10}{'overhead, worker-s a trial':>28}{'of the driver, ms a trial':>28}")
    for row in rows:
        overhead, driver = (
            f"{median(row[what]):.2f} ({min(row[what]):.2f} to {max(row[what]):.2f})" for what in ("overhead_s", "driver_ms_a_trial")
        )
        print(f"{row['place']:<8}{row['workers']:>8}{median(row['trials_per_hour']):>10.0f}{overhead:>28}{driver:>28}")
    if out is not None:
        about = machine(torch.device("cpu")) | {"trial_s": trial_s, "epochs": EPOCHS, "store": urlsplit(store()).scheme}
        out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
        title = f"Trials of {trial_s:g} s and {EPOCHS} epochs on {about['cores']} cores ({about['processor']})"
        out.with_suffix(".png").write_bytes(pools_picture(rows, trial_s, title))


def main() -> None:
    """Run the entry point."""
    cli.run(bench_pools)


if __name__ == "__main__":
    main()
