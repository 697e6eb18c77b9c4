"""Matching of pictures with hints, masks and captions, by one rule for folders and tar shards.

- `images/a/1.png` pairs with `hints/a/1.jpg`, `masks/a/1.png` and `captions/a/1.txt`: the first folder whose name is
  in ROLES gives the role and is removed, the rest without its suffix must be equal. Folders of other names stay.
- In one folder, `1.png` pairs with `1_hint.png` or `1.hint.png`, `1_mask.png` or `1.mask.png`, and `1.txt`.
- `metadata.jsonl`, `metadata.csv` (as in Hugging Face's imagefolder) and `prompt.json` (as in fill50k) list files
  relative to their own folder, and apply to this folder and all below it; files that a row leaves out are found by the
  rules above. Other .jsonl, .json or .csv files are used only when they are given as a source themselves.
- Parquet files, and Arrow files of the library `datasets`, hold rows of the same columns, with the pictures or their
  names. Where some files are of a split to train on, those of test and validation are left out.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...controlnext_core.encodable import cut, escaped
from .pictures import PICTURE_SUFFIXES
from .rows import ROW_SUFFIXES, RowsError, read_rows, row_files
from .samples import Broken, DatasetError, first_line
from .tree import TAR_SUFFIX, Blob, Check, Tree, fold, in_order

VIDEO_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v")
MEDIA_SUFFIXES = (*PICTURE_SUFFIXES, *VIDEO_SUFFIXES)
UNREAD_SUFFIXES = (".gif", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".psd", ".exr")
"""Suffixes of pictures that are left out, since their formats are not read."""
TABLE_SUFFIXES = (".jsonl", ".json", ".csv")
TABLE_NAMES = ("metadata.jsonl", "metadata.csv", "prompt.json")

IMAGE, HINT, MASK, CAPTION = "image", "hint", "mask", "caption"
ROLES: dict[str, str] = {
    "images": IMAGE,
    "image": IMAGE,
    "hints": HINT,
    "hint": HINT,
    "conditioning_images": HINT,
    "conditioning_image": HINT,
    "conditioning": HINT,
    "control": HINT,
    "masks": MASK,
    "mask": MASK,
    "captions": CAPTION,
}
"""Name of a folder -> role of its files."""
ENDINGS: dict[str, str] = {
    "_hint": HINT,
    ".hint": HINT,
    ".conditioning": HINT,
    ".control": HINT,
    "_mask": MASK,
    ".mask": MASK,
}
"""End of a name before its suffix -> role of the file, where the name without it is a picture."""
COLUMNS: dict[str, tuple[str, ...]] = {
    IMAGE: ("file_name", "image", "target", "video_path", "video", "image_path"),
    HINT: ("conditioning_image", "hint", "pose", "source", "control", "guide_path", "depth_map", "hint_path"),
    MASK: ("mask", "mask_path"),
    CAPTION: ("text", "caption", "prompt"),
}
"""Columns of a table by role; the first that exists is used, and `<name>_file_name` is read as `<name>`. pose: the
authors' SD1.5 files; target, source, prompt: fill50k; video_path, guide_path: the authors' SVD files."""
KNOWN = frozenset(name for names in COLUMNS.values() for column in names for name in (column, f"{column}_file_name"))
"""Names of all known columns."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Picture or video with its hint, mask and caption; none of the files has been opened."""

    name: str
    """Name in the tree without role and suffix."""
    image: Blob
    hint: Blob | None = None
    mask: Blob | None = None
    caption: str | Blob | None = None
    """Caption as text, or the file that holds it."""


@dataclass(slots=True)
class _Files:
    """Files of a tree by role: name without role and suffix, folded -> files, in order."""

    images: list[tuple[str, Blob]] = field(default_factory=list)
    found: dict[tuple[str, str], list[Blob]] = field(default_factory=dict)
    keys: dict[Blob, str] = field(default_factory=dict)
    tables: list[Blob] = field(default_factory=list)

    def find(self, role: str, key: str, like: Blob) -> Blob | None:
        """File of a role; of several the one with the picture's suffix, else the first."""
        blobs = self.found.get((role, fold(key)), [])
        return next((blob for blob in blobs if blob.suffix == like.suffix), blobs[0] if blobs else None)


def open_tree(
    source: Path, roots: Sequence[Path] | None = None, check: Check = lambda: None, arrow: Path | None = None
) -> tuple[Tree, Blob | None]:
    """Open a source: (its files, the table if the source is one). Raises DatasetError if there is no such source."""
    allowed = None if roots is None else tuple(roots)
    if source.is_dir():
        tree = Tree(source, allowed, check=check, arrow=arrow)
        tree.walk()
        return tree, None
    if not source.is_file():
        raise DatasetError(f"{source}: no such folder or file. Check the path; relative ones start at the recipe.")
    tree = Tree(source.parent, allowed, check=check, arrow=arrow)
    if source.name.lower().endswith(TAR_SUFFIX):
        tree.add(source, source.name)
        return tree, None
    tables = (*TABLE_SUFFIXES, *ROW_SUFFIXES)
    if source.suffix.lower() not in tables:
        raise DatasetError(f"{source}: is not a dataset. Give a folder, a {TAR_SUFFIX}, or {', '.join(tables)}.")
    table = tree.find("", source.name)
    assert table is not None, "it was a file two lines above"
    return tree, table


def entries(tree: Tree, table: Blob | None, caption_extension: str, paired: bool) -> Iterator[Entry]:
    """Entries of a tree that could be used for training, in order; faults go to `tree.broken`.

    paired: True looks for hints that tables name; False ignores them, since hints are computed.
    """
    files = _sort_out(tree, caption_extension)
    tables = files.tables if table is None else [table]
    used: set[Blob] = set()
    spoken_for: list[str] = []
    for file in tables:
        spoken_for.append(posixpath.dirname(file.name))
        for entry in _from_table(tree, file, files, paired):
            used |= {blob for blob in (entry.image, entry.hint, entry.mask) if blob is not None}
            yield entry
    for key, image in files.images:
        if not any(_below(image.name, folder) for folder in spoken_for):
            entry = _completed(Entry(key, image), files)
            used |= {blob for blob in (image, entry.hint, entry.mask) if blob is not None}
            yield entry
    _list_unused(tree, files, used, tables)


def _below(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")


def _sort_out(tree: Tree, caption_extension: str) -> _Files:
    """Assign every file of a tree its role."""
    files = _Files(tables=row_files(tree))
    media: list[tuple[str, str, Blob]] = []
    unread: dict[str, list[Blob]] = {}
    for name in in_order(tree.blobs):
        blob = tree.blobs[name]
        role, key = _role(blob)
        if posixpath.basename(name).lower() in TABLE_NAMES:
            files.tables.append(blob)
        elif blob.suffix in MEDIA_SUFFIXES:
            media.append((role, key, blob))
        elif blob.suffix in UNREAD_SUFFIXES:
            unread.setdefault(blob.suffix, []).append(blob)
        elif blob.suffix in (caption_extension.lower(), ".json") and role in (IMAGE, CAPTION):
            files.found.setdefault((CAPTION, fold(key)), []).append(blob)
    for suffix, blobs in unread.items():
        also = f", as {len(blobs) - 1} more of them are" if len(blobs) > 1 else ""
        why = f"is of a kind ({suffix}) that is not read{also}. Save it as png, jpg, webp or bmp"
        tree.broken.append(Broken(blobs[0].label, why))
    images = {fold(key) for role, key, _ in media if role == IMAGE}
    for role, key, blob in media:
        if role == IMAGE:
            role, key = next(
                (
                    (other, key.removesuffix(key[-len(end) :]))
                    for end, other in ENDINGS.items()
                    if key.lower().endswith(end) and fold(key[: -len(end)]) in images
                ),
                (role, key),
            )
        files.keys[blob] = key
        if role == IMAGE:
            files.images.append((key, blob))
        else:
            files.found.setdefault((role, fold(key)), []).append(blob)
    return files


def _role(blob: Blob) -> tuple[str, str]:
    """Role by folder, and the name without that folder and the suffix."""
    *folders, stem = blob.stem.split("/")
    for place, folder in enumerate(folders):
        if folder.lower() in ROLES:
            return ROLES[folder.lower()], "/".join([*folders[:place], *folders[place + 1 :], stem])
    return IMAGE, blob.stem


def _completed(entry: Entry, files: _Files) -> Entry:
    """Entry completed with the files that its row, if any, leaves out."""
    key, image = files.keys.get(entry.image), entry.image
    if key is None:
        return entry
    captions = files.found.get((CAPTION, fold(key)), [])
    plain = next((blob for blob in captions if blob.suffix != ".json"), captions[0] if captions else None)
    return replace(
        entry,
        hint=entry.hint or files.find(HINT, key, image),
        mask=entry.mask or files.find(MASK, key, image),
        caption=plain if entry.caption is None else entry.caption,
    )


def _list_unused(tree: Tree, files: _Files, used: set[Blob], tables: Sequence[Blob]) -> None:
    """Report hints and masks without a picture, and pictures that tables do not name, a line for each table."""
    folders = [posixpath.dirname(table.name) for table in tables]
    for (role, _), blobs in files.found.items():
        for blob in blobs if role in (HINT, MASK) else ():
            if blob not in used and not any(_below(blob.name, folder) for folder in folders):
                tree.broken.append(Broken(blob.label, f"is a {role} without a picture of its name. Add the picture"))
    for table, folder in zip(tables, folders, strict=True):
        left = [b for _, b in files.images if _below(b.name, folder) and b not in used]
        if left:
            why = f"does not name {len(left)} pictures that lie with it, such as {left[0].name}. Add rows for them"
            tree.broken.append(Broken(table.label, why))


def _from_table(tree: Tree, table: Blob, files: _Files, paired: bool) -> Iterator[Entry]:
    """Entries from the rows of a table."""
    folder = posixpath.dirname(table.name)
    for number, row in _rows_of(tree, table):
        where = f"{table.label}, row {number}"
        if isinstance(row, str):
            tree.broken.append(Broken(where, row))
            continue
        try:
            yield _completed(_entry(tree, folder, row, paired), files)
        except (OSError, ValueError) as error:  # ValueError: also a path that the system refuses
            tree.broken.append(Broken(where, first_line(error)))


def _rows_of(tree: Tree, table: Blob) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Pairs (number from 1, the row or its fault); unreadable tables go to `tree.broken`."""
    try:
        if table.suffix in ROW_SUFFIXES:
            yield from enumerate(read_rows(tree, table, KNOWN), 1)
        else:
            yield from _text_rows(table)
    except RowsError as error:
        tree.broken.append(Broken(table.label, str(error)))


def _text_rows(table: Blob) -> list[tuple[int, Mapping[str, Any] | str]]:
    """Rows of a metadata file. Raises RowsError."""
    try:
        return list(_rows(table.read().decode("utf-8-sig"), table.suffix))
    except (OSError, ValueError, csv.Error, RecursionError) as error:
        raise RowsError(f"cannot be read ({first_line(error)}). Save it as UTF-8 {table.suffix}") from error


def _rows(text: str, suffix: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Pairs (number from 1, the row or its fault) of CSV, a JSON list of rows, JSON columns, or JSON lines."""
    if suffix == ".csv":
        yield from _csv_rows(text)
        return
    whole: Any = None
    if suffix == ".json":
        try:
            whole = json.loads(text)
        except ValueError:
            whole = None  # a row per line, as fill50k has it
    if isinstance(whole, dict) and whole and all(isinstance(column, list) for column in whole.values()):
        whole = [dict(zip(whole, row, strict=True)) for row in zip(*whole.values(), strict=True)]
    if isinstance(whole, list):
        for number, row in enumerate(whole, 1):
            yield number, row if isinstance(row, dict) else "is not a row of named columns. Remove it"
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, f"is not JSON ({first_line(error)}). Correct or remove the line"
                continue
            yield number, row if isinstance(row, dict) else "is not a row of named columns. Remove it"


def _csv_rows(text: str) -> Iterator[tuple[int, Mapping[str, Any] | str]]:
    """Rows of a CSV; a field that cannot be read costs only its row."""
    reader = csv.DictReader(io.StringIO(text, newline=""))
    number = 0
    while True:
        number += 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, f"cannot be read ({first_line(error)}). Correct or remove it"
            continue
        yield number, row


def _entry(tree: Tree, folder: str, row: Mapping[str, Any], paired: bool) -> Entry:
    """Entry of one row. Raises DatasetError if it names no picture, or a file that does not exist."""

    def value(role: str) -> Any:
        # without `target`, `source` says where a picture is from
        columns = [c for c in COLUMNS[role] if c != "source" or "target" in row]
        names = [name for column in columns for name in (column, f"{column}_file_name")]
        return next((row[name] for name in names if row.get(name) not in (None, "")), None)

    def file(role: str) -> Blob | None:
        name = value(role)
        if name is None or isinstance(name, Blob):
            return name
        if not isinstance(name, str):
            raise DatasetError(f"has a {role} that is {type(name).__name__}, not the path of a file. Correct it")
        blob = tree.find(folder, name)
        if blob is None:
            raise DatasetError(
                f"names {cut(name)}, which is not there. Correct the path, relative to the table's folder"
            )
        if blob.suffix not in MEDIA_SUFFIXES:
            raise DatasetError(f"names {cut(name)}, which is of none of the kinds {', '.join(MEDIA_SUFFIXES)}")
        return blob

    image = file(IMAGE)
    if image is None:
        raise DatasetError(f"names no picture: it has none of the columns {', '.join(COLUMNS[IMAGE])}. Add one")
    hint = file(HINT) if paired else None
    return Entry(image.stem, image, hint, file(MASK), _text(value(CAPTION)))


def _text(value: Any) -> str | None:
    """Caption as text; of several the first."""
    if isinstance(value, list):
        value = value[0] if value else None
    return value.strip() if isinstance(value, str) else None


def read_caption(caption: str | Blob | None) -> str:
    """Read a caption, '' without one; a lone surrogate in JSON becomes its escape. Raises OSError or ValueError."""
    if caption is None or isinstance(caption, str):
        return escaped(caption or "")
    try:
        text = caption.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 ({first_line(error)}). Save it again as UTF-8") from None
    if caption.suffix != ".json":
        return text.strip()
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"is not JSON ({first_line(error)}). Correct or remove it") from None
    found: Iterable[Any] = (row.get(name) for name in COLUMNS[CAPTION]) if isinstance(row, dict) else ()
    return escaped(next((text for text in map(_text, found) if text), ""))
