"""The rules of the house: who imports whom, what a module says of itself, and that README, lock and code agree."""

import ast
import importlib.metadata
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("assistant", "training", "serving", "ui")
COMMAND_LINE = ("ui/command_line.py", "ui/commands/")
# Which of our packages a package may import besides itself. The command line alone may import every one, and late.
MAY_IMPORT = {"assistant": set[str](), "training": {"assistant"}, "serving": {"assistant"}, "ui": {"assistant"}}


@dataclass(frozen=True)
class Import:
    """One import: the top-level name, the line, and whether it waits for a function's call or a type checker."""

    name: str
    line: int
    late: bool


def imports_of(source: str) -> Iterator[Import]:
    """Every absolute import in the source, those by `importlib.import_module("...")` included."""
    yield from _imports_below(ast.parse(source), late=False)


def _imports_below(node: ast.AST, late: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        for name in _imported_names(child):
            yield Import(name.partition(".")[0], getattr(child, "lineno", 0), late)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports_below(child, late or is_function or _is_for_type_checkers(child))


def _is_for_type_checkers(node: ast.AST) -> bool:
    """Whether `node` is an `if TYPE_CHECKING:` with nothing else: what it imports is never imported by a program."""
    if not isinstance(node, ast.If) or not isinstance(node.test, ast.Name):
        return False
    return node.test.id == "TYPE_CHECKING" and not node.orelse


def _imported_names(node: ast.AST) -> list[str]:
    match node:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), level=0):
            return [module]
        case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
        case ast.Call(func=ast.Name(id="import_module" | "__import__"), args=[ast.Constant(value=str(name)), *_]):
            return [name]
    return []


def broken_import_rules(path: str, source: str) -> list[str]:
    """What the module at `path` (from the checkout's root) imports against the rules, one sentence each."""
    package = path.partition("/")[0]
    broken = []
    for found in imports_of(source):
        if found.name not in PACKAGES or found.name == package:
            continue
        if path.startswith(COMMAND_LINE):
            if not found.late:
                broken.append(f"{path}:{found.line} imports {found.name} at once; import it inside the function")
        elif found.name not in MAY_IMPORT[package]:
            broken.append(f"{path}:{found.line} imports {found.name}, which {package} must not")
    return broken


def docstring_fault(source: str) -> str | None:
    """What is wrong with a module's docstring, or None: its first line must be one whole sentence."""
    docstring = ast.get_docstring(ast.parse(source))
    if not docstring:
        return "has no docstring"
    first = docstring.splitlines()[0].strip()
    if not first.endswith((".", "?")):
        return f"opens with no whole sentence: {first!r}"
    if re.search(r"[.?!]\s+[A-Z]", first):
        return f"opens with more than one sentence: {first!r}"
    return None


def distribution_name(requirement: str) -> str:
    """`Typing_Extensions>=4` -> `typing-extensions`, as the index compares names."""
    found = re.match(r"[\w.-]+", requirement)
    assert found, f"pyproject.toml: {requirement!r} names no distribution"
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def our_modules(*folders: str) -> list[str]:
    """The Python files in these folders, as paths from the checkout's root."""
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))


def check_map(root: Path) -> subprocess.CompletedProcess[str]:
    """What the checker of the README's file map says of a checkout."""
    command = [sys.executable, str(ROOT / "scripts" / "file_map.py"), "--check", "--root", str(root)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("path", our_modules(*PACKAGES))
def test_imports_flow_one_way(path: str) -> None:
    assert broken_import_rules(path, (ROOT / path).read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("assistant/chat.py", "import training"),
        ("assistant/chat.py", "def f():\n    from serving.engine import Engine"),
        ("training/trainer.py", "from serving import gateway"),
        ("serving/jobs.py", "import os, training.trainer"),
        ("serving/jobs.py", "import importlib\nimportlib.import_module('ui.browser')"),
        ("ui/browser/chat.py", "async def f():\n    import serving.engine"),
        ("ui/browser/chat.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import training"),
        ("ui/command_line.py", "from assistant.answering import Assistant"),
        ("ui/commands/teaching.py", "class A:\n    import training"),
    ],
)
def test_an_import_against_the_rules_is_found(path: str, source: str) -> None:
    assert len(broken_import_rules(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ui/command_line.py", "def train():\n    from training import recipe"),
        ("ui/commands/teaching.py", "def tune():\n    from training import recipe"),
        ("ui/commands/serving.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import serving.doors"),
        ("ui/browser/chat.py", "from assistant.images import open_picture"),
        ("serving/gateway.py", "from serving.routes import chat\nfrom . import routes"),
        ("training/trainer.py", "import assistant.towers\nimport training_extras"),
    ],
)
def test_an_import_within_the_rules_passes(path: str, source: str) -> None:
    assert broken_import_rules(path, source) == []


@pytest.mark.parametrize("path", our_modules(*PACKAGES, "scripts", "tests"))
def test_a_module_opens_with_one_sentence(path: str) -> None:
    assert docstring_fault((ROOT / path).read_text()) is None


@pytest.mark.parametrize("source", ["x = 1", '"""No full stop\n\nMore."""', '"""Two. Sentences."""', "# A comment."])
def test_a_poor_docstring_is_found(source: str) -> None:
    assert docstring_fault(source)


@pytest.mark.parametrize("path", our_modules(*PACKAGES, "scripts", "tests"))
def test_a_library_that_is_imported_is_declared(path: str) -> None:
    """A library that only comes along with another one may go away with that one's next release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    declared = list(project["project"]["dependencies"])
    declared += [line for extra in project["project"]["optional-dependencies"].values() for line in extra]
    if path.partition("/")[0] not in PACKAGES:
        declared += project["dependency-groups"]["dev"]
    names = {distribution_name(line) for line in declared}
    installed = importlib.metadata.packages_distributions()
    folder = (ROOT / path).parent
    undeclared = {
        found.name
        for found in imports_of((ROOT / path).read_text())
        if found.name not in sys.stdlib_module_names | {*PACKAGES, "tests", "scripts"}
        and not (folder / f"{found.name}.py").exists()
        and not names & {distribution_name(owner) for owner in installed.get(found.name, [found.name])}
    }
    assert undeclared == set(), f"{path} imports what pyproject.toml does not declare"


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout: nothing says which files are ours")
def test_the_readme_maps_the_tree() -> None:
    checked = check_map(ROOT)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_a_wrong_map_is_found(tmp_path: Path) -> None:
    for name in ("ui/new.py", "ui/said.py", "docs/a.md", "Makefile"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('"""Does things."""\n')
    lines = ["Makefile the targets", "docs/", "gone.txt old", "ui/ the pages", "ui/said.py Does other things"]
    (tmp_path / "README.md").write_text("\n".join(["## The file map", "", "```text", *lines, "```", ""]))
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    checked = check_map(tmp_path)
    assert checked.returncode == 1
    assert checked.stdout.splitlines()[:-1] == [
        "README.md's file map does not say what README.md is for",
        "README.md's file map does not say what docs/ is for",
        "README.md's file map lacks README.md",
        "README.md's file map lacks ui/new.py",
        "README.md's file map lists gone.txt, which is not there",
        "README.md's file map says of ui/said.py: 'Does other things', where 'Does things' is meant",
    ]


def test_the_lock_follows_pyproject() -> None:
    """Set-up installs what the lock says and does not look at pyproject.toml: a forgotten `uv lock` would go unseen."""
    uv = shutil.which(ROOT / ".uv" / "bin" / "uv") or shutil.which("uv")
    if uv is None:
        pytest.skip("no uv at hand; `make test` brings one")
    checked = subprocess.run([uv, "lock", "--check", "--offline"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, f"uv.lock does not fit pyproject.toml; run `uv lock`.\n{checked.stderr}"
