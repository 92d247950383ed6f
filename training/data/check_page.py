"""Write what a check of conversation data found as one page that holds all it shows and runs no script."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from assistant.images import encode_data_url
from training.data.check_samples import Shown, thumbnail
from training.data.check_terminal import count_lines, notes, verdict_words
from training.data.conversations import PictureReference
from training.data.data_check import Check, Finding, histogram
from training.data.picture_references import PictureFinder

QUALITY = 85  # of the pictures, as JPEG
MOST_FINDINGS = 50  # of each kind that the page lists
STYLES = {"bold green": "good", "bold yellow": "warn", "bold red": "bad"}
# A page made of other people's words: nothing is fetched, and nothing runs, whatever they hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class Section:
    """One checked source with the rows of it that are shown."""

    check: Check
    samples: Sequence[Shown]
    finder: PictureFinder


def write_page(file: Path, sections: Sequence[Section], model: str, strict: bool) -> None:
    """Write the report into `file`. `model` is the one that the data was checked for."""
    css = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    title = "Data check: " + ", ".join(Path(section.check.name).name for section in sections)
    body = "".join(piece for section in sections for piece in _section(section, model, strict))
    file.write_text(
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_safe(title)}</title><style>\n{css}</style></head><body><main>{body}</main></body></html>\n",
        encoding="utf-8",
    )


def _section(section: Section, model: str, strict: bool) -> Iterator[str]:
    check = section.check
    said, style = verdict_words(check, strict)
    yield f"<h1>{_safe(Path(check.name).name)}</h1>"
    yield f'<p class="soft">{_safe(check.name)}, checked for the model {_safe(model)}</p>'
    yield f'<p class="verdict {STYLES[style]}" role="status">{_safe(said)}</p>'
    for note in notes(check):
        yield f'<p class="verdict warn">{_safe(note)}</p>'
    yield '<div class="tiles">'
    for count, what in count_lines(check):
        yield f'<div class="tile"><b>{_safe(count)}</b><span>{_safe(what.strip())}</span></div>'
    yield "</div>"
    if check.findings:
        yield "<h2>What is wrong</h2>"
        for kind, findings in check.by_kind().items():
            yield from _findings(kind, findings)
    if check.lengths:
        yield from _lengths(check)
    if section.samples:
        yield "<h2>Some rows, as the model reads them</h2>"
        yield '<p class="soft">Green words are learned; the others are only read.</p>'
        for shown in section.samples:
            yield from _sample(shown, section.finder)


def _findings(kind: str, findings: Sequence[Finding]) -> Iterator[str]:
    refuses = findings[0].fault.refuses
    rows = len({finding.row for finding in findings})
    style, fate = ("bad", "not taught") if refuses else ("warn", "taught all the same")
    yield f'<details><summary><span class="count {style}">{rows:,}</span><b>{_safe(kind)}</b>'
    yield f'<span class="soft">{fate}</span></summary>'
    for finding in findings[:MOST_FINDINGS]:
        fault = finding.fault
        yield f'<div class="finding"><b>{_safe(finding.place)}</b> <code>{_safe(fault.field)}</code>'
        yield f'<p>{_safe(fault.wrong)}</p><p class="soft">Way out: {_safe(fault.way_out)}</p></div>'
    if len(findings) > MOST_FINDINGS:
        yield f'<p class="soft finding">and {len(findings) - MOST_FINDINGS:,} more</p>'
    yield "</details>"


def _lengths(check: Check) -> Iterator[str]:
    bins = histogram(check)
    most = max(count for _, _, count in bins)
    yield f'<h2>Tokens of a row</h2><div class="chart"><p class="soft">At most {check.longest:,} are allowed.</p>'
    yield '<div class="bars">'
    for start, end, count in bins:
        width = (
            f'<div class="bar" style="width:{100 * count / most:.1f}%"></div>' if count else '<div class="none"></div>'
        )
        yield f'<span class="range">{start:,} to {end - 1:,}</span>{width}<span class="many">{count:,}</span>'
    yield "</div></div>"


def _sample(shown: Shown, finder: PictureFinder) -> Iterator[str]:
    seeing = " seeing" if shown.pictures else ""
    yield f'<section class="sample{seeing}"><header><b>{_safe(shown.place)}</b><span class="soft">'
    yield f"{shown.tokens:,} tokens, {shown.supervised:,} learned</span></header>"
    if shown.pictures:
        yield '<div class="thumbnails">'
        for number, reference in enumerate(shown.pictures, 1):
            yield _figure(finder, reference, number)
        yield "</div>"
    yield '<div class="words">'
    number = 0
    for piece in shown.pieces:
        if piece.is_picture:
            number += 1
            yield f'<span class="picture">picture {number}</span>'
        else:
            yield f"<mark>{_safe(piece.text)}</mark>" if piece.supervised else _safe(piece.text)
    yield "</div></section>"


def _figure(finder: PictureFinder, reference: PictureReference, number: int) -> str:
    picture = thumbnail(finder, reference)
    name = str(reference) if reference.where and not reference.where.startswith("data:") else f"picture {number}"
    if picture is None:
        return f"<figure><figcaption>{_safe(name)} has changed since it was checked</figcaption></figure>"
    source = encode_data_url(picture, QUALITY)
    size = f'width="{picture.width}" height="{picture.height}"'
    return f'<figure><img src="{source}" {size} alt="{_safe(name)}"><figcaption>{_safe(name)}</figcaption></figure>'


def _safe(text: str) -> str:
    """`text` as it may stand in the page: escaped, and without letters that have no form in UTF-8."""
    return escape(text.encode(errors="replace").decode())
