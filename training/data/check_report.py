"""Say what a check of conversation data found as plain values, for programs to read."""

from collections.abc import Sequence
from typing import Any

from training.data.data_check import Check, Finding


def report_of(checks: Sequence[Check], model: str, strict: bool) -> dict[str, Any]:
    """The checks as JSON holds them; `stops` says whether training would stop."""
    return {
        "model": model,
        "stops": any(check.stops(strict) for check in checks),
        "sources": [_source(check, strict) for check in checks],
    }


def _source(check: Check, strict: bool) -> dict[str, Any]:
    return {
        "name": check.name,
        "form": check.form,
        "kind": check.kind,
        "stops": check.stops(strict),
        "rows": check.rows,
        "taught": len(check.good),
        "pictures": check.pictures,
        "tokens": sum(check.lengths),
        "learned_tokens": check.supervised,
        "findings": [_finding(finding) for finding in check.findings],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    fault = finding.fault
    return {
        "row": finding.row,
        "place": finding.place,
        "field": fault.field,
        "kind": fault.kind,
        "refuses": fault.refuses,
        "wrong": fault.wrong,
        "way_out": fault.way_out,
    }
