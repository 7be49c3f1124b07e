"""How soon does a sweep find as good a network as the one people write: `python -m stn_pipeline.bench_sweep sweeps/mnist.yaml`.

The plain way is Optuna's loop, one trial at a time, no pruning, the report's training loop and network. Both sweeps have the
same data, search space, number of trials and epochs; each is timed from its call, ours with the start of its workers.
"""

import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from stn_pipeline import cli
from stn_pipeline.errors import ConfigError
from stn_pipeline.search import sweepfile
from stn_pipeline.search.sweepfile import SweepConfig

OPTIONS = {
    "config": "a sweep file with one data set; its keys may be given as flags",
    "loader_workers": "DataLoader workers of the report's loop (default 0)",
    "out": "file for the figures as JSON; none by default",
}


def seconds_to(target: float, heard: Sequence[tuple[float, float]]) -> float:
    """Return when a value first came down to the target; infinite where it never did."""
    return next((seconds for seconds, value in heard if value <= target), float("inf"))


def bench_sweep(argv: Sequence[str]) -> None:
    """Time both sweeps, print the ratio and, where asked, write JSON."""
    given = cli.parse(SweepConfig, argv, "Time a sweep against the plain way.", OPTIONS, positional="config")
    out, workers = given.pop("out", ""), int(given.pop("loader_workers", "0"))
    config = sweepfile.read(given.pop("config"), given | {"final": "0"})
    if len(config.datasets) > 1 or config.objective != "val/loss" or not config.trials:
        raise ConfigError("bench_sweep: needs one data set, objective val/loss and a number of trials")
    if out and not Path(out).parent.is_dir():
        raise ConfigError(f"out={out}: no folder {Path(out).parent}: make it first")
    out = str(Path(out).resolve())

    import torch

    from stn_pipeline.benching.reference import report_epochs, report_loader
    from stn_pipeline.data import load
    from stn_pipeline.model.layers import ARCHS
    from stn_pipeline.search.plain import plain_sweep
    from stn_pipeline.training.device import describe, resolve

    train_config = config.config(config.datasets[0])
    device = resolve(train_config.device)
    splits = load(train_config, device)
    if min(splits.image_shape[1:]) < (least := ARCHS["report"].unpadded_side):
        raise ConfigError(f"dataset={splits.dataset}: the report's network needs images of {least} px a side: give a sweep of mnist")

    def report_way(params: dict[str, Any]) -> Iterator[float]:
        knobs = train_config.model_copy(update=params)
        val = report_loader(splits, splits.val, 1000, workers, shuffle=False)
        for network in report_epochs(splits, knobs.batch_size, workers, knobs.lr):
            network.eval()
            with torch.no_grad():
                losses = [torch.nn.functional.nll_loss(network(x.to(device)), y.to(device), reduction="sum").item() for x, y in val]
            yield sum(losses) / len(splits.val)

    torch.manual_seed(config.seed)
    ours = _ours(config, train_config.data_dir)
    plain = plain_sweep(config, train_config.epochs, report_way)
    told: dict[str, list[tuple[float, float]]] = {"ours": ours, "plain": plain}
    best = {name: min(value for _, value in heard) for name, heard in told.items()}
    target = max(best.values())
    reached = {name: seconds_to(target, heard) for name, heard in told.items()}
    whole = {name: heard[-1][0] for name, heard in told.items()}
    print(
        f"{splits.dataset}, {config.trials} trials of at most {train_config.epochs} epochs, {describe(device)}, torch {torch.__version__}"
    )
    print(f"{'':<8}{'best val/loss':>14}{f'to {target:.4f}, s':>16}{'whole, s':>12}{'epochs':>8}")
    for name in told:
        print(f"{name:<8}{best[name]:>14.4f}{reached[name]:>16.1f}{whole[name]:>12.1f}{len(told[name]):>8}")
    ratio, whole_ratio = reached["plain"] / reached["ours"], whole["plain"] / whole["ours"]
    print(f"plain / ours: {ratio:.2f} to the same val/loss, {whole_ratio:.2f} for the whole sweep")
    if out and not Path(out).is_dir():
        curves = {
            name: list(zip([s for s, _ in heard], accumulate((v for _, v in heard), min), strict=True)) for name, heard in told.items()
        }
        machine = {"device": describe(device), "cores": os.cpu_count(), "torch": torch.__version__, "loader_workers": workers}
        asked = config.plain() | {"train": {knob: value for knob, value in config.train.items() if knob != "data_dir"}}
        figures = {"sweep": asked, "target": target, "seconds_to_target": reached, "whole_s": whole, "best": best}
        Path(out).write_text(json.dumps(machine | figures | {"seconds_and_best_so_far": curves}, indent=1) + "\n")


def _ours(config: SweepConfig, data_dir: str) -> list[tuple[float, float]]:
    """Return seconds since the call and validation loss after each epoch of our sweep, run in a folder of its own."""
    from stn_pipeline import tracking
    from stn_pipeline.search.sweep import run

    config = config.model_copy(update={"train": config.train | {"data_dir": str(Path(data_dir).resolve())}})
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            started = time.time()
            run(config, print, lambda searches: lambda: None)
            trials = tracking.search_runs({"study": config.name, "stage": "trial"})
            heard = [point for trial in trials for point in tracking.metric_history(trial.info.run_id, "val/loss")]
            return sorted((at - started, loss) for at, loss in heard)
        finally:
            os.chdir(here)


def main() -> None:
    """Run the entry point."""
    cli.run(bench_sweep)


if __name__ == "__main__":
    main()
