"""The tensors of a checkpoint's files, read when they are asked for; of a damaged folder, the file to copy again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.messages import list_names, shorten, shorten_text
from llava.model.pretrained import NOT_JUST_TENSORS

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of a whole model, or the index of its shards; the first that a folder has counts, as in transformers."""

_COPY_AGAIN = "it is cut short or damaged; copy the folder again"
_LFS_POINTER = b"version https://git-lfs"


class StoredTensors(Mapping[str, Tensor]):
    """Tensors by name; only the headers of files are read before one is asked for.

    Attributes:
        files: the file of each tensor.
        shapes: the shape of each.
    """

    def __init__(self, path: Path, where: str) -> None:
        """Open the weights of a model in a folder, or a single file; ``where`` is how errors begin.

        Raises:
            ValueError: there are none, or a file is missing, cut short, or no file of plain tensors.
        """
        self.where = where
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[Path, Any] = {}
        first = path if path.is_file() else next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if first is None:
            raise ValueError(f"{where} has no weights ({', '.join(WEIGHTS)}){_what_instead(path)}")
        if first.suffix != ".json":
            self._add_file(first)
            return
        promised = self._read_index(first)
        for file in sorted(set(promised.values())):
            self._add_file(path / file)
        # Of a shard whose download ended early the header may be there, or an older shard may lie in its place.
        absent = sorted(set(promised) - set(self.files))
        if absent:
            file = promised[absent[0]]
            raise ValueError(
                f"{where}: {file} lacks {list_names(absent)}, which {first.name} says it has; copy it again"
            )

    def __getitem__(self, name: str) -> Tensor:
        file = self.files[name]
        opened = self._open[file]
        try:
            tensor = opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{self.where}: {file.name} cannot be read: {_COPY_AGAIN} ({error})") from error
        assert isinstance(tensor, Tensor)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def _read_index(self, index: Path) -> dict[str, str]:
        """The file of each tensor that an index names."""
        try:
            found = json.loads(index.read_bytes())["weight_map"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.where}: {index.name} cannot be read: {_COPY_AGAIN}") from error
        if not isinstance(found, dict) or not found or not all(isinstance(file, str) for file in found.values()):
            raise ValueError(f"{self.where}: the weight_map of {index.name} names no files")
        for file in sorted(set(found.values())):
            # Names come from a file of somebody else's: nothing outside the folder is read for them.
            if Path(file).name != file:
                raise ValueError(f"{self.where}: {index.name} names {shorten(file)}, which is no file of the folder")
        missing = sorted(file for file in set(found.values()) if not (index.parent / file).is_file())
        if missing:
            raise ValueError(
                f"{self.where}: {list_names(missing)} is missing, which {index.name} names; the folder is not "
                "complete: copy or download it again"
            )
        return found

    def _add_file(self, file: Path) -> None:
        with file.open("rb") as opened:
            if opened.read(len(_LFS_POINTER)) == _LFS_POINTER:
                raise ValueError(f"{self.where}: {file.name} is a pointer of Git LFS, not the file; run git lfs pull")
        if file.suffix == ".safetensors":
            try:
                handle = safe_open(file, "pt")
                shapes = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self.where}: {file.name} cannot be read: {_COPY_AGAIN} ({error})") from error
            self._open[file] = handle
        else:
            tensors = _read_pickle(file, self.where)
            shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            self._open[file] = tensors
        self.files |= dict.fromkeys(shapes, file)
        self.shapes |= shapes


def _read_pickle(file: Path, where: str) -> dict[str, Tensor]:
    """The tensors of a ``.bin`` file, mapped rather than read where its format allows it. Nothing else is unpickled.

    Raises:
        ValueError: it is cut short, or holds something else than tensors by name; begins with ``where``.
    """
    try:
        try:
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            found = torch.load(file, map_location="cpu", weights_only=True)  # Of before torch 1.6.
    except UnpicklingError as error:
        raise ValueError(f"{where}: {file.name} is {NOT_JUST_TENSORS}") from error
    except (RuntimeError, EOFError, OSError) as error:
        reason = shorten_text(str(error), 150)
        raise ValueError(f"{where}: {file.name} cannot be read: {_COPY_AGAIN} ({reason})") from error
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{where}: {file.name} holds no tensors by name; give the folder that save_pretrained wrote")
    return found


def _what_instead(folder: Path) -> str:
    """What a folder without a model's weights has, and what is done with that; else empty."""
    names = os.listdir(folder)
    if "mm_projector.bin" in names:
        return "; its mm_projector.bin goes beside a language model, with --pretrain_mm_mlp_adapter"
    if any(name.startswith("global_step") for name in names) or "zero_to_fp32.py" in names:
        return "; DeepSpeed's shards are put together first, by the zero_to_fp32.py in the folder"
    return "; give a folder that has"
