"""The package's source as the tests of its architecture read it: modules, trees, imports."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import flyweight

ROOT = Path(flyweight.__path__[0])
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of the package."""

    name: str
    """Dotted, below flyweight: "search.study"; a package has its folder's name, the root ""."""
    path: Path
    tree: ast.Module

    @property
    def folder(self) -> str:
        """The folder that it is in, or "" at the top."""
        parts = self.path.relative_to(ROOT).parts
        return parts[0] if len(parts) > 1 else ""

    @property
    def place(self) -> str:
        """Its path, to show."""
        return str(self.path.relative_to(ROOT))


@functools.cache
def modules() -> Mapping[str, Module]:
    """All modules of the package by name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = Module(name, path, ast.parse(path.read_text(), str(path)))
    return found


def imports(module: Module) -> Iterator[tuple[str, int]]:
    """The modules of the package that a module imports, anywhere in it, by name, with the line."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "flyweight":
                    yield alias.name.partition(".")[2], node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.place}:{node.lineno} imports relatively"
            if node.module and node.module.split(".")[0] == "flyweight":
                base = node.module.partition(".")[2]
                for alias in node.names:
                    inner = f"{base}.{alias.name}" if base else alias.name
                    yield (inner if inner in modules() else base), node.lineno


def outside(module: Module, *, top: bool) -> Iterator[tuple[str, int]]:
    """The root packages that a module imports from outside; `top`: only where importing the module imports them."""
    nodes = module.tree.body if top else ast.walk(module.tree)
    for node in nodes:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        yield from ((name.split(".")[0], node.lineno) for name in names)


def functions(module: Module) -> Iterator[tuple[Function, bool]]:
    """Every function, with whether it is public: neither it nor what it is in begins with an underscore or is a function."""
    yield from _functions(module.tree, not module.path.stem.startswith("_") or module.path.stem == "__init__")


def _functions(node: ast.AST, public: bool) -> Iterator[tuple[Function, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function):
            open_here = public and not child.name.startswith("_")
            yield child, open_here
            yield from _functions(child, False)
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, public and not child.name.startswith("_"))
        else:
            yield from _functions(child, public)
