"""Say in the terminal what a check of conversation data found."""

import unicodedata

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from training.data.check_samples import Shown
from training.data.data_check import Check, histogram

EXAMPLES = 3  # rows that are told of each kind of fault
BAR = 40  # letters of the longest bar
LONGEST_PIECE = 600  # letters of a stretch of text that are shown


def printable(said: str) -> Text:
    """Text of a data set for the terminal: no markup in it acts, and control characters are only shown."""
    shown = ("\ufffd" if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cs") else c for c in said)
    return Text("".join(shown))


def check_summary(check: Check, strict: bool) -> RenderableType:
    """Counts, faults and lengths of one source, and whether training would stop."""
    parts: list[RenderableType] = [_counts(check)]
    if check.findings:
        parts.append(_faults(check))
    if check.lengths:
        parts.append(_lengths(check))
    return Group(*parts, verdict(check, strict))


def _counts(check: Check) -> Table:
    table = Table(title=printable(check.name), title_style="bold", title_justify="left", show_header=False, box=None)
    table.add_column(justify="right")
    table.add_column()
    for count, what in count_lines(check):
        table.add_row(count, what)
    return table


def count_lines(check: Check) -> list[tuple[str, str]]:
    """What is counted, as numbers and words."""
    lines = [
        (f"{check.rows:,}", f"rows ({check.form}, {check.kind})"),
        (f"{check.conversations:,}", "conversations that can be read"),
        (f"{check.turns:,}", "answers in them"),
        (f"{check.pictures:,}", f"places of pictures; {len(check.pictures_of):,} different pictures are taught"),
        (f"{len(check.good):,}", "rows that are taught"),
    ]
    kinds = [
        (check.text_only, "without a picture"),
        (check.many_pictures, "with several pictures"),
        (check.dialogues, "with several answers"),
        (check.systems, "with a system message"),
    ]
    lines += [(f"{count:,}", f"  of these {what}") for count, what in kinds if count]
    if check.lengths:
        lines.append((f"{sum(check.lengths):,}", f"tokens, of which {check.supervised:,} are learned"))
    return lines


def _faults(check: Check) -> Table:
    table = Table(title="What is wrong", title_style="bold", title_justify="left")
    table.add_column("rows", justify="right")
    table.add_column("what")
    table.add_column("for example", overflow="fold")
    for kind, findings in check.by_kind().items():
        refuses = findings[0].fault.refuses
        examples = [
            f"{found.place}, {found.fault.field}: {found.fault.wrong}. Way out: {found.fault.way_out}"
            for found in findings[:EXAMPLES]
        ]
        if len(findings) > EXAMPLES:
            examples.append(f"... and {len(findings) - EXAMPLES:,} more")
        rows = len({found.row for found in findings})
        what = Text(kind, style="red") + Text("\nnot taught" if refuses else "\ntaught", style="dim")
        if not refuses:
            what.stylize("yellow", 0, len(kind))
        table.add_row(f"{rows:,}", what, printable("\n".join(examples)), end_section=True)
    return table


def _lengths(check: Check) -> Table:
    title = f"Tokens of a row (at most {check.longest:,} are allowed)"
    table = Table(title=title, title_style="bold", title_justify="left", show_header=False, box=None)
    for _ in range(2):
        table.add_column(justify="right")
    table.add_column()
    bins = histogram(check)
    most = max(count for _, _, count in bins)
    for start, end, count in bins:
        table.add_row(f"{start}-{end - 1}", f"{count:,}", "█" * -(-BAR * count // most) if count else "")
    return table


def verdict(check: Check, strict: bool) -> Text:
    """One sentence: whether training would stop, and what can be done."""
    said, style = verdict_words(check, strict)
    return Text(said, style=style)


def verdict_words(check: Check, strict: bool) -> tuple[str, str]:
    """The verdict and its colour."""
    if check.stops(strict):
        share = "no row may be" if strict else "one row in a hundred may be"
        said = f"Training would stop: {check.refused:,} of {check.rows:,} rows are refused, and {share}."
        return said + " Mend them, or write the good ones with --fixed good.jsonl.", "bold red"
    if check.refused:
        rows = "row" if check.refused == 1 else "rows"
        return f"Training would skip {check.refused:,} {rows} and go on; --strict refuses them.", "bold yellow"
    if check.findings:
        return "Every row can be taught; look at the warnings.", "bold yellow"
    return "Every row can be taught.", "bold green"


def notes(check: Check) -> list[str]:
    """What the model's chat template makes of the rows, where somebody may not expect it."""
    told = []
    if check.endless:
        told.append(
            f"The model's chat template marks no end of turn as learned in {check.endless:,} rows: taught so, it may "
            "not stop by itself. Put the end token inside the template's generation block."
        )
    if check.moved:
        told.append(
            f"In {check.moved:,} rows a picture stands behind words; the model's chat template writes the pictures of "
            "a message before its words, as LLaVA-1.5 does. Each stays in its message."
        )
    return told


def sample_panel(shown: Shown) -> Panel:
    """One row as the model reads it: what is learned is green, pictures are blue."""
    text = Text()
    for piece in shown.pieces:
        if piece.is_picture:
            text.append(" picture ", style="reverse blue")
            continue
        said = piece.text
        if len(said) > LONGEST_PIECE:
            said = f"{said[: LONGEST_PIECE // 2]} ... {said[-LONGEST_PIECE // 2 :]}"
        text.append(printable(said).plain, style="bold green" if piece.supervised else "dim")
    title = f"{shown.place}: {shown.tokens:,} tokens, {shown.supervised:,} learned (green)"
    return Panel(text, title=title, title_align="left")
