"""What runs of ``test_storage.py`` call before they begin."""

from __future__ import annotations

from llava import storage


def shorten_pauses(seconds: float = 0.01) -> None:
    """Let reads that failed be tried again at once."""
    storage.PAUSES = (seconds,) * 4


def lose_temporary_folder() -> None:
    """Let there be no folder for temporary files from the first step on."""
    import tempfile

    from llava.train.trainer import LlavaTrainer

    run_epoch = LlavaTrainer._run_epoch

    def without(self, *words, **named):
        tempfile.tempdir = "/no/such/folder"
        return run_epoch(self, *words, **named)

    LlavaTrainer._run_epoch = without
