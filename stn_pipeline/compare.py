"""Compare arms over paired seeds: `python -m stn_pipeline.compare sweeps/report.yaml`."""

from collections.abc import Sequence

from stn_pipeline import cli
from stn_pipeline.comparing import comparefile
from stn_pipeline.comparing.comparefile import CompareConfig

CONFIG_HELP = "the comparison file, such as sweeps/report.yaml; each of its keys may be given as a flag instead"


def compare(argv: Sequence[str]) -> None:
    """Compare as the file and the flags say; the same command goes on where an earlier one stopped."""
    given = cli.parse(CompareConfig, argv, "Compare arms over paired seeds.", {"config": CONFIG_HELP}, positional="config")
    config = comparefile.read(given.pop("config"), given)

    # Only now: torch and MLflow take seconds to import, and a bad file should not wait for them.
    from stn_pipeline.comparing.compare import run
    from stn_pipeline.progress import JobsProgress

    with JobsProgress() as progress:
        run(config, progress.say, progress.watch)
    print("see it: mlflow server --no-serve-artifacts, then http://127.0.0.1:5000")


def main() -> None:
    """Run the entry point."""
    cli.run(compare)


if __name__ == "__main__":
    main()
