"""Paths in data files stay inside the folder of media, whatever they say and wherever links lead."""

from __future__ import annotations

import os

from llava.data.files import MediaError
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
    root = os.path.abspath(root)
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
    real, real_root = os.path.realpath(media.path), os.path.realpath(root)
    if not _is_inside(real, real_root):
        raise MediaError(
            f"{media.path}: is a link to {real}, which lies outside the folder {root}; give the folder that has it "
            f"with --{media.kind}_folder, or allow it with --allow_outside_paths"
        )


def _is_inside(path: str, folder: str) -> bool:
    return path.startswith(folder.rstrip(os.sep) + os.sep)
