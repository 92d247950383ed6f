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
COMMAND_LINE = "ui/command_line.py"
# Which of our packages a package may import besides itself. The command line alone may import every one, and late.
MAY_IMPORT = {"assistant": set[str](), "training": {"assistant"}, "serving": {"assistant"}, "ui": {"assistant"}}
# vLLM comes from one of two distributions (extras cpu and cuda), so no name in the dependencies matches it.
FROM_EXTRAS = {"vllm", "bitsandbytes"}


@dataclass(frozen=True)
class Import:
    """One import: the top-level name, the line, and whether it waits until a function is called."""

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
        yield from _imports_below(child, late or is_function)


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
        if path == COMMAND_LINE:
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


def tracked_files() -> list[str]:
    """What git keeps, less what was just deleted."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout, so nothing says which files are ours")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).exists()]


def map_of_tree(files: list[str]) -> set[str]:
    """What the README's map must list: each top-level file and folder, and each folder and module of the packages."""
    entries = set()
    for file in files:
        parts = file.split("/")
        entries.add(parts[0] if len(parts) == 1 else parts[0] + "/")
        if parts[0] in PACKAGES:
            entries.update("/".join(parts[:depth]) + "/" for depth in range(1, len(parts)))
            if file.endswith(".py") and parts[-1] != "__init__.py":
                entries.add(file)
    return entries


def map_of_readme(readme: str) -> dict[str, str]:
    """The map's entries and their one-line jobs: the fenced block under the heading "The file map"."""
    block = re.search(r"^## The file map$.*?^```text\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert block, "README.md has no fenced block of `text` under the heading '## The file map'"
    entries: dict[str, str] = {}
    for line in filter(str.strip, block[1].splitlines()):
        path, _, job = line.strip().partition(" ")
        assert path not in entries, f"README.md's file map lists {path} twice"
        entries[path] = job.strip()
    return entries


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
        ("ui/command_line.py", "class A:\n    import training"),
    ],
)
def test_an_import_against_the_rules_is_found(path: str, source: str) -> None:
    assert len(broken_import_rules(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("ui/command_line.py", "def train():\n    from training import recipe"),
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
    if path.partition("/")[0] not in PACKAGES:
        declared += project["dependency-groups"]["dev"]
    names = {distribution_name(line) for line in declared}
    installed = importlib.metadata.packages_distributions()
    folder = (ROOT / path).parent
    undeclared = {
        found.name
        for found in imports_of((ROOT / path).read_text())
        if found.name not in sys.stdlib_module_names | FROM_EXTRAS | {*PACKAGES, "tests", "scripts"}
        and not (folder / f"{found.name}.py").exists()
        and not names & {distribution_name(owner) for owner in installed.get(found.name, [])}
    }
    assert undeclared == set(), f"{path} imports what pyproject.toml does not declare"


def test_the_readme_maps_the_tree() -> None:
    entries, tree = map_of_readme((ROOT / "README.md").read_text()), map_of_tree(tracked_files())
    missing, stale = sorted(tree - entries.keys()), sorted(entries.keys() - tree)
    assert not missing, f"README.md's file map lacks {missing}"
    assert not stale, f"README.md's file map lists what is not there: {stale}"
    unsaid = sorted(path for path, job in entries.items() if not job)
    assert not unsaid, f"README.md's file map does not say what these are for: {unsaid}"


def test_the_map_of_a_tree() -> None:
    tree = ["Makefile", "docs/a/b.md", "ui/__init__.py", "ui/browser/chat.py", "ui/browser/examples/a.png"]
    assert map_of_tree(tree) == {
        "Makefile",
        "docs/",
        "ui/",
        "ui/browser/",
        "ui/browser/chat.py",
        "ui/browser/examples/",
    }


def test_the_lock_follows_pyproject() -> None:
    """Set-up installs what the lock says and does not look at pyproject.toml: a forgotten `uv lock` would go unseen."""
    uv = shutil.which(ROOT / ".uv" / "bin" / "uv") or shutil.which("uv")
    if uv is None:
        pytest.skip("no uv at hand; `make test` brings one")
    checked = subprocess.run([uv, "lock", "--check", "--offline"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, f"uv.lock does not fit pyproject.toml; run `uv lock`.\n{checked.stderr}"
