"""The rules of the house that can be counted: sizes, docstrings, papers, public names, and words that must not appear."""

from __future__ import annotations

import ast
import re
import statistics
from types import ModuleType

import pytest
from architecture.source import Module, functions, modules

import flyweight

MODULE_LINES, FUNCTION_LINES, ARGUMENTS, NAMES = 400, 60, 7, 25
TYPICAL_FUNCTION, TYPICAL_MODULE = 9, 150
METHOD_FOLDERS = ("transforms", "codes", "roundings")
PAPER = re.compile(r"arXiv|https?://doi\.org|(?:et al|&|[A-Z][a-z]+)[^.]*\(?.*\b(?:19|20)\d\d\)")
EVERY_MODULE = pytest.mark.parametrize("module", modules().values(), ids=lambda module: module.place)


def lines(node: ast.AST) -> int:
    """Lines of a function without its docstring and decorators."""
    body = node.body  # type: ignore[attr-defined]
    documented = ast.get_docstring(node) is not None  # type: ignore[arg-type]
    text = body[0].end_lineno - body[0].lineno + 1 if documented else 0
    return node.end_lineno - node.lineno + 1 - text  # type: ignore[attr-defined]


@EVERY_MODULE
def test_a_module_is_small_and_says_what_it_is_for(module: Module) -> None:
    assert len(module.path.read_text().splitlines()) <= MODULE_LINES
    assert ast.get_docstring(module.tree)


@EVERY_MODULE
def test_functions_are_small_and_take_few_arguments(module: Module) -> None:
    for function, _ in functions(module):
        place = f"{module.place}:{function.lineno} {function.name}"
        given = function.args
        names = [one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        assert lines(function) <= FUNCTION_LINES, place
        assert len([name for name in names if name not in ("self", "cls")]) <= ARGUMENTS, place


@EVERY_MODULE
def test_public_functions_say_what_they_do_and_name_their_arguments(module: Module) -> None:
    for function, public in functions(module):
        if not public:
            continue
        place = f"{module.place}:{function.lineno} {function.name}"
        dunder = function.name.startswith("__")
        assert dunder or ast.get_docstring(function), place
        assert function.args.kwarg is None or dunder or function.name == "forward", place
        assert function.returns is not None, place


@EVERY_MODULE
def test_what_must_not_be_is_not_there(module: Module) -> None:
    assert [f"{module.place}: {word}" for node in ast.walk(module.tree) for word in forbidden(node)] == []


def forbidden(node: ast.AST) -> list[str]:
    """What a node does that the package never does."""
    if isinstance(node, ast.Assert):
        return [f"assert in line {node.lineno}"]
    if isinstance(node, ast.Import | ast.ImportFrom):
        roots = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        return [
            root
            for root in roots
            if root.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "joblib", "yaml")
        ]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        defaults = [*node.args.defaults, *(one for one in node.args.kw_defaults if one)]
        return ["mutable default" for one in defaults if isinstance(one, ast.List | ast.Dict | ast.Set)]
    if isinstance(node, ast.ExceptHandler) and node.type is None:
        return ["bare except"]
    if not isinstance(node, ast.Call):
        return []
    name = ast.unparse(node.func)
    words = {f"{one.arg}={ast.unparse(one.value)}" for one in node.keywords}
    found = sorted(words & {"weights_only=False", "allow_pickle=True", "shell=True"})
    if name == "torch.load" and "weights_only=True" not in words:
        found.append(name)
    return found + [name] * (name in ("eval", "exec", "compile", "yaml.load", "os.system"))


@pytest.mark.parametrize(
    "code",
    [
        "assert x", "import pickle", "from marshal import loads", "import yaml", "eval('1')", "exec(x)", "os.system(x)",
        "torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f, allow_pickle=True)", "def f(x=[]): ...",
        "try: ...\nexcept: ...", "subprocess.run(x, shell=True)",
    ],
)  # fmt: skip
def test_the_check_finds_what_must_not_be(code: str) -> None:
    assert [word for node in ast.walk(ast.parse(code)) for word in forbidden(node)]


def test_a_method_names_its_paper() -> None:
    methods = [
        m for m in modules().values() if m.folder in METHOD_FOLDERS and not m.path.stem.startswith("_")
    ]
    assert len(methods) >= 4
    for module in methods:
        assert PAPER.search(ast.get_docstring(module.tree) or ""), module.place


def test_a_docstring_without_a_paper_is_found() -> None:
    assert not PAPER.search("Rounds the weights. Fast, and simple.")
    assert PAPER.search("As in Frantar et al., GPTQ (arXiv 2210.17323, 2022).")
    assert PAPER.search('Agresti & Min, "On small-sample confidence intervals" (Biometrics 2005)')


def test_public_names_fit_one_screen() -> None:
    found = vars(flyweight).items()
    names = [name for name, value in found if not name.startswith("_") and not isinstance(value, ModuleType)]
    assert 5 <= len(names) <= NAMES, names


def test_the_typical_function_and_module_are_short() -> None:
    sizes = [lines(function) for module in modules().values() for function, _ in functions(module)]
    assert statistics.median(sizes) <= TYPICAL_FUNCTION
    assert (
        statistics.median(len(m.path.read_text().splitlines()) for m in modules().values()) <= TYPICAL_MODULE
    )
