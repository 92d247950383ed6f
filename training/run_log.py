"""The log of a run: a line of JSON for each thing that was noted, in a file that outlives the run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]  # `step`, and what was noted then


class RunLog:
    """Appends lines to a file; what a kill left of a line is taken off first. One process alone may append."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._mended = False

    def append(self, line: Line) -> None:
        """Write `line`, which has a `step`."""
        if not self._mended:
            self._take_off_cut_line()
        with self.file.open("a") as sink:
            sink.write(json.dumps(line) + "\n")

    def lines(self, up_to: int) -> list[Line]:
        """What was noted until step `up_to`, oldest first."""
        if not self.file.is_file():
            return []
        self._take_off_cut_line()
        lines = [json.loads(text) for text in self.file.read_text().splitlines()]
        return [line for line in lines if line["step"] <= up_to]

    def _take_off_cut_line(self) -> None:
        self._mended = True
        content = self.file.read_bytes() if self.file.is_file() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.file.open("r+b") as opened:
                opened.truncate(whole)


def series(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of `name`, by step; of a step that was run again after a stop the newest value."""
    values = {line["step"]: float(line[name]) for line in lines if name in line}
    steps = sorted(values)
    return steps, [values[step] for step in steps]
