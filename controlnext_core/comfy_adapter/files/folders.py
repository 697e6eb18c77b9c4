"""Folders of the host: control files, the lists of the widgets, and the UNet weights that belong to a control."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import folder_paths

from ...checkpoint import SUFFIXES, CheckpointError, peek
from ...detection import ControlFile, holds_encoder, read_control_file
from ...encodable import cut, encodable, is_encodable
from ...file_names import UNET_START
from ...xs_detection import is_xs
from ..feedback import log_once

FOLDER = "controlnext"
FOLDERS = (FOLDER, "controlnet", "model_patches")
"""Folders in search order; where several hold the same relative name, the first is used."""

AUTO, NONE = "auto", "none"


def register_folder() -> None:
    """Register `models/controlnext` and `output/controlnext` (the folder of saved controls) with the host.

    Only weight files are listed. May be called repeatedly.
    """
    for parent in (folder_paths.models_dir, folder_paths.get_output_directory()):
        folder_paths.add_model_folder_path(FOLDER, os.path.join(parent, FOLDER))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(SUFFIXES))


def list_names(folders: Sequence[str]) -> list[str]:
    """Names of all weight files in these folders, as the widgets show them: with `/` on every system.

    A graph from another system therefore finds its files. Names that are not UTF-8 are left out, with a line in the
    log.
    """
    found = dict.fromkeys(
        Path(name).as_posix() for folder in folders for name in folder_paths.get_filename_list(folder)
    )
    for name in found:
        if not is_encodable(name):
            log_once("%s: left out of the lists, as its name is not UTF-8. Rename the file.", encodable(name))
    return [name for name in found if is_encodable(name)]


def find(name: str, folders: Sequence[str]) -> Path:
    """Path of the file with a widget's name.

    Raises CheckpointError where it is missing, or where its name is not UTF-8.
    """
    if not is_encodable(name):
        raise CheckpointError(f"{encodable(name)}: the file's name is not UTF-8. Rename the file and choose it again.")
    for folder in folders:
        path = folder_paths.get_full_path(folder, name)
        if path is not None:
            return Path(path)
    for parent in (parent for folder in folders for parent in folder_paths.get_folder_paths(folder)):
        if os.path.isdir(os.path.join(parent, name)):  # False also for a name that the system does not allow
            return Path(parent) / name  # the caller's attempt to open it reports that it is a folder
    raise CheckpointError(
        f"{cut(name)}: no such file in {' or '.join('models/' + folder for folder in folders)}. Put it there, or "
        "choose another file."
    )


def control_names() -> list[str]:
    """Names of all weight files in the control folders."""
    return list_names(FOLDERS)


def control_path(name: str) -> Path:
    """Path of the control file with a widget's name. Raises CheckpointError where it is missing."""
    return find(name, FOLDERS)


@dataclass(frozen=True)
class ChosenWeights:
    """Chosen source of a control's UNet weights."""

    path: Path | None
    """Path of the weights file; None: no weights."""
    bundled: bool
    why: str

    @property
    def stamp(self) -> str:
        """Stamp that changes when the file does."""
        return file_stamp(self.path) if self.path else NONE


def choose_weights(file: ControlFile, weights_name: str) -> ChosenWeights:
    """Resolve the value of the `weights_name` widget: `auto`, `none` or a file in the control folders.

    auto: the weights bundled in the control file; else the file that its metadata names; else the only
    `unet*.safetensors` beside it that is not a control; else none. Never from another folder. Raises CheckpointError
    for a file that is missing or is itself a control.
    """
    path = file.header.path
    if weights_name == NONE:
        return ChosenWeights(None, False, "none, as chosen")
    if weights_name != AUTO:
        return ChosenWeights(_weights_path(weights_name), False, f"{weights_name}, as chosen")
    if file.weights:
        return ChosenWeights(path, True, f"{len(file.weights)} tensors bundled in the control file")
    if file.metadata.weights_file:
        named = path.parent / Path(file.metadata.weights_file).name
        if not _is_file(named):
            raise CheckpointError(
                f"{path}: names {cut(named.name)} as its UNet weights, but that file is not beside it. Put it there, "
                "or set weights_name to none."
            )
        return ChosenWeights(named, False, f"{named.name}, named by the control file")
    beside = [found for found in sorted(path.parent.glob(f"{UNET_START}*.safetensors")) if not _is_control(found)]
    if len(beside) == 1:
        return ChosenWeights(beside[0], False, f"{beside[0].name}, the only one beside the control")
    return ChosenWeights(None, False, f"none ({len(beside)} files unet*.safetensors beside the control)")


def _weights_path(name: str) -> Path:
    """Path of the weights file with a widget's name.

    Raises CheckpointError, naming the right widget, where it is a control.
    """
    path = control_path(name)
    header = peek(path)
    if is_xs(header.shapes):
        raise CheckpointError(
            f"{path}: is a ControlNet-XS, which brings no weights of a base. Load it with Load ControlNet-XS, and set "
            "weights_name to auto."
        )
    if holds_encoder(header):
        whole = read_control_file(header).weights
        what = (
            "a whole control, encoder and weights in one file" if whole else "an encoder and holds no weights of a base"
        )
        raise CheckpointError(f"{path}: is {what}: choose it as control_name, and set weights_name to auto.")
    return path


def _is_control(path: Path) -> bool:
    """True: the file is a control. False: it is not, or it cannot be read, which its loader reports."""
    try:
        return holds_encoder(peek(path))
    except CheckpointError:
        return False


def _is_file(path: Path) -> bool:
    """False also for a name that no system takes."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def fingerprint(control_name: str, weights_name: str) -> str:
    """Fingerprint that changes with the control, its UNet weights or the choice between them; for
    `fingerprint_inputs`.
    """
    stamp = ""
    try:
        path = control_path(control_name)
        stamp = file_stamp(path)
        return f"{stamp}|{choose_weights(read_control_file(peek(path)), weights_name).stamp}"
    except CheckpointError as error:  # a file of another kind; the node itself raises it, where the user sees it
        return f"{stamp}|{error}"


def fingerprint_alone(control_name: str) -> str:
    """Fingerprint that changes with the control's file or a config.json beside it; for controls without
    UNet weights.
    """
    try:
        path = control_path(control_name)
    except CheckpointError as error:
        return str(error)
    return f"{file_stamp(path)}|{file_stamp(path.with_name('config.json'))}"


def file_stamp(path: Path) -> str:
    """Stamp of a file for fingerprints: path, size and modification time."""
    try:
        stat = path.stat()
    except OSError:
        return f"{path}:missing"
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"
