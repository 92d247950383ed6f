"""Keeps the README's file map equal to the tree: writes it, or with `--check` says what differs.

A module's line is the first sentence of its docstring, and so is a package's; the line of any other file or folder is
whatever the map says already. A new one is refused until somebody writes in the map what it is for.
"""

import argparse
import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGES = ("assistant", "training", "serving", "ui")
BLOCK = re.compile(r"(^## The file map$.*?^```text\n)(.*?)(^```$)", re.MULTILINE | re.DOTALL)


def tracked_files(root: Path) -> list[str]:
    """What git keeps, less what was just deleted."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (root / name).exists()]


def entries_of_tree(files: list[str]) -> list[str]:
    """What the map lists: each top-level file and folder, and each folder and module of the packages; files first."""
    entries = set()
    for file in files:
        parts = file.split("/")
        entries.add(parts[0] if len(parts) == 1 else parts[0] + "/")
        if parts[0] in PACKAGES:
            entries.update("/".join(parts[:depth]) + "/" for depth in range(1, len(parts)))
            if file.endswith(".py") and parts[-1] != "__init__.py":
                entries.add(file)
    return sorted(entries, key=lambda entry: ("/" in entry, entry))


def read_map(block: str) -> dict[str, str]:
    """The map's entries and what each is for; a path ends at the first space."""
    lines = (line.strip().partition(" ") for line in block.splitlines() if line.strip())
    return {path: job.strip() for path, _, job in lines}


def first_sentence(module: Path) -> str:
    """The first line of a module's docstring without its full stop; empty where there is none."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) if module.exists() else None
    return docstring.splitlines()[0].rstrip(".") if docstring else ""


def job_of(root: Path, entry: str, written: dict[str, str]) -> str:
    """The entry's own words where it is a module or a package, else what the map says of it already."""
    own = ""
    if entry.startswith(tuple(f"{package}/" for package in PACKAGES)):
        own = first_sentence(root / entry / "__init__.py" if entry.endswith("/") else root / entry)
    return own or written.get(entry, "")


def differences(written: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What keeps the map from being right, a line each."""
    found = [f"lists {path}, which is not there" for path in written.keys() - wanted.keys()]
    found += [f"lacks {path}" for path in wanted.keys() - written.keys()]
    found += [f"does not say what {path} is for" for path, job in wanted.items() if not job]
    found += [
        f"says of {path}: {written[path]!r}, where {job!r} is meant"
        for path, job in wanted.items()
        if job and path in written and written[path] != job
    ]
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 when the map is not right")
    parser.add_argument("--root", type=Path, default=Path(__file__).resolve().parent.parent, help="the checkout")
    arguments = parser.parse_args()
    readme: Path = arguments.root / "README.md"
    text = readme.read_text(encoding="utf-8")
    block = BLOCK.search(text)
    if block is None:
        sys.exit("README.md has no fenced block of `text` under the heading '## The file map'.")
    written = read_map(block[2])
    wanted = {entry: job_of(arguments.root, entry, written) for entry in entries_of_tree(tracked_files(arguments.root))}
    if not arguments.check:
        width = max(map(len, wanted)) + 2
        lines = "".join(f"{entry:<{width}}{job}".rstrip() + "\n" for entry, job in wanted.items())
        readme.write_text(text[: block.start(2)] + lines + text[block.end(2) :], encoding="utf-8")
        written = wanted
    for difference in (found := differences(written, wanted)):
        print(f"README.md's file map {difference}")
    if found and arguments.check:
        print("scripts/file_map.py writes it anew.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
