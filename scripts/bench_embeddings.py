"""Compare embedding a folder, searching many vectors and refreshing an index with the bare work and with peers.

Example, on a quiet machine: python scripts/bench_embeddings.py --threads 2 --out embeddings.json
"""

import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import faiss
import torch
import transformers
import typer

from scripts.bench_pretraining import machine
from scripts.benchmarks import embedding, searching
from scripts.benchmarks.measuring import Disagreement, Limit, Pair, arithmetic, race

CPU = torch.device("cpu")
PARTS = ("embed", "search", "refresh")
BUSY = 1.5  # load per core of others, above which figures are marked
HEADINGS = ("work", "peer", "ratio", "spread", "ours", "theirs", "bound")
WIDTHS = (34, 22, 6, 12, 14, 14, 6)


@dataclass(frozen=True)
class Figure:
    """What was measured of a pair; `bound` is the ratio that the machine's cores allow, where it is known."""

    name: str
    peer: str
    ratios: tuple[float, ...]
    our_seconds: float  # of one picture, search or refresh: the median
    their_seconds: float
    unit: str
    bound: float | None = None

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios; above 1 ours is faster."""
        return statistics.median(self.ratios)


def figure(pair: Pair, pieces: int, rounds: int, unit: str, bound: float | None = None) -> Figure:
    """Measure `pair`, each call of which does so many pieces of work."""
    times = race(pair, rounds, CPU)
    return Figure(
        pair.name,
        pair.peer,
        tuple(theirs / ours for ours, theirs in times),
        statistics.median(ours for ours, _ in times) / pieces,
        statistics.median(theirs for _, theirs in times) / pieces,
        unit,
        bound,
    )


def told(seconds: float, unit: str) -> str:
    """Pictures a second, or milliseconds of a search or refresh."""
    return f"{1 / seconds:.1f} {unit}" if unit == "pictures/s" else f"{1000 * seconds:.1f} {unit}"


def line(cells: Iterable[str]) -> str:
    """A row of the table: names to the left, numbers to the right."""
    padded = (
        cell.ljust(width) if place < 2 else cell.rjust(width)
        for place, (cell, width) in enumerate(zip(cells, WIDTHS, strict=True))
    )
    return "  ".join(padded)


def row(found: Figure) -> str:
    """A figure as the table has it."""
    return line(
        [
            found.name,
            found.peer,
            f"{found.ratio:.2f}",
            f"{min(found.ratios):.2f}-{max(found.ratios):.2f}",
            told(found.our_seconds, found.unit),
            told(found.their_seconds, found.unit),
            "" if found.bound is None else f"{found.bound:.2f}",
        ]
    )


def embedding_figures(
    towers: list[str],
    peers: list[str],
    size: tuple[int, int],
    pictures: int | None,
    rounds: int,
    folder: Path,
    limit: Limit,
) -> list[Figure]:
    """Each tower beside itself alone and beside those of the peers that can load it."""
    figures = []
    for name, shape, embedder in embedding.embedders(towers, folder):
        files = embedding.photographs(folder / f"{name}-pictures", pictures or shape.pictures, *size)
        decoding = embedding.decode_seconds(embedder, files)
        for peer in peers:
            if peer not in ("bare", "transformers") and not shape.layers:
                continue  # Joey's is a SigLIP that the others have no loader for
            try:
                embedding.check(embedding.PAIRS[peer], embedder, files)
            except ImportError as error:
                typer.echo(f"left out: {peer} is not installed ({error})", err=True)
                continue
            pair = embedding.PAIRS[peer](embedder, files)
            found = figure(pair, len(files), rounds, "pictures/s")
            if peer == "bare":
                alone = found.their_seconds
                share = alone / (alone + decoding / torch.get_num_threads())
                found = Figure(**{**vars(found), "bound": share})
                flops = arithmetic(pair.theirs) / len(files)
                limit.look_again()
                typer.echo(
                    f"{name}: {flops / 1e9:.2f} GFLOP a picture ({flops / limit.speed * 1000:.1f} ms by arithmetic, "
                    f"{alone * 1000:.1f} ms measured), decoding {decoding * 1000:.1f} ms of one core"
                )
            figures.append(Figure(**{**vars(found), "name": f"{pair.name}, {name}"}))
            typer.echo(row(figures[-1]))
    return figures


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    only: Annotated[
        list[str] | None, typer.Option(help=f"What to measure; may be given again. One of: {', '.join(PARTS)}.")
    ] = None,
    tower: Annotated[
        list[str] | None,
        typer.Option(help=f"Towers to embed with; may be given again. Of: {', '.join(embedding.SHAPES)}."),
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(help=f"Who embeds beside us; may be given again. Of: {', '.join(embedding.PAIRS)}."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often the two sides take turns.")] = 3,
    threads: Annotated[int, typer.Option(min=1, help="Threads of both sides.")] = os.cpu_count() or 1,
    pictures: Annotated[int | None, typer.Option(min=2, help="Photographs a pass.")] = None,
    width: Annotated[int, typer.Option(min=64, help="Pixels of a photograph's longer side (4 : 3).")] = 2048,
    vectors: Annotated[int, typer.Option(min=100, help="Embeddings that are searched.")] = 100_000,
    files: Annotated[int, typer.Option(min=2, help="Pictures of the folder that is refreshed.")] = 10_000,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Also write all figures there, as JSON.")] = None,
) -> None:
    """Measure embedding, search and refresh on this machine.

    Each comparison first sees that both sides find the same, and stops where they do not. Then both sides take turns,
    so that whatever else the machine does hits them alike. A ratio above 1 says that ours is faster; it is the median
    over the rounds, and the spread is the lowest and the highest. Beside the bare tower the ratio is the share of its
    throughput that is left when the pictures come from files; on a machine without a GPU decoding and tower share the
    cores, and the bound is what that leaves at best.

        python scripts/bench_embeddings.py --only embed --tower base

        python scripts/bench_embeddings.py --only search --only refresh
    """
    parts, towers, peers = only or list(PARTS), tower or ["base", "joey"], peer or list(embedding.PAIRS)
    for given, known, option in (
        (parts, PARTS, "--only"),
        (towers, tuple(embedding.SHAPES), "--tower"),
        (peers, tuple(embedding.PAIRS), "--peer"),
    ):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise typer.BadParameter(f"{unknown[0]} is none of: {', '.join(known)}", param_hint=option)
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*QuickGELU mismatch.*")
    load = os.getloadavg()[0]
    busy = load > BUSY * (os.cpu_count() or 1)
    typer.echo(f"{threads} threads, load {load:.1f}" + (": this machine is busy, take the ratios only" if busy else ""))
    typer.echo(line(HEADINGS))
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if "search" in parts:
                for channels in (256, 768):
                    pair = searching.search_pair(vectors, channels)
                    figures.append(figure(pair, searching.QUERIES, rounds, "ms"))
                    typer.echo(row(figures[-1]))
            if "refresh" in parts:
                figures.append(figure(searching.refresh_pair(folder / "unchanged", files, 768), 1, rounds, "ms"))
                typer.echo(row(figures[-1]))
            if "embed" in parts:
                limit = Limit(2048, torch.float32, CPU)
                figures += embedding_figures(towers, peers, (width, width * 3 // 4), pictures, rounds, folder, limit)
        except Disagreement as error:
            typer.echo(f"not compared: {error}", err=True)
            raise typer.Exit(1) from error
    if out is not None:
        report: dict[str, Any] = {"machine": machine(CPU), "load": load, "photograph": [width, width * 3 // 4]}
        report["results"] = [asdict(found) | {"ratio": found.ratio} for found in figures]
        out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        typer.echo(f"written to {out}")


if __name__ == "__main__":
    app()
