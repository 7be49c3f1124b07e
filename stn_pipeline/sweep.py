"""Tune knobs with Optuna, across data sets: `python -m stn_pipeline.sweep sweeps/mnist.yaml`."""

from collections.abc import Sequence

from stn_pipeline import cli
from stn_pipeline.search import sweepfile
from stn_pipeline.search.sweepfile import SweepConfig

CONFIG_HELP = "the sweep file, such as sweeps/digits.yaml; each of its keys may be given as a flag instead"


def sweep(argv: Sequence[str]) -> None:
    """Sweep as the file and the flags say; the same command goes on where an earlier one stopped."""
    given = cli.parse(SweepConfig, argv, "Tune knobs of a training with Optuna.", {"config": CONFIG_HELP}, positional="config")
    config = sweepfile.read(given.pop("config"), given)

    # Only now: torch, MLflow and Optuna take seconds to import, and a bad file should not wait for them.
    from stn_pipeline.progress import JobsProgress
    from stn_pipeline.search.sweep import run

    with JobsProgress() as progress:
        run(config, progress.say, progress.watch)
    print("see it: mlflow server --no-serve-artifacts, then http://127.0.0.1:5000")


def main() -> None:
    """Run the entry point."""
    cli.run(sweep)


if __name__ == "__main__":
    main()
