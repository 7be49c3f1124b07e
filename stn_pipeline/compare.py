"""Compare arms over paired seeds: `python -m stn_pipeline.compare sweeps/report.yaml`."""

import shlex
from collections.abc import Sequence

from stn_pipeline import cli
from stn_pipeline.comparing import comparefile
from stn_pipeline.comparing.comparefile import CompareConfig, ExistingConfig
from stn_pipeline.questions import from_flags
from stn_pipeline.search import tuning
from stn_pipeline.texts import say

CONFIG_HELP = "the comparison file, such as sweeps/report.yaml; each of its keys may be given as a flag instead"
EXISTING = "Compare runs that exist already, arm by arm over their seeds."


def compare(argv: Sequence[str]) -> None:
    """Compare as the file and the flags say, or what exists; the same command goes on where an earlier one stopped."""
    command = shlex.join(["python", "-m", "stn_pipeline.compare", *argv])
    if any(word.partition("=")[0] == "--runs" for word in argv):
        given = cli.parse(ExistingConfig, argv, EXISTING)
        asked = ExistingConfig.parse(from_flags(ExistingConfig, given) | {"by": given.get("by", "")} if "by" in given else given)
        from stn_pipeline.comparing.existing import compare_existing

        compare_existing(asked, say, command)
    else:
        options = {"config": CONFIG_HELP, "runs": f"instead of a file: {ExistingConfig.model_fields['runs'].description}"}
        given = cli.parse(CompareConfig, argv, "Compare arms over paired seeds.", options, positional="config")
        config = comparefile.read(given.pop("config"), given)
        tuning.sweeps_of(config)  # checked before anything starts, as all keys are

        # Only now: torch and MLflow take seconds to import, and a bad file should not wait for them.
        from stn_pipeline.comparing.compare import Tuned, run
        from stn_pipeline.progress import JobsProgress

        with JobsProgress() as progress:
            knobs = tuning.tune(config, progress.say, progress.watch)
        told = [tuning.in_a_line(config, block, knobs) for block in config.blocks()]
        with JobsProgress() as progress:
            run(config, progress.say, progress.watch, command, Tuned(knobs, told))
    print("see it: mlflow server --no-serve-artifacts, then http://127.0.0.1:5000")


def main() -> None:
    """Run the entry point."""
    cli.run(compare)


if __name__ == "__main__":
    main()
