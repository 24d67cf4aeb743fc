"""Published weights: what ``navagent weights`` does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from policies.catalogue import (
    CatalogueError,
    Entry,
    catalogue,
    expected_sha256,
    fetch,
    find_entry,
    mismatch,
    weights_dir,
)
from policies.download import DownloadError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Findings:
    """What :func:`verify` found out about a file."""

    file: Path
    """The file that was looked at."""
    facts: dict[str, str] = field(default_factory=dict)
    """What it is, by the names of the lines."""
    warnings: list[str] = field(default_factory=list)
    """What a user should think about before using it."""
    faults: list[str] = field(default_factory=list)
    """Why it must not be used."""


def size_text(size: int | None) -> str:
    """A number of bytes for people: ``3.7 MB``, or ``unknown``."""
    if size is None:
        return "unknown"
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


def list_weights(console: Console, words: Sequence[str] = ()) -> None:
    """Prints a table of the entries whose lines contain all the words."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "encoder", "size", "licence", "here", "trained for"):
        table.add_column(column, no_wrap=True, justify="right" if column == "size" else "left")
    shown = 0
    for entry in catalogue().values():
        row = (
            entry.name,
            (entry.encoders[0] if entry.encoders else entry.kind)
            + (" (depth)" if entry.channels == 1 else ""),
            size_text(entry.size),
            entry.source.licence,
            "ships" if entry.shipped else "yes" if entry.path.is_file() else "",
            entry.about + (" (not trained)" if entry.note.startswith("Not trained") else ""),
        )
        if all(word.lower() in " ".join(row).lower() for word in words):
            table.add_row(*row)
            shown += 1
    if not shown:
        raise CatalogueError(f"no weights match {' '.join(words)!r}; `navagent weights list` shows all")
    _print_whole(console, table)
    console.print(f"\n{shown} entries; fetched ones lie in {weights_dir()}", soft_wrap=True, highlight=False)


def _print_whole(console: Console, table: Table) -> None:
    """Prints a table whose lines are never cut or folded: names and addresses are to be copied."""
    width = console.measure(table, options=console.options.update(width=100_000)).maximum
    wide = Console(width=width, force_terminal=console.is_terminal, color_system="standard")
    with wide.capture() as capture:
        wide.print(table)
    for line in capture.get().splitlines():
        text = Text.from_ansi(line)
        # The blanks that fill the last column would become empty lines in a narrow window.
        text.rstrip()
        console.print(text, soft_wrap=True)


def show(console: Console, name: str) -> None:
    """Prints all that is known of an entry, with what to cite."""
    entry = find_entry(name)
    source = entry.source
    rows = {
        "name": entry.name,
        "kind": f"{entry.kind} for {'colour' if entry.channels == 3 else 'depth'} images",
        "trained for": entry.about,
        "encoders": ", ".join(entry.encoders) + (" (their default)" if entry.default else ""),
        "from": f"{source.title}\n{source.homepage}",
        "address": entry.url or "ships in this package",
        "SHA-256": entry.sha256 or "unknown: recorded at the first fetch",
        "git blob": entry.git_blob or "",
        "size": size_text(entry.size),
        "licence": source.licence + (f"\n{source.licence_note}" if source.licence_note else ""),
        "note": entry.note,
        "cite": "\n".join(source.citations),
        "here": str(entry.path) if entry.path.is_file() else f"no; `navagent weights fetch {entry.name}`",
        "use": _use(entry),
    }
    _print_whole(console, _lines(rows))


def _use(entry: Entry) -> str:
    if not entry.encoders:
        return "policies.encoders.taskonomy.TaskonomyDecoder"
    return _command(entry, entry.name)


def _command(entry: Entry, weights: str | Path) -> str:
    """The command that trains with an entry's weights, given by name or as a file."""
    camera = "" if entry.channels == 3 else " sensors=depth"
    return f"navagent train encoder.name={entry.encoders[0]} encoder.weights={weights}{camera}"


def _lines(rows: Mapping[str, str]) -> Table:
    """Names and texts beside each other; empty texts are left out."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(no_wrap=True)
    for name, text in rows.items():
        if text:
            table.add_row(name, Text(text))
    return table


def fetch_weights(console: Console, names: Sequence[str], *, offline: bool = False) -> bool:
    """Fetches entries one after the other, and prints the path of each on standard output.

    Args:
        console: where progress and what is wrong are shown.
        names: names of entries.
        offline: see :func:`policies.catalogue.fetch`.

    Returns:
        Whether all are there.
    """
    entries = [find_entry(name) for name in names]
    complete = True
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        redirect_stdout=False,
    )

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    with progress:
        for entry in entries:
            bar = progress.add_task(entry.name, total=entry.size, visible=False)

            def report(done: int, total: int | None, bar: TaskID = bar) -> None:
                progress.update(bar, completed=done, total=total, visible=True)

            try:
                found = fetch(entry.name, offline=offline, report=report, notice=say)
            except (DownloadError, CatalogueError) as error:
                say(f"{entry.name}: {error}")
                complete = False
                continue
            finally:
                progress.remove_task(bar)
            say(f"{entry.name}: {'fetched' if found.downloaded else 'already here'}, SHA-256 {found.sha256}")
            if found.trusted:
                say("  nobody published its hash; this one is recorded, for later checks")
            if entry.note:
                say(f"  {entry.note}")
            print(found.path, flush=True)
    return complete


def import_weights(console: Console, source: str | Path, out: str | Path | None = None) -> Path:
    """Rewrites an old pickled file as safetensors, without running what is in it.

    Args:
        console: where to say what it is.
        source: a ``.pth``, ``.dat`` or other file of ``torch.save``.
        out: the file to write; by default beside the source, with the suffix ``.safetensors``.

    Raises:
        WeightsError: if the source is no such file, or would run code.
        ValueError: if the target exists or is not named as safetensors, or the source is safetensors already.
    """
    from policies.weights import convert_to_safetensors, sha256

    source = Path(source)
    target = source.with_suffix(".safetensors") if out is None else Path(out)
    if source.suffix == ".safetensors":
        raise ValueError(f"{source} is a safetensors file already; there is nothing to rewrite")
    if target.suffix != ".safetensors":
        raise ValueError(f"--out {target}: expected a name that ends in .safetensors, by which it is read")
    if target.exists():
        raise ValueError(f"{target} exists already; give another file with --out")
    checkpoint = convert_to_safetensors(source, target)
    digest = sha256(source)
    entry = next((e for e in catalogue().values() if e.sha256 == digest), None)
    rows = {
        "from": f"{source}" + (f", which is {entry.name} of the catalogue" if entry else ""),
        "to": str(target),
        "tensors": _tensors_text(checkpoint.tensors),
        "beside": ", ".join(f"{key}={value}" for key, value in checkpoint.metadata.items())[:200],
        "note": entry.note if entry else "",
        "use": _command(entry, target) if entry and entry.encoders else "",
    }
    _print_whole(console, _lines(rows))
    return target


def _tensors_text(tensors: Mapping[str, Tensor]) -> str:
    values = sum(value.numel() for value in tensors.values())
    types = ", ".join(sorted({str(value.dtype).removeprefix("torch.") for value in tensors.values()}))
    return f"{len(tensors)}, {values:,} values, {types}"


def verify(file: str | Path) -> Findings:
    """Holds a file, or the file of an entry, against the catalogue, and looks at what is in it.

    Raises:
        CatalogueError: if there is no such file.
    """
    from policies.weights import (
        WeightsError,
        read_pth,
        read_safetensors,
        sha256,
        tensors_sha256,
        untrained_reason,
    )

    entries = catalogue()
    named = entries.get(str(file))
    path = named.path if named else Path(file)
    if not path.is_file():
        hint = f"`navagent weights fetch {named.name}` gets it" if named else "give a file or a name"
        raise CatalogueError(f"{path}: no such weights file; {hint}")
    digest = sha256(path)
    found = Findings(path, {"file": f"{path} ({size_text(path.stat().st_size)})", "SHA-256": digest})
    entry = _compare(found, digest, named or _by_file_name(path, entries), entries)
    try:
        checkpoint = (read_safetensors if path.suffix == ".safetensors" else read_pth)(path)
    except WeightsError as error:
        found.faults.append(str(error))
        return found
    tensors = checkpoint.tensors
    content = tensors_sha256(tensors)
    found.facts["tensors"] = _tensors_text(tensors)
    origin = checkpoint.metadata.get("source_sha256")
    source = next((e for e in entries.values() if origin is not None and e.sha256 == origin), None)
    if source is not None:
        found.facts["made from"] = f"{source.name}, by its own word"
        if source.tensors_sha256 not in (None, content):
            found.faults.append(f"says that it was made from {source.name}, whose tensors are others")
    entry = entry or source
    if entry is not None:
        found.facts["note"] = entry.note
    broken = [name for name, value in tensors.items() if not bool(value.isfinite().all())]
    if broken:
        found.faults.append(f"{len(broken)} of its tensors hold NaN or infinity: {', '.join(broken[:4])}")
    reason = untrained_reason(tensors)
    if reason:
        found.warnings.append(f"looks untrained: {reason}")
    twins = sorted(set(_same_weights(content, path, entry, entries)))
    if twins:
        found.warnings.append(f"the same weights go by other names too: {', '.join(twins)}")
    return found


def _by_file_name(path: Path, entries: Mapping[str, Entry]) -> Entry | None:
    """The entry whose file in the cache, or whose published file, has this name; None unless it is one."""
    fitting = [e for e in entries.values() if path.name in (e.path.name, e.published_name)]
    return fitting[0] if len(fitting) == 1 else None


def _compare(found: Findings, digest: str, named: Entry | None, entries: Mapping[str, Entry]) -> Entry | None:
    """Notes what the catalogue says of a file by its hash and by its name, and gives the entry that it is."""
    entry = next((e for e in entries.values() if e.sha256 == digest), None)
    if entry is not None:
        found.facts["catalogue"] = f"{entry.name}, as published"
        if named not in (None, entry):
            found.faults.append(f"has the name of {named.name}, but is {entry.name}")  # type: ignore[union-attr]
    elif named is None:
        found.facts["catalogue"] = "not in it"
    elif named.git_blob is None and expected_sha256(named) is None:
        found.facts["catalogue"] = f"{named.name} by its name; its hash was neither published nor recorded"
        entry = named
    elif (problem := mismatch(named, found.file)) is not None:
        found.facts["catalogue"] = f"{named.name} by its name only"
        found.faults.append(problem)
    else:
        origin = "as published" if named.git_blob else "as it was when it was fetched first"
        found.facts["catalogue"] = f"{named.name}, {origin}"
        entry = named
    return entry


def _same_weights(
    content: str, path: Path, entry: Entry | None, entries: Mapping[str, Entry]
) -> Iterator[str]:
    """Entries and files in the cache, other than this one, with the same tensors.

    Args:
        content: SHA-256 of the tensors.
        path: the file that is looked at.
        entry: the entry that it is, if any.
        entries: the catalogue.
    """
    from policies.weights import WeightsError, read_pth, read_safetensors, tensors_sha256

    names = {e.path: e.name for e in entries.values()}
    yield from (e.name for e in entries.values() if e.tensors_sha256 == content and e != entry)
    cached = [p for p in weights_dir().glob("*") if p.suffix != ".sha256" and not p.name.startswith(".")]
    for other in [*cached, *(e.path for e in entries.values() if e.shipped)]:
        if other.samefile(path) or (entry is not None and other == entry.path) or not other.is_file():
            continue
        try:
            tensors = (read_safetensors if other.suffix == ".safetensors" else read_pth)(other).tensors
        except WeightsError:
            continue
        if tensors_sha256(tensors) == content:
            yield names.get(other, str(other))


def print_findings(console: Console, found: Findings) -> None:
    """Prints what :func:`verify` found out, and what comes of it."""
    _print_whole(console, _lines(found.facts))
    for text in found.warnings:
        console.print(f"[yellow]warning[/]  {escape(text)}", highlight=False, soft_wrap=True)
    for text in found.faults:
        console.print(f"[red]fault[/]    {escape(text)}", highlight=False, soft_wrap=True)
    if not found.faults:
        console.print("readable, and every value is finite", highlight=False)
