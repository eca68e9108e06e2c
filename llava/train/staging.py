"""``--stage_media`` in a run of several ranks and machines: all wait for the slowest, and fail with any."""

from __future__ import annotations

import datetime
import socket
import uuid

import torch.distributed as dist

from llava.data.module import DataModule, documents_of
from llava.data.staging import list_files, stage_files
from llava.model.grad_sync import is_distributed
from llava.train.arguments import DataArguments, TrainingArguments
from llava.train.distributed import AgreedError, broadcast_from_rank0

_LONGEST = datetime.timedelta(days=7)
"""What the copying on other machines may take. That each gets on is seen on its own: ``--stage_timeout``."""


def stage_media(data: DataModule, data_args: DataArguments, training_args: TrainingArguments) -> None:
    """Copy the media of a run to a disk of each machine, from which its datasets read them then.

    Raises:
        AgreedError: on some machine they cannot be copied; names its ranks.
    """
    if data_args.stage_media is None or not training_args.do_train:
        return
    datasets = [documents_of(one) for one in (data["train_dataset"], data["eval_dataset"]) if one is not None]
    # A group of its own: others are given up after --ddp_timeout, and to copy may take hours. It is made before, while
    # no rank has to wait for another.
    group = dist.new_group(backend="gloo", timeout=_LONGEST) if is_distributed() else None
    run = broadcast_from_rank0(lambda: uuid.uuid4().hex)
    staged, failure = None, None
    try:
        files = list_files(one.records for one in datasets)
        staged = stage_files(files, data_args.stage_media, data_args.stage_timeout, run)
    except ValueError as error:
        failure = f"{error} (on {socket.gethostname()})"
    failures = [failure]
    if group is not None:
        failures *= dist.get_world_size()
        dist.all_gather_object(failures, failure, group=group)
        dist.destroy_process_group(group)
    if said := list(dict.fromkeys(told for told in failures if told)):  # The ranks of a machine say the same.
        raise AgreedError("; ".join(said))
    for dataset in datasets:
        dataset.staged = staged
