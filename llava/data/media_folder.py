"""Paths in data files stay inside the folder of media, whatever they say and wherever links lead."""

from __future__ import annotations

import os

from llava.data.files import MediaError, expand_home, local_path
from llava.types import Media, MediaKind


def find_media(path: str, kind: MediaKind, root: str, anywhere: bool, where: str) -> Media:
    """The file that a path of a data file names.

    Only the path is looked at here, which is quick enough for a million samples; where links lead is for
    ``check_links`` to say, when the file is opened.

    Args:
        path: absolute, or relative to the root.
        kind: what the file is.
        root: the folder of media.
        anywhere: whether the path may lead out of it.
        where: names the sample.

    Raises:
        ValueError: it leads out of the root.
    """
    try:
        path = local_path(path)
    except MediaError as error:
        raise ValueError(f"{where}: its {kind} {error}") from error
    root = os.path.abspath(expand_home(root))
    found = os.path.normpath(os.path.join(root, path))
    if anywhere:
        return Media(kind, found)
    if not _is_inside(found, root):
        raise ValueError(
            f"{where}: its {kind} {path!r} lies outside the folder {root}; give the folder that has it with "
            f"--{kind}_folder, or allow it with --allow_outside_paths"
        )
    return Media(kind, found, len(root))


def check_links(media: Media) -> None:
    """A MediaError for a file that symbolic links put outside the folder it may not leave."""
    if not media.root:
        return
    root = media.path[: media.root]
    real_root = os.path.realpath(root)
    for path in _files_of(media):
        real = os.path.realpath(path)
        if _is_inside(real, real_root):
            continue
        raise MediaError(
            f"{path}: is a link to {real}, which lies outside the folder {root}; give the folder that has it "
            f"with --{media.kind}_folder, or allow it with --allow_outside_paths"
        )


def _files_of(media: Media) -> list[str]:
    """The files of a medium, of a clip that is a folder the links in it."""
    if media.frames:
        return list(media.frames)
    if media.kind == "video" and os.path.isdir(media.path):
        with os.scandir(media.path) as entries:
            return [media.path, *(entry.path for entry in entries if entry.is_symlink())]
    return [media.path]


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)
