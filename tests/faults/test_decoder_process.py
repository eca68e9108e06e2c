"""Decoding with a time limit: hanging and crashing decoders are errors, the next file decodes, nobody is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from llava.data import decoding as decoder_process
from llava.data import worker_pool
from llava.data.dataset import SupervisedDataset
from llava.data.decoding import DecoderProcess, FrameRequest
from llava.data.media import MediaError, sample_video
from llava.types import BadSample, Media, Record, Turn

ROOT = Path(__file__).parents[2]

# A decoder that does what the name of a file says. `hang` never comes back from C and keeps Python's lock.
PROGRAM = """
import ctypes, os, sys
sys.path[:] = {path!r}
from llava.data import decoding as decoder

def decode(request, decode_frames=decoder.decode_frames):
    if "hang" in request.path:
        ctypes.PyDLL(None).sleep(1000)
    if "crash" in request.path:
        ctypes.string_at(0)
    if "break" in request.path:
        raise RuntimeError("no decoder should raise this")
    if "huge" in request.path:
        raise MemoryError
    if "chat" in request.path:
        os.write(1, b"a decoder prints something\\n")
        print("and so does Python", flush=True)
    return decode_frames(request)

decoder.decode_frames = decode
decoder.main()
"""


@pytest.fixture
def faulty(monkeypatch):
    """Decoder processes that hang and crash on demand; none is left behind."""
    monkeypatch.setattr(worker_pool, "_PROGRAM", PROGRAM)
    monkeypatch.setattr(decoder_process, "_own", None)
    yield
    if decoder_process._own is not None:
        decoder_process._own.end()


def test_a_relative_path_is_from_where_its_program_is_now(
    media_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = next(media_dir.glob("*.mp4"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MediaError, match="no such file"):
        sample_video(clip.name, 2, timeout=60)
    monkeypatch.chdir(media_dir)
    assert len(sample_video(clip.name, 2, timeout=60).indices) == 2


def is_running(pid: int) -> bool:
    """Whether there is a process of that number that is not only waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(pid: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while is_running(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


@pytest.mark.parametrize("num_frames", [1, 4, 40])
def test_frames_and_errors_are_those_of_decoding_here(media_dir, tmp_path, num_frames):
    (tmp_path / "text.mp4").write_text("questo non è un video")
    clip = str(media_dir / "a.mp4")
    for options in ({}, {"fps": 2.0, "max_frames": 7}, {"split": (3, 8)}):
        here, there = (sample_video(clip, num_frames, **options, timeout=limit) for limit in (0, 60))
        assert torch.equal(here.frames, there.frames)
        assert (here.indices, here.times) == (there.indices, there.times)
    for path in (tmp_path / "text.mp4", tmp_path / "nothing \ud83d.mp4", tmp_path):
        messages = []
        for limit in (0, 60):
            with pytest.raises(MediaError) as caught:
                sample_video(str(path), num_frames, timeout=limit)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]


def test_one_process_serves_many_files(media_dir):
    sample_video(str(media_dir / "a.mp4"), 2, timeout=60)
    process = decoder_process._own
    with pytest.raises(MediaError):
        sample_video(str(media_dir), 2, timeout=60)
    sample_video(str(media_dir / "b.mp4"), 2, timeout=60)
    assert decoder_process._own is process


@pytest.mark.parametrize(
    ("name", "limit", "message"),
    [
        ("hang.mp4", 0.5, r"hang\.mp4: decoding it takes longer than --decode_timeout 0\.5 s"),
        ("crash.mp4", 60, r"crash\.mp4: decoding it brought the decoder down \(by signal 11\)"),
        ("break.mp4", 60, r"break\.mp4: decoding it brought the decoder down \(with status 1\)"),
    ],
)
def test_fault_ends_the_process_and_not_the_next_file(media_dir, tmp_path, faulty, name, limit, message):
    sample_video(str(media_dir / "a.mp4"), 2, timeout=60)
    pid = decoder_process._own._process.pid
    with pytest.raises(MediaError, match=message):
        sample_video(str(tmp_path / name), 2, timeout=limit)
    assert not is_running(pid)
    assert len(sample_video(str(media_dir / "a.mp4"), 2, timeout=60).frames) == 2
    assert decoder_process._own._process.pid != pid


def test_forked_process_lets_go_of_its_parent_s_decoder(media_dir):
    sample_video(str(media_dir / "a.mp4"), 2, timeout=60)
    pipe = decoder_process._own._requests
    child = os.fork()
    if not child:
        os._exit(0 if decoder_process._own is None and pipe.closed else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert not pipe.closed


def test_memory_that_is_not_there(tmp_path, faulty):
    with pytest.raises(MediaError, match=r"huge\.mp4: its frames do not fit into memory"):
        sample_video(str(tmp_path / "huge.mp4"), 2, timeout=60)


def test_what_a_decoder_prints_is_no_reply(media_dir, tmp_path, faulty):
    clip = tmp_path / "chat.mp4"
    clip.write_bytes((media_dir / "a.mp4").read_bytes())
    assert torch.equal(sample_video(str(clip), 3, timeout=60).frames, sample_video(str(clip), 3).frames)


def test_signals_to_end_a_run_leave_the_decoder_at_work(media_dir):
    process = DecoderProcess()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        process._process.send_signal(number)
    assert len(process.decode(FrameRequest(str(media_dir / "a.mp4"), 2), 60).pixels) == 2
    process.end()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_hanging_sample_is_reported_and_the_others_come(media_dir, visual_tokenizer, tiny_vision, faulty, num_workers):
    names = ["a.mp4", "hang.mp4", "b.mp4", "crash.mp4", "a.mp4", "b.mp4"]
    records = [
        Record(
            f"{i}", (Turn("user", "<video>"), Turn("assistant", "una stella")), (Media("video", str(media_dir / name)),)
        )
        for i, name in enumerate(names)
    ]
    dataset = SupervisedDataset(records, visual_tokenizer, tiny_vision, 512, on_bad_sample="skip", decode_timeout=3.0)
    # A process that was forked must not share its parent's decoder.
    dataset[0]
    context = "fork" if num_workers else None
    found = list(DataLoader(dataset, batch_size=None, num_workers=num_workers, multiprocessing_context=context))
    assert [sample.id for sample in found] == [record.id for record in records]
    bad = {sample.id: sample.reason for sample in found if isinstance(sample, BadSample)}
    assert bad == {
        "1": "decoding it takes longer than --decode_timeout 3 s",
        "3": "decoding it brought the decoder down (by signal 11)",
    }
    assert torch.equal(found[0].media[0].frames, found[4].media[0].frames)


ASKS = """
import sys
from llava.data import decoding as decoder_process, worker_pool
from llava.data.decoding import FrameRequest
worker_pool._PROGRAM, decoder_process._GRACE = sys.argv[1], 0.0
process = decoder_process.DecoderProcess()
print(process._process.pid, flush=True)
if sys.argv[2] == "busy":
    process.decode(FrameRequest("hang.mp4", 1), 1.0)
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_decoder_ends_with_the_process_that_asks(state, warm_python):
    command = [warm_python, "-c", ASKS, PROGRAM, state]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    asking = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    pid = int(asking.stdout.readline())
    assert is_running(pid)
    asking.kill()
    asking.communicate()
    wait_until_gone(pid)
