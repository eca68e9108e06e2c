"""The lock of a run's folder: one holder, recognised when it is gone, left alone where that cannot be told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava.train import run_lock
from llava.train.run_lock import LOCK, release_lock, take_lock

ROOT = Path(__file__).parents[2]

TAKE = """
import os, sys
from pathlib import Path
from llava.train.run_lock import take_lock
print(os.getpid(), flush=True)
sys.stdin.readline()
try:
    take_lock(Path(sys.argv[1]))
except ValueError as error:
    print(error, flush=True)
else:
    print("taken", flush=True)
    sys.stdin.readline()
"""


class Taker:
    """A process that takes a folder's lock when it is told to, and keeps it until it is closed."""

    def __init__(self, python: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [python, "-c", TAKE, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        self.pid = int(self._hear())

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def _hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def take(self) -> str:
        self.tell()
        return self._hear()

    def close(self) -> None:
        if self.process.poll() is None:
            self.tell()
        self.process.wait(timeout=30)


def write_lock(folder: Path, **changes: object) -> None:
    """A lock as a process that has ended would have left it, but for some entries."""
    with_own = run_lock._describe_process("", 0)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    content = {**vars(with_own), "pid": ended.pid, "token": "theirs", **changes}
    (folder / LOCK).write_text(json.dumps(content))


def test_one_run_has_it_and_names_itself_to_the_other(tmp_path: Path, warm_python: str) -> None:
    first, second = (Taker(warm_python, tmp_path) for _ in range(2))
    assert first.take() == "taken"
    said = second.take()
    assert f"--output_dir {tmp_path} is in use by another run" in said
    assert f"process {first.pid} on {os.uname().nodename}" in said
    assert time.strftime("since %Y-%m-%dT") in said
    assert "disk" not in said
    first.close()
    second.close()
    assert not list(tmp_path.iterdir())


def test_a_killed_runs_lock_is_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    killed = os.fork()
    if killed == 0:
        try:
            take_lock(tmp_path)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    # Not waited for: it is there as a zombie, as a child of a scheduler's step may be.
    os.waitid(os.P_PID, killed, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / LOCK).is_file()
    take_lock(tmp_path)
    assert f"the run that had it is gone (process {killed}" in caplog.text
    release_lock(tmp_path)
    os.waitpid(killed, 0)


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_takes_it(tmp_path: Path, stale: bool, warm_python: str) -> None:
    if stale:
        write_lock(tmp_path)
    takers = [Taker(warm_python, tmp_path) for _ in range(4)]
    for taker in takers:
        taker.tell()
    said = [taker._hear() for taker in takers]
    assert said.count("taken") == 1, said
    assert sum("is in use by another run" in line for line in said) == 3, said
    for taker in takers:
        taker.close()
    assert not list(tmp_path.iterdir())


def test_a_number_that_another_process_has_now_is_no_holder(tmp_path: Path) -> None:
    started = run_lock._process_start(os.getpid())
    write_lock(tmp_path, pid=os.getpid(), process_started=started - 1000)
    take_lock(tmp_path)
    release_lock(tmp_path)
    write_lock(tmp_path, pid=os.getpid(), process_started=started)
    with pytest.raises(ValueError, match="in use by another run"):
        take_lock(tmp_path)


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"host": "another-node"}, r"cannot be seen from here.*if it does not, remove .*run\.lock"),
        ({"namespace": "pid:[1]"}, r"cannot be seen from here"),
    ],
)
def test_what_runs_elsewhere_is_left_alone(tmp_path: Path, changes: dict, remedy: str) -> None:
    write_lock(tmp_path, **changes)
    with pytest.raises(ValueError, match=remedy):
        take_lock(tmp_path)
    assert json.loads((tmp_path / LOCK).read_text())["token"] == "theirs"


@pytest.mark.parametrize(("restart", "taken"), [(1, True), (0, False)])
def test_a_requeued_job_takes_the_lock_of_its_former_start_on_another_node(
    tmp_path: Path, restart: int, taken: bool
) -> None:
    write_lock(tmp_path, host="another-node", job="17", restart=0)
    if taken:
        take_lock(tmp_path, "17", restart)
        release_lock(tmp_path)
    else:
        with pytest.raises(ValueError, match="job 17"):
            take_lock(tmp_path, "17", restart)


@pytest.mark.parametrize(("since", "gone"), [("2001-01-01T00:00:00+00:00", True), ("2999-01-01T00:00:00+00:00", False)])
def test_a_lock_from_before_a_reboot_is_stale(tmp_path: Path, since: str, gone: bool) -> None:
    write_lock(tmp_path, boot="another", since=since)
    if gone:
        take_lock(tmp_path)
        release_lock(tmp_path)
    else:  # Another machine of the same name.
        with pytest.raises(ValueError, match="in use"):
            take_lock(tmp_path)


@pytest.mark.parametrize(("machine", "gone"), [("own", True), ("", True), ("another", False), (None, True)])
def test_another_machine_of_the_same_name_is_no_reboot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str | None, gone: bool
) -> None:
    """Cloud machines and containers may all be called localhost; a lock of an earlier release says nothing of it."""
    read_line = run_lock._read_line
    monkeypatch.setattr(run_lock, "_read_line", lambda p: "own" if p.name == "machine-id" else read_line(p))
    write_lock(tmp_path, boot="another", since="2001-01-01T00:00:00+00:00", machine=machine)
    if machine is None:
        content = json.loads((tmp_path / LOCK).read_text())
        del content["machine"]
        (tmp_path / LOCK).write_text(json.dumps(content))
    if gone:
        take_lock(tmp_path)
        release_lock(tmp_path)
    else:
        with pytest.raises(ValueError, match=r"in use by another run .*cannot be seen from here"):
            take_lock(tmp_path)


def test_a_lock_that_cannot_be_read_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_TRIES", 2)
    (tmp_path / LOCK).write_text("{")
    with pytest.raises(ValueError, match=r"cannot be read.*remove that file"):
        take_lock(tmp_path)


def test_a_process_may_take_its_own_lock_again(tmp_path: Path) -> None:
    take_lock(tmp_path)
    take_lock(tmp_path)
    release_lock(tmp_path)
    release_lock(tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_files_cannot_be_linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    take_lock(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]
    monkeypatch.setattr(run_lock, "_held", {})
    with pytest.raises(ValueError, match="in use"):
        take_lock(tmp_path)


def test_a_fresh_lock_taken_for_a_stale_one_is_put_back(tmp_path: Path) -> None:
    write_lock(tmp_path)
    stale = run_lock._read(tmp_path / LOCK)
    take_lock(tmp_path)  # Another was first.
    assert stale is not None
    assert not run_lock._set_aside(tmp_path / LOCK, stale)
    take_lock(tmp_path)
    release_lock(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_to_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot be written to"):
        take_lock(tmp_path)


def test_a_forked_worker_gives_back_nothing(tmp_path: Path) -> None:
    """A data loader's worker has a copy of the note that the lock is held, and ends before the run does."""
    take_lock(tmp_path)
    try:
        pid = os.fork()
        if pid == 0:
            release_lock(tmp_path)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        assert (tmp_path / LOCK).is_file()
    finally:
        release_lock(tmp_path)
    assert not (tmp_path / LOCK).exists()
