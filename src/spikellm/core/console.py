"""Output of the command line: results to standard output, progress and errors to standard error."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from spikellm.core.errors import RequestError
from spikellm.core.files import Source, require_name, temporary_name, write_text
from spikellm.core.streams import encodes

out = Console(soft_wrap=False)
err = Console(stderr=True)


def speak(yes: bool) -> None:
    """Print progress, or be quiet; of several ranks only one prints."""
    err.quiet = not yes


def note(text: str) -> None:
    """A line of progress on standard error."""
    err.print(text, highlight=False, markup=False, soft_wrap=True)


def check_json_target(
    target: str | None,
    reads: Iterable[Source] = (),
    writes: Mapping[str, Path | None] | None = None,
) -> None:
    """Check the target of ``--json`` by :func:`check_file_target`; ``-`` is standard output."""
    if target != "-":
        check_file_target("--json", target, reads, writes, ", or - for standard output")


def check_file_target(
    option: str,
    target: str | Path | None,
    reads: Iterable[Source] = (),
    writes: Mapping[str, Path | None] | None = None,
    otherwise: str = "",
) -> None:
    """Refuse a file that could not be written, or that would overwrite another one, before the
    work whose result it is to hold.

    Args:
        reads: what the command reads.
        writes: other files and folders that the command writes, by the option that names them.

    Raises:
        RequestError: the folder of the file does not exist, or the target is a folder or part of
            what is read or of what else is written.
    """
    path = None if target is None else Path(target)
    if path is None:
        return
    if path.name:
        require_name(path.absolute(), temporary_name(path).name)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise RequestError(f"{option} {target}: expected a file in a folder that exists{otherwise}")
    if path.exists() and not path.is_file():
        return  # a pipe or a device holds nothing
    for source in reads:
        if source.includes(path):
            if source.path.resolve() == path.resolve():
                raise RequestError(
                    f"{option} {target} is what this command reads, and would be overwritten;"
                    f" choose another file{otherwise}"
                )
            raise RequestError(
                f"{option} {target} lies in {source.path}, which this command reads; choose a file"
                f" elsewhere{otherwise}"
            )
    for other, written in (writes or {}).items():
        if written is not None and path.resolve().is_relative_to(written.resolve()):
            raise RequestError(
                f"{option} {target} and {other} {written} would overwrite each other; choose"
                " another file for one of them"
            )


def write_json(data: Any, target: str) -> None:
    """Write JSON to a file, or to standard output where the target is ``-``.

    Characters that its encoding lacks are escaped.
    """
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    if not encodes(text, sys.stdout.encoding if target == "-" else "utf-8"):
        text = json.dumps(data, indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(target), text)


Style = Literal["table", "markdown", "csv", "latex"]


def table(
    title: str, columns: list[str], rows: list[list[str]], *, left: int = 1, style: Style = "table"
) -> None:
    """Print a table; the first ``left`` columns are flush left, the others right.

    The title is left out of styles that programs read.
    """
    if style != "table":
        sys.stdout.write(_plain_table(columns, rows, left, style))
        return
    sheet = Table(title=escape(title), title_justify="left")
    for place, column in enumerate(columns):
        sheet.add_column(
            escape(column), justify="left" if place < left else "right", overflow="fold"
        )
    for row in rows:
        sheet.add_row(*map(escape, row))
    Console(width=None if sys.stdout.isatty() else 180).print(sheet)


def table_style(name: str) -> Style:
    """A style by name.

    Raises:
        RequestError: there is none of that name.
    """
    styles = get_args(Style)
    if name not in styles:
        raise RequestError(f"--table {name!r}: expected {', '.join(styles)}")
    return cast(Style, name)


def _plain_table(columns: list[str], rows: list[list[str]], left: int, style: Style) -> str:
    if style == "csv":
        sheet = io.StringIO()
        csv.writer(sheet, lineterminator="\n").writerows([columns, *rows])
        return sheet.getvalue()
    sides = ["l" if place < left else "r" for place in range(len(columns))]
    return (_markdown if style == "markdown" else _latex)([columns, *rows], sides)


def _markdown(rows: list[list[str]], sides: list[str]) -> str:
    lines = []
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |\n")
    rule = [":--" if side == "l" else "--:" for side in sides]
    lines.insert(1, f"| {' | '.join(rule)} |\n")
    return "".join(lines)


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "±": r"$\pm$",
        "×": r"$\times$",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    }
)


def _latex(rows: list[list[str]], sides: list[str]) -> str:
    lines = []
    for row in rows:
        cells = [cell.translate(_LATEX) for cell in row]
        lines.append(" & ".join(cells) + r" \\")
    opening = rf"\begin{{tabular}}{{{''.join(sides)}}}"
    return "\n".join(
        [opening, r"\hline", lines[0], r"\hline", *lines[1:], r"\hline", r"\end{tabular}", ""]
    )


@contextmanager
def bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields ``update(done, total)``."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err, transient=True) as progress:
        task: TaskID = progress.add_task(escape(label), total=1)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def with_error(value: float | None, error: float | None) -> str:
    """A share with its standard error, for people."""
    if value is None:
        return "-"
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
