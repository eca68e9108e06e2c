"""``--push_to_hub``: what of a run is sent to the hub, and what stands in the way is said before the model is read.

Sent are the model with its tokenizer and card, its scores and what it was trained on, and nothing else: no flags of the
machine, no path in ``config.json`` that means something only there, and no token in any file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from llava.messages import shorten_text
from llava.model.loading import LoadedModel
from llava.model.lora import has_adapters
from llava.model.model_card import CARD, bare_name, is_generated
from llava.train.arguments import TrainingArguments
from llava.train.distributed import broadcast_from_rank0
from llava.train.exposure_log import EXPOSURE_FILE
from llava.train.score_table import SCORE_FILES

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

logger = logging.getLogger(__name__)

_SENT = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "spiece.model", "chat_template.jinja", "preprocessor_config.json",
    "processor_config.json", CARD, *SCORE_FILES, EXPOSURE_FILE,
)  # fmt: skip
END, EVERY_SAVE, CHECKPOINT, ALL_CHECKPOINTS = "end", "every_save", "checkpoint", "all_checkpoints"
_LAST = "last-checkpoint"
Result = TypeVar("Result")


@dataclass
class HubTarget:
    """Where a run is sent.

    Attributes:
        name: of the repository, with its owner.
        token: with which it may be written.
        revision: the branch; None for the main one.
        strategy: ``--hub_strategy``.
        always: whether a checkpoint is sent while an earlier one is still on its way.
    """

    name: str
    token: str | None
    revision: str | None = None
    strategy: str = EVERY_SAVE
    always: bool = False
    _on_its_way: Future[None] | None = field(default=None, repr=False)

    def send(self, folder: Path, message: str) -> None:
        """Send the model of a folder, and wait for it.

        Raises:
            ValueError: it could not be sent.
        """
        self._wait()
        how = (
            f"the model is whole in {folder}, and could not be sent to {self.name}; to try again, give the same "
            "command with --resume_from_checkpoint auto"
        )
        _asking(lambda: self._commit(list(self._model_files(folder)), message), how)

    def send_checkpoint(self, folder: Path, step: int) -> None:
        """Send the model of a checkpoint, or all of it, while training goes on; a failure is a warning."""
        if self.strategy == END:
            return
        if self._on_its_way is not None and not self._on_its_way.done() and not self.always:
            logger.info("%s is not sent to the hub: an earlier one is still on its way", folder)
            return
        from huggingface_hub import HfApi

        operations = list(self._model_files(folder))
        if self.strategy in (CHECKPOINT, ALL_CHECKPOINTS):
            operations += self._all_files(folder, _LAST if self.strategy == CHECKPOINT else folder.name)

        def send() -> None:
            try:
                _asking(lambda: self._commit(operations, f"Step {step}"), f"{folder} could not be sent to the hub")
            except ValueError as error:
                logger.warning("%s", error)

        self._on_its_way = HfApi().run_as_future(send)

    def _wait(self) -> None:
        if self._on_its_way is not None:
            self._on_its_way.result()
            self._on_its_way = None

    def _commit(self, operations: list[CommitOperationAdd], message: str) -> None:
        from huggingface_hub import HfApi

        api = HfApi(token=self.token)
        if self.revision is not None:
            api.create_branch(self.name, branch=self.revision, exist_ok=True)
        if not self._may_replace_card(api):
            logger.warning("the %s of %s was changed on the hub, and stays as it is there", CARD, self.name)
            operations = [operation for operation in operations if operation.path_in_repo != CARD]
        api.create_commit(self.name, operations, commit_message=message, revision=self.revision)

    def _may_replace_card(self, api: HfApi) -> bool:
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        with TemporaryDirectory() as folder:
            try:
                path = api.hf_hub_download(self.name, CARD, revision=self.revision, local_dir=folder)
            except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
                return True
            return is_generated(Path(path))

    def _model_files(self, folder: Path) -> Iterator[CommitOperationAdd]:
        from huggingface_hub import CommitOperationAdd

        for path in sorted({path for pattern in _SENT for path in folder.glob(pattern)}):
            content: bytes | str = str(path)
            if path.name == "config.json":
                content = _without_folders(path)
            yield CommitOperationAdd(path.name, content)

    def _all_files(self, folder: Path, name: str) -> Iterator[CommitOperationAdd]:
        from huggingface_hub import CommitOperationAdd

        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            yield CommitOperationAdd(f"{name}/{path.relative_to(folder).as_posix()}", str(path))


def _without_folders(config: Path) -> bytes:
    """A ``config.json`` in which the vision model's folder, whose weights are in the checkpoint, is its name alone."""
    content = json.loads(config.read_text(encoding="utf-8"))
    if content.get("mm_vision_tower"):
        content["mm_vision_tower"] = bare_name(content["mm_vision_tower"])
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def prepare_hub(args: TrainingArguments) -> HubTarget:
    """Make the repository that ``--push_to_hub`` names.

    The token leaves the arguments, which are saved beside every model, and transformers' trainer sends nothing itself:
    all of the folder, with a card of its own in place of the one that is there.

    Raises:
        ValueError: there is no token, or the hub cannot be reached or does not allow it.
    """
    from huggingface_hub import HfApi, constants, get_token

    token = args.hub_token or get_token()
    if constants.HF_HUB_OFFLINE:
        raise ValueError("--push_to_hub: the hub is not to be asked (HF_HUB_OFFLINE is set); leave one of them out")
    if token is None:
        raise ValueError("--push_to_hub needs a token of the hub: hf auth login, HF_TOKEN, or --hub_token")
    name = args.hub_model_id or Path(str(args.output_dir)).absolute().name

    def make() -> str:
        made = HfApi(token=token).create_repo(name, private=args.hub_private_repo, exist_ok=True)
        return str(made.repo_id)

    full = broadcast_from_rank0(
        lambda: _asking(make, f"--push_to_hub: {name} cannot be written on {constants.ENDPOINT}")
    )
    args.hub_model_id, args.hub_token, args.push_to_hub = full, None, False
    strategy = getattr(args.hub_strategy, "value", args.hub_strategy)
    return HubTarget(full, token, args.hub_revision, strategy, args.hub_always_push)


def check_model(loaded: LoadedModel) -> None:
    """A ValueError where a model that is sent could not be loaded by anybody else."""
    vision = loaded.vision
    if vision is not None and not vision.save_vision_tower and Path(vision.vision_tower).is_dir():
        raise ValueError(
            f"--push_to_hub: the vision model is a folder of this machine ({vision.vision_tower}), which nobody else "
            "has; give --save_vision_tower true, or the name that it has on the hub"
        )
    if has_adapters(loaded.model):
        raise ValueError(
            "--push_to_hub: adapters name the folder of their base model, which is this machine's; merge them when "
            "they are trained (python -m llava.model.merge_lora) and send the result (hf upload)"
        )


def _asking(ask: Callable[[], Result], what: str) -> Result:
    """What the hub answers; a ValueError, beginning with ``what``, where it refuses or cannot be reached."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The base of what its library for HTTP raises, which is not always an OSError.
    failures: tuple[type[BaseException], ...] = (*HfHubHTTPError.__bases__, OSError, HFValidationError)
    try:
        return ask()
    except failures as error:
        raise ValueError(f"{what}: {shorten_text(str(error), 300)}") from error
