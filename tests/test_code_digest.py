"""The digest of code is of what it means: it outlives moves, renames, layout and words, and no change of what is computed.

Laws are held on the package's own code, copied: what is covered is what its trainings use.
"""

import ast
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import stn_pipeline
from stn_pipeline.training.code_digest import IMPORTS, Definition, Module, Package, _bound, cpp_tokens, digest
from stn_pipeline.training.fingerprint import ROOTS, code_version

PACKAGE = Path(stn_pipeline.__file__).parent
NAMES = [Definition(root.__module__, root.__qualname__) for root in ROOTS]
CPP = sorted(PACKAGE.rglob("*.cpp"))
SHARED = Package(PACKAGE)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package somewhere else, to be changed."""
    return Path(shutil.copytree(PACKAGE, tmp_path / "stn_pipeline", ignore=shutil.ignore_patterns("__pycache__")))


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text, old
    path.write_text(text.replace(old, new))


def everywhere(package: Path, old: str, new: str) -> None:
    for path in package.rglob("*.py"):
        path.write_text(re.sub(old, new, path.read_text()))


def covered(package: Path) -> list[Path]:
    """Return the files that trainings use."""
    modules = [SHARED.module(name) for name in {one.module for one in SHARED.reached(NAMES)}]
    return [package / module.path.relative_to(PACKAGE) for module in modules if module is not None]


# What changes nothing


def test_where_the_package_lies_is_nothing(copy):
    assert digest(copy, NAMES) == digest(PACKAGE, NAMES) == code_version()


class Reworded(ast.NodeTransformer):
    """Other docstrings and annotations."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:  # noqa: N802
        self.generic_visit(node)
        node.returns = None
        for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            each.annotation = ast.Constant("anything")
        node.body = [ast.Expr(ast.Constant("Another docstring.")), *node.body]
        return node


def test_layout_comments_docstrings_and_annotations_are_nothing(copy):
    for path in covered(copy):
        tree = ast.fix_missing_locations(Reworded().visit(ast.parse(path.read_text())))
        path.write_text(f"'''A text.'''\n\n\n# A comment.\n{ast.unparse(tree)}\n")  # the comments are gone, and each line is another
    assert digest(copy, NAMES) == code_version()


def test_the_order_of_definitions_and_imports_in_a_file_is_nothing(copy):
    for path in covered(copy):
        body = ast.parse(path.read_text()).body
        bound = [name for node in body if not isinstance(node, IMPORTS) for name in _bound([node], Module("", path))]
        if len(bound) == len(set(bound)):  # what is bound twice is bound in an order
            path.write_text("\n".join(ast.unparse(node) for node in reversed(body)))
    assert digest(copy, NAMES) == code_version()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("data.folder", "data.pictures"),  # its user says folder.read
        ("training.step", "training.one_step"),
        ("compiler", "native_code"),
        ("transforms.sampler", "model.sampling"),
        ("model.layers", "layers"),
    ],
)
def test_a_file_that_is_moved_or_renamed_is_nothing(copy, old, new):
    was, now = (copy / f"{name.replace('.', '/')}.py" for name in (old, new))
    was.rename(now)
    everywhere(copy, rf"from stn_pipeline\.{re.escape(old)} import", f"from stn_pipeline.{new} import")
    everywhere(copy, rf"from stn_pipeline\.data import {was.stem}, ", f"from stn_pipeline.data import {now.stem} as folder, ")
    assert digest(copy, NAMES) == code_version()
    now.unlink()
    assert digest(copy, NAMES) != code_version()


def test_a_definition_that_goes_to_another_file_is_nothing(copy):
    source = (copy / "training/step.py").read_text()
    tree = ast.parse(source)
    (moved,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "lr_factor")
    text = ast.get_source_segment(source, moved)
    assert text is not None
    edit(copy / "training/step.py", text, "")
    edit(copy / "training/step.py", "import math\n", "import math\n\nfrom stn_pipeline.training.schedule import lr_factor\n")
    (copy / "training/schedule.py").write_text(f"from math import cos, pi\n\n\n{text.replace('math.', '')}\n")  # imported another way
    assert digest(copy, NAMES) == code_version()


def test_what_no_training_uses_is_nothing(copy):
    edit(copy / "config.py", "    lr: float = knob(", "    new: int = knob(3, help='new')\n    lr: float = knob(")
    edit(copy / "training/device.py", " threads", " of the threads")
    (copy / "training/unused.py").write_text("RATE = 3\n")
    (copy / "tracking/runs.py").unlink()
    assert digest(copy, NAMES) == code_version()


# What changes it


OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mod, ast.Mod: ast.Div, ast.Pow: ast.Mult,
    ast.MatMult: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.BitXor: ast.BitOr, ast.LShift: ast.RShift,
    ast.And: ast.Or, ast.Or: ast.And, ast.USub: ast.UAdd, ast.Not: ast.UAdd, ast.UAdd: ast.USub, ast.Invert: ast.USub,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip


def mutations(node: ast.AST) -> Iterator[tuple[ast.AST, str, Any]]:
    """Yield each change of one place in a syntax tree, as (where, field, value): numbers, texts, operators, names of calls, statements."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for index, each in enumerate(value if isinstance(value, list) else [value]):
            if isinstance(each, ast.expr_context) or not isinstance(each, ast.AST):
                continue

            def put(new: Any, name: str = name, value: Any = value, index: int = index) -> tuple[ast.AST, str, Any]:
                return node, name, [*value[:index], new, *value[index + 1 :]] if isinstance(value, list) else new

            if isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant):
                continue
            if isinstance(each, ast.Constant):
                yield put(ast.Constant(2 * each.value + 1 if type(each.value) in (int, float) else f"{each.value}?"))
            elif type(each) in OPERATORS:
                yield put(OPERATORS[type(each)]())
            elif isinstance(each, ast.Call):
                yield put(ast.Call(ast.Name("another", ast.Load()), each.args, each.keywords))
                yield from (put(ast.Call(each.func, each.args[:i] + each.args[i + 1 :], each.keywords)) for i in range(len(each.args)))
            elif isinstance(each, ast.Attribute):
                yield put(ast.Attribute(each.value, "another", each.ctx))
            elif isinstance(each, ast.stmt) and not isinstance(each, ast.Import | ast.ImportFrom | ast.Pass):
                yield put(ast.Expr(ast.Call(ast.Name("another", ast.Load()), [], [])))
            yield from mutations(each)


def seen_changes(every: int) -> tuple[int, list[str]]:
    """Make every n-th change; return how many there are in all, and those that no definition's text shows."""
    n, unseen = 0, []
    for one, text in SHARED.reached(NAMES).items():
        for statement in definitions(one):
            for where, field, value in mutations(statement):
                n += 1
                if n % every == 0 and with_change(where, field, value, lambda one=one: SHARED.tokens(one)) == text:
                    unseen.append(f"{one}: {field} of {ast.unparse(where)}")
    return n, unseen


def definitions(one: Definition) -> list[ast.stmt]:
    module = SHARED.module(one.module)
    return [] if module is None or one.name == "*" else module.definitions[one.name]


def with_change(where: ast.AST, field: str, value: Any, look: Callable[[], Any]) -> Any:
    kept = getattr(where, field)
    setattr(where, field, value)
    try:
        return look()
    finally:
        setattr(where, field, kept)


@pytest.mark.parametrize("every", [40, pytest.param(1, marks=pytest.mark.slow)])
def test_a_change_of_what_is_computed_is_seen(every):
    """Each constant, operator, comparison, call, argument and statement of all that a training uses, changed by itself."""
    n, unseen = seen_changes(every)
    assert n > 5000 and unseen == []


def test_a_change_of_one_definition_is_another_digest():
    changeable = [one for one in sorted(SHARED.reached(NAMES)) if definitions(one)]
    before = set(SHARED.labels(NAMES).values())
    for one in changeable[:: len(changeable) // 8]:
        for change in list(mutations(definitions(one)[0]))[:1]:
            assert set(with_change(*change, lambda: SHARED.labels(NAMES)).values()) != before


def test_what_decides_what_is_learned_is_covered():
    names = {(one.module.removeprefix("stn_pipeline."), one.name) for one in SHARED.reached(NAMES)}
    assert names >= {
        ("data.splitting", "stratified"), ("data.splitting", "TEST_SEED"), ("data.sources", "digits"), ("data.folder", "read"),
        ("data.distortions", "_elastic"), ("transforms.diffeo", "exp_affine"), ("transforms.cpab", "flow"),
        ("transforms.sampler", "sample"),
        ("model.layers", "CoordConv2d"), ("model.network", "_initialise"), ("model.native", "_Stage"), ("training.fit", "fit"),
        ("training.step", "make_optimizer"), ("training.captured", "CapturedSteps"), ("training.scores", "score"),
        ("training.device", "arithmetic"), ("compiler", "FLAGS"), ("compiler", "_run"),
    }  # fmt: skip
    assert ("config", "TrainConfig") not in names  # knobs count by their values


def test_compile_flags_count(copy):
    edit(copy / "compiler.py", '"-O3"', '"-Ofast"')
    assert digest(copy, NAMES) != code_version()


@pytest.mark.parametrize("path", CPP, ids=lambda path: path.name)
def test_of_cpp_each_token_counts_and_no_comment(copy, path):
    source = path.read_text()
    tokens = cpp_tokens(source)
    assert len(tokens) > 300 and not any(token.startswith(("//", "/*")) for token in tokens)
    assert cpp_tokens(re.sub(r"//[^\n]*", "", source)) == tokens == cpp_tokens(source.replace("\n", "  // more\n/* and\nmore */\n"))
    here = copy / path.relative_to(PACKAGE)
    here.write_text(f"// told better\n{source}\n")
    assert digest(copy, NAMES) == code_version()
    for number, token in list(enumerate(tokens))[:: len(tokens) // 50]:
        assert cpp_tokens("".join([*_spaced(tokens[:number]), " another ", *_spaced(tokens[number + 1 :])])) != tokens, token
    here.write_text(source.replace("+=", "-=", 1))
    assert digest(copy, NAMES) != code_version()


def _spaced(tokens: tuple[str, ...]) -> list[str]:
    return [f"{token} " if token.isalnum() else token for token in tokens]


def test_of_cpp_spaces_count_where_they_mean_something():
    same = "#define F(x) (x)\nint a = 1'000 + b; // c"
    assert cpp_tokens(same) == cpp_tokens("#define F(x) (x) /* c */\n\nint  a=1'000\n+ b;")
    for other in (
        "#define F (x) (x)\nint a = 1'000 + b;",
        "#define F(x) (x) int a = 1'000 + b;",
        same.replace("+", "+ +"),
        same.replace("a", "a2"),
    ):
        assert cpp_tokens(other) != cpp_tokens(same)
    assert cpp_tokens('f("a  b // c")') == ("f", "(", '"a  b // c"', ")") != cpp_tokens('f("a b // c")')
    assert cpp_tokens("a + ++b") != cpp_tokens("a ++ + b") and cpp_tokens("#define A 1\\\n + 2\nx") == cpp_tokens("#define A 1 + 2\nx")
    assert cpp_tokens('R"(// no comment)" x') == ('R"(// no comment)"', "x")


# Names, followed


def package_of(tmp_path: Path, **modules: str) -> Path:
    package = tmp_path / "own"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    for name, text in modules.items():
        (package / f"{name}.py").write_text(text)
    return package


def of(tmp_path: Path, **modules: str) -> str:
    return digest(package_of(tmp_path, **modules), [Definition("own.a", "f")])


def test_of_two_that_have_one_name_it_counts_which_is_used(tmp_path):
    both = {"b": "def g(x): return h(x)\ndef h(x): return 1", "c": "def g(x): return h(x)\ndef h(x): return 2"}
    used = "def f(x): return g(x)"
    first, second = (of(tmp_path, a=f"from own.{name} import g\n{used}", **both) for name in "bc")
    spellings = (
        "from own import c\ndef f(x): return c.g(x)",
        "from . import c as d\ndef f(x): return d.g(x)",
        "import own.c\ndef f(x): return own.c.g(x)",
        "def f(x):\n    from .c import g as k\n    return k(x)",
    )
    assert first != second and {of(tmp_path, a=a, **both) for a in spellings} == {second}


def test_the_names_of_other_packages_count_whatever_they_are_called_here(tmp_path):
    sgd = of(tmp_path, a="from torch.optim import SGD as Rule\ndef f(x): return Rule(x)")
    assert sgd == of(tmp_path, a="import torch\ndef f(x): return torch.optim.SGD(x)")
    assert sgd != of(tmp_path, a="from torch.optim import Adam as Rule\ndef f(x): return Rule(x)")


def test_a_variable_is_not_the_definition_of_its_name(tmp_path):
    text = "def f(g): return [g for g in range(3)] + [lambda g: g, g]"
    assert of(tmp_path, a=text) == of(tmp_path, a=f"{text}\ndef g(): return 1")
    used = "def f(x): return [g for g in x] + [g(x)]"  # the variable of a comprehension ends with it
    assert of(tmp_path, a=f"{used}\ndef g(x): return 1") != of(tmp_path, a=f"{used}\ndef g(x): return 2")


def test_what_a_module_does_when_it_is_imported_counts(tmp_path):
    a = "from own.b import TABLE\nimport own.c\ndef f(x): return TABLE[x]"
    b, c = "TABLE = {}", "from own.b import TABLE\ndef g(x): return 1\nTABLE.update(g=g)"
    assert of(tmp_path, a=a, b=b, c=c) != of(tmp_path, a=a, b=b, c=c.replace("return 1", "return 2"))
    assert of(tmp_path, a=a, b=f"{b}\nTABLE |= {{1: 2}}", c=c) != of(tmp_path, a=a, b=f"{b}\nTABLE |= {{1: 3}}", c=c)


def test_of_a_module_that_is_handed_on_everything_counts(tmp_path):
    a = "from own import b\ndef f(x): return getattr(b, x)"
    assert of(tmp_path, a=a, b="def g(x): return 1") != of(tmp_path, a=a, b="def g(x): return 2")


def test_definitions_that_use_each_other_in_a_circle_have_a_digest(tmp_path):
    text = "def f(x): return g(x)\ndef g(x): return f(x - 1)"
    assert of(tmp_path, a=text) != of(tmp_path, a=text.replace("1", "2"))


def test_a_root_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(LookupError, match=r"has no g in own\.a"):
        digest(package_of(tmp_path, a="def f(x): return 1"), [Definition("own.a", "g")])
