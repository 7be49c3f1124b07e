"""The house stands: a file imports only from its own floor or below, and the core runs without MLflow and Optuna."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import ROOT

FLOORS = (  # from the ground up; names on one floor may import each other
    {"texts", "errors", "paths", "yamlfile", "config", "interrupts", "locks", "streams", "questions", "compiler"},
    {"transforms"},
    {"data"},
    {"model"},
    {"training"},
    {"figures"},
    {"tracking"},
    {"jobs"},
    {"comparing"},
    {"search"},
    {"benching"},
    {"cli", "progress", "docs", "bench", "train", "evaluate", "sweep", "compare", "gallery", "bench_sweep", "bench_warps", "bench_pools"},
)
ONLY_IN = {"mlflow": {"tracking"}, "matplotlib": {"figures"}, "optuna": {"search"}, "ray": {"jobs"}}


def imports(source: str) -> set[str]:
    """Return every module named in an import statement, wherever it stands."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def floor(name: str) -> int:
    return next(level for level, names in enumerate(FLOORS) if name in names)


def breaches(room: str, source: str) -> list[str]:
    """Return what a file of a room imports against the rules."""
    bad = []
    for module in sorted(imports(source)):
        top, *rest = module.split(".")
        known = rest and any(rest[0] in names for names in FLOORS)
        if top == "stn_pipeline" and known and floor(rest[0]) > floor(room):
            bad.append(f"{room} imports {rest[0]}, a floor above")
        if top in ONLY_IN and room not in ONLY_IN[top]:
            bad.append(f"{room} imports {top}, which belongs to {', '.join(ONLY_IN[top])}")
    return bad


def rooms() -> list[tuple[str, Path]]:
    package = ROOT / "stn_pipeline"
    return [
        (path.relative_to(package).parts[0].removesuffix(".py"), path)
        for path in package.rglob("*.py")
        if path.parent != package or path.stem != "__init__"
    ]


def test_every_file_imports_only_from_its_floor_or_below():
    assert [breach for room, path in rooms() for breach in breaches(room, path.read_text())] == []


@pytest.mark.parametrize(
    ("room", "line", "breach"),
    [
        ("transforms", "from stn_pipeline.model import build", "transforms imports model, a floor above"),
        ("training", "def f():\n    from stn_pipeline import tracking", "training imports tracking, a floor above"),
        ("jobs", "import mlflow.pytorch", "jobs imports mlflow, which belongs to tracking"),
        ("model", "import matplotlib.pyplot as plt", "model imports matplotlib, which belongs to figures"),
    ],
)
def test_the_rule_sees_a_breach(room, line, breach):
    assert breaches(room, line) == [breach]


def test_every_room_has_a_floor():
    assert {room for room, _ in rooms()} <= set().union(*FLOORS)


CORE = "import stn_pipeline.training, stn_pipeline.figures; from stn_pipeline import SpatialTransformer"
LOADED = "import sys; print(*sorted({'mlflow', 'optuna'} & set(sys.modules)))"


@pytest.mark.parametrize(("code", "loaded"), [(CORE, ""), (f"{CORE}; import stn_pipeline.tracking", "mlflow")])
def test_the_core_loads_neither_mlflow_nor_optuna(code, loaded):
    done = subprocess.run([sys.executable, "-c", f"{code}; {LOADED}"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == loaded


def test_help_and_bad_flags_load_no_torch():
    code = (
        "import stn_pipeline.train, stn_pipeline.evaluate, stn_pipeline.sweep, stn_pipeline.compare, sys; "
        "print(*sorted({'torch', 'mlflow', 'optuna', 'sklearn', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_only_the_sampler_and_the_lattice_know_the_coordinate_convention():
    knows = {path.name for _, path in rooms() if "align_corners" in path.read_text()}
    assert knows == {"sampler.py", "lattice.py", "reference.py"}  # reference.py: the report's network, an independent definition


def test_what_is_no_python_goes_into_the_package_too():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = ROOT / "stn_pipeline"
    others = {path.relative_to(ROOT) for path in package.rglob("*.*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == {Path(room.replace(".", "/")) / name for room, names in declared.items() for name in names}


def raw_prints(source: str) -> list[int]:
    """Return the lines that print, or hand on print for, what may hold a name or a path of somebody's."""
    tree = ast.parse(source)
    printed = [
        node.func for node in ast.walk(tree) if isinstance(node, ast.Call) and all(isinstance(arg, ast.Constant) for arg in node.args)
    ]
    return sorted(node.lineno for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "print" and node not in printed)


def test_every_message_that_holds_a_name_goes_through_the_one_function():
    own_numbers = {"texts.py", "progress.py"}  # that function itself; a line of numbers an epoch
    found = {path.name: raw_prints(path.read_text()) for _, path in rooms() if path.name not in own_numbers and "bench" not in path.stem}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert raw_prints("print('a')\nprint(f'{a}')\nload(announce=print)\ndef f(say=print): ...") == [2, 3, 4]
