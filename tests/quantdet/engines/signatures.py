"""What vLLM takes as engine arguments, read off its sources with `ast`: names and types. No vllm is imported.

vLLM converts and checks its arguments late, in the engine's process and one at a time. Here their annotations say, before
anything starts, what each of them may be as JSON has it. What cannot be resolved (a type built while vLLM is imported) is
`anything`: it is left to vLLM.
"""

import ast
import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Kind = Literal["null", "boolean", "integer", "number", "text", "list", "object"]

_PLAIN: dict[str, tuple[Kind, ...]] = {
    "bool": ("boolean",), "int": ("integer",), "float": ("integer", "number"), "str": ("text",), "None": ("null",),
    "Path": ("text",), "PathLike": ("text",),
    **dict.fromkeys(("list", "List", "tuple", "Tuple", "set", "Set", "frozenset", "Sequence", "Iterable"), ("list",)),
    **dict.fromkeys(("dict", "Dict", "Mapping"), ("object",)),
}  # fmt: skip
_ANYTHING = ("Any", "object")
# What cannot be written as JSON: beside another type it adds nothing.
_UNWRITABLE = ("type", "Type", "Callable")
_INNER = ("Annotated", "Final", "Required", "NotRequired")
_DEEPEST = 16


@dataclass(frozen=True)
class Type:
    """What an argument may be.

    Attributes:
        kinds: JSON types; "number" is one with a fraction.
        choices: values of a `Literal`, allowed beside `kinds`.
        names: members of an `Enum`, allowed in capitals or not.
        items: of the elements of a list; None: not said.
        anything: its annotation could not be resolved, or allows everything.
    """

    kinds: frozenset[Kind] = frozenset()
    choices: tuple[Any, ...] = ()
    names: tuple[str, ...] = ()
    items: "Type | None" = None
    anything: bool = False

    def __or__(self, other: "Type") -> "Type":
        items = [one.items for one in (self, other) if "list" in one.kinds]
        said = [one for one in items if one is not None]
        return Type(
            self.kinds | other.kinds,
            tuple(dict.fromkeys((*self.choices, *other.choices))),
            tuple(dict.fromkeys((*self.names, *other.names))),
            functools.reduce(Type.__or__, said) if said and len(said) == len(items) else None,
            self.anything or other.anything,
        )

    @property
    def empty(self) -> bool:
        """Nothing that could be written as JSON."""
        return not (self.kinds or self.choices or self.names or self.anything)


ANYTHING = Type(anything=True)


@dataclass
class _Module:
    """The top level of a module: what its names are assigned, its classes, and where other names come from."""

    name: str
    package: str
    values: dict[str, ast.expr] = field(default_factory=dict)
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)

    def read(self, body: list[ast.stmt]) -> None:
        """Of a name given twice the first counts: types for checkers come before what stands for them at run time."""
        for node in body:
            if isinstance(node, ast.ClassDef):
                self.classes.setdefault(node.name, node)
            elif isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                self.values.setdefault(node.targets[0].id, node.value)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
                self.values.setdefault(node.target.id, node.value)
            elif isinstance(node, ast.ImportFrom):
                above = self.package.split(".")[: len(self.package.split(".")) - node.level + 1] if node.level else []
                source = ".".join(filter(None, (*above, node.module)))
                for alias in node.names:
                    self.imports.setdefault(alias.asname or alias.name, (source, alias.name))
            elif isinstance(node, ast.If | ast.Try):
                self.read(node.body)
                self.read(node.orelse)


class Sources:
    """The modules of an installed package, parsed when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._modules: dict[str, _Module | None] = {}

    def module(self, name: str) -> _Module | None:
        """`name` begins with the package's; None: no such module, or none that this Python can parse."""
        if name not in self._modules:
            path = self._folder.joinpath(*name.split(".")[1:])
            package = path.is_dir()
            path = path / "__init__.py" if package else path.with_name(f"{path.name}.py")
            found = None
            with contextlib.suppress(OSError, ValueError, SyntaxError, RecursionError):
                tree = ast.parse(path.read_text(encoding="utf-8"))
                found = _Module(name, name if package else name.rpartition(".")[0])
                found.read(tree.body)
            self._modules[name] = found
        return self._modules[name]

    def resolve(self, node: ast.expr, module: _Module, depth: int = 0) -> Type:
        """The type that an annotation of `module` stands for; `ANYTHING` where that cannot be read."""
        if depth > _DEEPEST:
            return ANYTHING
        if isinstance(node, ast.Constant):
            if node.value is None:
                return Type(frozenset({"null"}))
            with contextlib.suppress(SyntaxError, ValueError):  # a name that is written as text
                if isinstance(node.value, str):
                    return self.resolve(ast.parse(node.value, mode="eval").body, module, depth + 1)
            return ANYTHING
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
            return self.resolve(node.left, module, depth + 1) | self.resolve(node.right, module, depth + 1)
        if isinstance(node, ast.Subscript):
            return self._subscript(_last_name(node.value), node.slice, module, depth)
        name = _last_name(node)
        if name in _PLAIN:
            return Type(frozenset(_PLAIN[name]))
        if name in _UNWRITABLE:
            return Type()
        if not name or name in _ANYTHING:
            return ANYTHING
        return Type() if isinstance(node, ast.Attribute) else self._named(name, module, depth)

    def _subscript(self, name: str, inner: ast.expr, module: _Module, depth: int) -> Type:
        parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
        if name == "Literal":
            return self._literal(parts, module, depth)
        if name == "Optional":
            return self.resolve(inner, module, depth + 1) | Type(frozenset({"null"}))
        if name == "Union":
            return functools.reduce(Type.__or__, (self.resolve(part, module, depth + 1) for part in parts))
        if name in _INNER and parts:
            return self.resolve(parts[0], module, depth + 1)
        if name in ("list", "List", "set", "Set", "frozenset", "Sequence", "Iterable"):
            return Type(frozenset({"list"}), items=_closed(self.resolve(inner, module, depth + 1)))
        if name in _PLAIN:
            return Type(frozenset(_PLAIN[name]))
        return Type() if name in _UNWRITABLE else ANYTHING

    def _literal(self, parts: list[ast.expr], module: _Module, depth: int) -> Type:
        found = Type()
        for part in parts:
            if isinstance(part, ast.Constant):
                one = Type(frozenset({"null"})) if part.value is None else Type(choices=(part.value,))
            else:  # another Literal by its name, or a list or tuple of values
                listed = _listed(part, module)
                one = Type(choices=listed) if listed else self.resolve(part, module, depth + 1)
                if one.kinds or one.names or one.empty:
                    return ANYTHING
            found = found | one
        return found

    def _named(self, name: str, module: _Module, depth: int) -> Type:
        """A name of `module`: an alias, a class, or one that it imports."""
        if name in module.classes:
            return _of_class(module.classes[name])
        if name in module.imports:
            source, original = module.imports[name]
            if source.partition(".")[0] != module.name.partition(".")[0]:
                return Type()  # a class of another package: nothing that JSON has
            found = self.module(source)
            return ANYTHING if found is None else self._named(original, found, depth + 1) if depth < _DEEPEST else ANYTHING
        return self.resolve(module.values[name], module, depth + 1) if name in module.values else ANYTHING


def _last_name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _closed(found: Type) -> Type:
    return ANYTHING if found.empty else found


def _listed(node: ast.expr, module: _Module) -> tuple[Any, ...]:
    """The values of a list that is written out, here or under a name of `module`, as in `Literal[tuple(NAMES)]`."""
    if isinstance(node, ast.Starred):
        node = node.value
    if isinstance(node, ast.Call) and _last_name(node.func) in ("tuple", "list") and len(node.args) == 1:
        node = node.args[0]
    if isinstance(node, ast.Name):
        node = module.values.get(node.id, node)
    if isinstance(node, ast.List | ast.Tuple):
        values = tuple(part.value for part in node.elts if isinstance(part, ast.Constant))
        return values if len(values) == len(node.elts) else ()
    return ()


def _of_class(node: ast.ClassDef) -> Type:
    """Members of an enumeration; any other class of vLLM is made of an object."""
    bases = [_last_name(base) for base in node.bases]
    if not any(base.endswith("Enum") for base in bases):
        return Type(frozenset({"object"}))
    members = {
        statement.targets[0].id: statement.value.value if isinstance(statement.value, ast.Constant) else None
        for statement in node.body
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name)
    }
    if "IntEnum" in bases:
        return Type(choices=tuple(value for value in members.values() if isinstance(value, int)))
    return Type(names=tuple(members))


class Known(Mapping[str, Type]):
    """The engine arguments of an installed vLLM by name, each with its type, which is resolved when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read what `EngineArgs` has and what `LLM.__init__` takes by itself; `folder`: of the package.

        Raises:
            ValueError: `EngineArgs` is not where it was in every version so far.
        """
        self._sources = Sources(folder)
        self._found: dict[str, list[tuple[ast.expr, _Module]]] = {}
        self._types: dict[str, Type] = {}
        engine = self._sources.module("vllm.engine.arg_utils")
        if engine is None or "EngineArgs" not in engine.classes:
            raise ValueError(f"no class EngineArgs in engine/arg_utils.py of {folder}")
        for node in engine.classes["EngineArgs"].body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not _internal(node):
                self._found.setdefault(node.target.id, []).append((node.annotation, engine))
        offline = self._sources.module("vllm.entrypoints.llm")
        for argument in _parameters(offline):
            if argument.annotation is not None and offline is not None:
                self._found.setdefault(argument.arg, []).append((argument.annotation, offline))

    def __getitem__(self, name: str) -> Type:
        if name not in self._types:
            # `LLM` converts some of what it hands on: what either of the two takes is taken.
            found = [self._sources.resolve(node, module) for node, module in self._found[name]]
            self._types[name] = _closed(functools.reduce(Type.__or__, found))
        return self._types[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _internal(node: ast.AnnAssign) -> bool:
    """A field that vLLM sets itself, or a class variable."""
    name = node.target.id if isinstance(node.target, ast.Name) else ""
    kind = node.annotation.value if isinstance(node.annotation, ast.Subscript) else node.annotation
    return name.startswith("_") or _last_name(kind) == "ClassVar"


def _parameters(module: _Module | None) -> list[ast.arg]:
    """What `LLM.__init__` takes by name."""
    body = module.classes["LLM"].body if module is not None and "LLM" in module.classes else []
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            return [*node.args.args[1:], *node.args.kwonlyargs]
    return []


def package_folder() -> Path | None:
    """The folder of the installed vllm; None: there is none. It is found without being imported."""
    with contextlib.suppress(ImportError, ValueError):  # a module without a spec
        spec = find_spec("vllm")
        for place in (spec.submodule_search_locations or ()) if spec is not None else ():
            return Path(place)
    return None


@functools.lru_cache(maxsize=4)
def known_arguments(folder: Path | None = None) -> Known | None:
    """Those of the vLLM in `folder`, of the installed one by default.

    None where there is none, or one that keeps them elsewhere: its arguments are then left to it.
    """
    folder = package_folder() if folder is None else folder
    try:
        return None if folder is None else Known(folder)
    except ValueError:
        return None
