"""A digest of what code means: of the syntax trees of everything that some functions and classes use, and of nothing else.

It stays where files or folders are moved or renamed, where a definition goes to another file, where imports are written
another way, and where comments, docstrings, annotations or the layout change. It changes with every literal, operator,
name and statement of a definition that is used, in Python and in C++, wherever in the package that stands.

It follows names. What is only reached by a computed name, as through getattr(module, name), is not seen.
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

MEANINGLESS = {"annotation", "returns", "ctx", "kind", "type_comment", "type_params"}  # fields of a syntax tree that change nothing
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
NAMES = (ast.Name, ast.Attribute)
IMPORTS = (ast.Import, ast.ImportFrom)
CPP_SUFFIXES = (".cpp", ".h", ".hpp")


class Definition(NamedTuple):
    """A top-level name of a module of the package; "*" is what the module does when it is imported, apart from definitions."""

    module: str
    name: str


class Imported(NamedTuple):
    """What an import binds: a name of a module, or the module itself where the name is empty."""

    module: str
    name: str


Scope = Mapping[str, Imported | None]  # what a function binds; None: a variable
Token = str | Definition


def digest(package: Path, roots: Iterable[Definition]) -> str:
    """Return a digest of the meaning of these definitions and of all that they use, 12 hexadecimal digits.

    package: folder of the package; only its own code is read, other packages count by the names that are used of them.
    Raises: LookupError for a root that is not there.
    """
    labels = Package(package).labels(roots)
    return _hash(sorted(set(labels.values())))[:12]


class Package:
    """The modules of a package as syntax trees, each read when it is first asked for."""

    def __init__(self, root: Path):
        self.root = root
        self._modules: dict[str, Module | None] = {}

    def module(self, dotted: str) -> "Module | None":
        """Return a module of the package by its dotted name, or None where there is no such file."""
        if dotted not in self._modules:
            self._modules[dotted] = None
            first, *rest = dotted.split(".")
            stem = self.root.joinpath(*rest)
            paths = [path for path in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")) if path.is_file()]
            if first == self.root.name and paths:
                self._modules[dotted] = Module(dotted, paths[0])
        return self._modules[dotted]

    def labels(self, roots: Iterable[Definition]) -> dict[Definition, str]:
        """Return a digest of each definition that the roots reach, in which each name it uses counts by its own digest.

        Names can be used in circles. So digests are of the bare text first, then of the text with the digests of the round
        before, until a round tells no more definitions apart (colour refinement, Weisfeiler & Leman 1968).
        """
        tokens = self.reached(roots)
        labels = {one: _hash(token if isinstance(token, str) else token.name for token in each) for one, each in tokens.items()}
        while True:
            n_before = len(set(labels.values()))
            labels = {one: _hash(token if isinstance(token, str) else labels[token] for token in each) for one, each in tokens.items()}
            if len(set(labels.values())) == n_before:
                return {one: label for one, label in labels.items() if tokens[one]}

    def reached(self, roots: Iterable[Definition]) -> dict[Definition, list[Token]]:
        """Return the text of each definition that the roots reach, as tokens."""
        found: dict[Definition, list[Token]] = {}
        todo = [self._found(root) for root in roots]
        while todo:
            one = todo.pop()
            if one not in found:
                found[one] = self.tokens(one)
                todo += [token for token in found[one] if isinstance(token, Definition)]
                todo += [Definition(module, "*") for module in (one.module, *self._imports(one))]
        return found

    def tokens(self, one: Definition) -> list[Token]:
        """Return the text of a definition as tokens; a token that is a Definition stands for a use of that one."""
        module = self.module(one.module)
        if module is None:
            return []
        reader = _Reader(self, module)
        reader.tokens += [] if one.name == "*" else [one.name]
        for statement in module.actions if one.name == "*" else module.definitions.get(one.name, []):
            reader.read(statement)
        return reader.tokens

    def find(self, dotted: str, name: str) -> Definition | str:
        """Return the definition that a module's name stands for, through imports; else the dotted name of what it is."""
        module = self.module(dotted)
        if module is not None and name in module.definitions:
            return Definition(dotted, name)
        if module is not None and name in module.imports and module.imports[name] != (dotted, name):
            imported = module.imports[name]
            return self.find(*imported) if imported.name else imported.module
        return f"{dotted}.{name}"

    def _found(self, root: Definition) -> Definition:
        found = self.find(*root)
        if isinstance(found, str):
            raise LookupError(f"{self.root}: has no {root.name} in {root.module}")
        return found

    def _imports(self, one: Definition) -> list[str]:
        """Return the modules that importing the definition's module imports, its parents first."""
        module = self.module(one.module)
        if module is None or one.name != "*":
            return []
        return [name for name in (one.module.rpartition(".")[0], *module.imported_modules) if self.module(name) is not None]


class Module:
    """A module's top level: the statements that bind each name, the imports, and the statements that bind nothing.

    Where one name is bound by several statements, all of them define it.
    """

    def __init__(self, dotted: str, path: Path):
        self.dotted, self.path = dotted, path
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, Imported] = {}
        self.imported_modules: list[str] = []
        self.actions: list[ast.stmt] = []
        for statement in _meant(ast.parse(path.read_bytes()).body):
            if isinstance(statement, ast.If) and ast.unparse(statement.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                continue
            if isinstance(statement, IMPORTS):
                bound = self.imported(statement)
                self.imports |= bound
                self.imported_modules += [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
                self.imported_modules += [name for each in bound.values() for name in (each.module, f"{each.module}.{each.name}")]
                continue
            names = _bound([statement], self)
            for name in names:
                self.definitions.setdefault(name, []).append(statement)
            if not names:
                self.actions.append(statement)

    def binds(self, name: str) -> bool:
        """Say whether a name is one of this module's own."""
        return name in self.definitions or name in self.imports

    def imported(self, statement: ast.Import | ast.ImportFrom) -> dict[str, Imported]:
        """Return what an import in this module binds."""
        if isinstance(statement, ast.Import):
            pairs = [(alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2 for alias in statement.names]
            return {name: Imported(module, "") for name, module in pairs}
        origin = statement.module or ""
        if statement.level:
            package = self.dotted.split(".") if self.path.name == "__init__.py" else self.dotted.split(".")[:-1]
            origin = ".".join([*package[: len(package) - statement.level + 1], *filter(None, [origin])])
        return {alias.asname or alias.name: Imported(origin, alias.name) for alias in statement.names}


class _Reader:
    """Reads a top-level statement of a module as tokens."""

    def __init__(self, package: Package, module: Module):
        self.package, self.module = package, module
        self.tokens: list[Token] = []

    def read(self, node: object, scopes: tuple[Scope, ...] = (), *, in_class: bool = False) -> None:
        """Append the tokens of a syntax tree, or of a part of one.

        scopes: of the functions around it, the innermost last.   in_class: it stands in a class body.
        """
        if isinstance(node, list):
            self.tokens.append("[")
            for each in _meant(node):
                self.read(each, scopes, in_class=in_class)
            self.tokens.append("]")
        elif not isinstance(node, ast.AST):
            self.tokens.append(f"{type(node).__name__} {node!r}")
        elif isinstance(node, NAMES) and (meant := self._resolve(node, scopes)) is not None:
            self._use(meant)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (source := self._cpp(node.value)) is not None:
            self.tokens.append(source)
        elif isinstance(node, ast.AnnAssign) and not in_class:  # without its annotation it is an assignment
            self.read(ast.Assign([node.target], node.value) if node.value else [], scopes)
        elif isinstance(node, IMPORTS):  # in a function it counts where what it binds is used
            self.tokens += [] if scopes else [self.package.find(*each) for each in self.module.imported(node).values()]
        else:
            self._read_fields(node, scopes, in_class)

    def _read_fields(self, node: ast.AST, scopes: tuple[Scope, ...], in_class: bool) -> None:
        """Read each field in the scope that it belongs to: defaults, decorators and bases belong to the scope around."""
        inner = scopes
        if isinstance(node, FUNCTIONS):
            body = node.body if isinstance(node.body, list) else [node.body]
            inner = (*scopes, _arguments(node.args) | _bound(body, self.module))
        elif isinstance(node, COMPREHENSIONS):
            scopes = inner = (*scopes, _bound([each.target for each in node.generators], self.module))
        body_in_class = isinstance(node, ast.ClassDef) or (in_class and isinstance(node, ast.If))
        self.tokens.append(f"{type(node).__name__}(")
        for name in node._fields:
            value = getattr(node, name, None)
            if name not in MEANINGLESS and value is not None and value != []:
                self.tokens.append(name)
                if name in ("body", "orelse"):
                    self.read(value, inner, in_class=body_in_class)
                else:
                    self.read(value, scopes)
        self.tokens.append(")")

    def _resolve(self, node: ast.Name | ast.Attribute, scopes: tuple[Scope, ...]) -> Token | None:
        """Return what a name stands for: a definition, or another package's dotted name; None: a variable or a builtin."""
        if isinstance(node, ast.Name):
            scope = next((scope for scope in reversed(scopes) if node.id in scope), None)
            if scope is None:
                return self.package.find(self.module.dotted, node.id) if self.module.binds(node.id) else None
            imported = scope[node.id]
            return None if imported is None else self.package.find(*imported) if imported.name else imported.module
        owner = self._resolve(node.value, scopes) if isinstance(node.value, NAMES) else None
        return self.package.find(owner, node.attr) if isinstance(owner, str) else None

    def _use(self, meant: Token) -> None:
        """Append what is used with a name: of a module that is handed on as a whole, all that it defines."""
        module = self.package.module(meant) if isinstance(meant, str) else None
        whole = [] if module is None else [Definition(module.dotted, name) for name in sorted(module.definitions)]
        self.tokens += [meant] if module is None else ["module", *whole]

    def _cpp(self, name: str) -> str | None:
        """Return what a C++ source beside this module says, where that is what a text names."""
        path = self.module.path.with_name(name) if name.endswith(CPP_SUFFIXES) and "/" not in name else None
        return _hash(cpp_tokens(path.read_text())) if path is not None and path.is_file() else None


def _meant(nodes: list[ast.stmt]) -> list[ast.stmt]:
    """Return the statements that do something: no docstrings, no `pass`; imports count where what they bind is used."""
    return [
        node for node in nodes if not (isinstance(node, ast.Pass) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)))
    ]


def _arguments(arguments: ast.arguments) -> dict[str, Imported | None]:
    return {node.arg: None for node in ast.walk(arguments) if isinstance(node, ast.arg)}


def _bound(nodes: Iterable[ast.AST], module: Module) -> dict[str, Imported | None]:
    """Return the names that statements or targets bind in their own scope."""
    bound: dict[str, Imported | None] = {}
    outside: set[str] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if isinstance(node, IMPORTS):
            bound |= module.imported(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound[node.name] = None
        elif isinstance(node, (ast.Lambda, *COMPREHENSIONS)):
            bound |= {inner.target.id: None for inner in ast.walk(node) if isinstance(inner, ast.NamedExpr)}
        elif isinstance(node, ast.Global | ast.Nonlocal):
            outside |= set(node.names)
        else:
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
                bound[node.id] = None
            name = getattr(node, "rest", None) if isinstance(node, ast.MatchMapping) else getattr(node, "name", None)
            if isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar | ast.MatchMapping) and name:
                bound[name] = None
            todo += ast.iter_child_nodes(node)
    return {name: imported for name, imported in bound.items() if name not in outside}


_CPP = re.compile(
    r"""(?P<gap> \s+ | //[^\n]* | /\*.*?\*/ )
    | R"(?P<mark>[^()\\\s]*)\(.*?\)(?P=mark)" | "(?:\\.|[^"\\\n])*" | \.?\d(?:[eEpP][+-]|'?[\w.])* | '(?:\\.|[^'\\\n])+' | [^\W\d]\w*
    | <<=|>>=|->\*|\.\.\.|::|\+\+|--|->|[-+*/%&|^=<>!]=|&&|\|\||<<|>>|\#\# | .""",
    re.VERBOSE | re.DOTALL,
)


@cache
def cpp_tokens(source: str) -> tuple[str, ...]:
    """Return a C++ source as its preprocessor's tokens: without comments, and spaces only where a directive needs them."""
    tokens: list[str] = []
    in_directive, starts_line, gap = False, True, False
    for match in _CPP.finditer(source.replace("\\\n", "")):
        text = match[0]
        if match["gap"]:
            gap = True
            if text.isspace() and "\n" in text:
                tokens += ["\n"] * in_directive
                in_directive, starts_line = False, True
            continue
        if text == "#" and starts_line:
            in_directive, gap = True, False
        tokens += [" "] * (in_directive and gap)
        tokens.append(text)
        starts_line, gap = False, False
    return tuple(tokens)


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
