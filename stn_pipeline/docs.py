"""Write what is derived from the declarations: MLproject, conda.yaml and the table of docs/knobs.md.

`python -m stn_pipeline.docs` writes them anew; a test fails when one is stale.
"""

import tomllib
from pathlib import Path

from pydantic.fields import FieldInfo

from stn_pipeline.config import EvalConfig, Knobs, TrainConfig, choices_of, default_of, unit_of

ROOT = Path(__file__).parent.parent
KNOBS = "docs/knobs.md"
TABLE_START, TABLE_END = "<!-- knobs: python -m stn_pipeline.docs -->\n", "<!-- end of knobs -->"

MLPROJECT = """\
# Written by `python -m stn_pipeline.docs` from stn_pipeline/config.py; a test holds it to that.
# `dataset` works as -P dataset=NAME but is not declared: MLflow would log its default before the program could say
# which set auto has really become.
name: stn_pipeline
conda_env: conda.yaml
entry_points:
"""

QUESTIONS = """\
  # Any other key of the file works as -P KEY=VALUE too, and then goes before the file's own.
  sweep:
    parameters:
      config: {type: string, default: "sweeps/digits.yaml"}
    command: python -m stn_pipeline.sweep --config {config}
  compare:
    parameters:
      config: {type: string, default: "sweeps/arms.yaml"}
    command: python -m stn_pipeline.compare --config {config}
"""

CONDA = """\
# Written by `python -m stn_pipeline.docs` from pyproject.toml; a test holds it to that.
name: stn-pipeline
channels: [conda-forge]
dependencies:
  - python=3.11
  - pip
  - pip:
"""


def mlproject() -> str:
    """Return the text of MLproject."""
    return MLPROJECT + _entry_point("main", "train", TrainConfig) + _entry_point("eval", "evaluate", EvalConfig) + QUESTIONS


def _entry_point(name: str, module: str, knobs: type[Knobs]) -> str:
    declared = {knob: field for knob, field in knobs.model_fields.items() if knob != "dataset"}
    lines = [f"  {name}:", "    parameters:"]
    for knob, field in declared.items():
        default = "" if field.is_required() else f', default: "{field.default}"'
        lines.append(f"      {knob}: {{type: string{default}}}")
    flags = " ".join(f"--{knob} {{{knob}}}" for knob in declared)
    return "\n".join([*lines, f"    command: python -m stn_pipeline.{module} {flags}"]) + "\n"


def conda() -> str:
    """Return the text of conda.yaml."""
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    return CONDA + "".join(f'      - "{requirement}"\n' for requirement in requirements)


def knob_table() -> str:
    """Return the table of knobs."""
    fields = TrainConfig.model_fields.items()
    rows = [f"| `{name}` | {default_of(field)} | {_values(field)} | {field.description} |" for name, field in fields]
    return "\n".join(["| knob | default | values | what it is |", "|---|---|---|---|", *rows]) + "\n"


def _values(field: FieldInfo) -> str:
    if choices := choices_of(field):
        return ", ".join(choices)
    signs = {"Gt": ("gt", "> "), "Ge": ("ge", "≥ "), "Lt": ("lt", "< "), "Le": ("le", "≤ ")}
    bounds = [f"{signs[kind][1]}{getattr(rule, signs[kind][0])}" for rule in field.metadata if (kind := type(rule).__name__) in signs]
    return ", ".join(bounds) + (f" {unit_of(field)}" if unit_of(field) else "")


def knobs_page() -> str:
    """Return docs/knobs.md with its table written anew."""
    text = (ROOT / KNOBS).read_text()
    before, _, rest = text.partition(TABLE_START)
    return before + TABLE_START + knob_table() + TABLE_END + rest.partition(TABLE_END)[2]


def main() -> None:
    """Write the three files."""
    for name, content in {"MLproject": mlproject(), "conda.yaml": conda(), KNOBS: knobs_page()}.items():
        (ROOT / name).write_text(content)


if __name__ == "__main__":
    main()
