"""Which test process gets which tests: those of one file together, and those of all files that use one engine."""

import re
from functools import cache
from pathlib import Path

from xdist.scheduler import LoadFileScheduling

ROOT = Path(__file__).resolve().parent.parent
# The fixtures of the session that start an engine, as tests ask for them; the first that a file names counts.
ENGINES = {
    "joey": re.compile(r"\bjoey_(engine|gateway)\b"),
    "tiny": re.compile(r"\b(engine: LocalEngine|gateway: httpx\.Client)\b"),
}


class EngineScheduling(LoadFileScheduling):
    """So that each engine starts once and not once in every process: half a minute of a core, and 3 GB."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid.split("::", 1)[0])


@cache
def group_of(file: str) -> str:
    """The name of the engine that tests in `file` (a path in the checkout) use, or the file itself."""
    text = (ROOT / file).read_text(encoding="utf-8")
    return next((name for name, named in ENGINES.items() if named.search(text)), file)
