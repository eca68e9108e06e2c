"""A ``python`` that starts at once: its processes are forked from a server that has imported the large packages.

Most of what a tiny run takes is the import of torch, transformers and DeepSpeed. ``WarmPython`` starts the server, and
its ``path`` is a program that takes a Python's words: ``-m module``, ``-c program``, ``-`` or a file, then others. The
program has its caller's folder, environment, streams and signals, its end is its caller's, and no module of ``llava``
is imported before it begins. Tests about the start itself take ``sys.executable``.

The workers of one test session share a server, which ends when the last of them does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch", "torch.distributed.run", "transformers.trainer", "transformers.models.auto.modeling_auto", "peft",
    "datasets", "torchvision", "av", "PIL.Image", "deepspeed", "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.llama.modeling_llama", "transformers.models.dinov2.modeling_dinov2",
)  # fmt: skip

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

CLIENT = """#!{python} -IS
import json, os, signal, socket, sys

def read_number():
    got = b""
    while len(got) < 8:
        if not (more := connection.recv(8 - len(got))):
            sys.exit("the server of tests/warm_python.py is gone")
        got += more
    return int.from_bytes(got, "big", signed=True)

connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
order = {{"words": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
data = json.dumps(order).encode()
socket.send_fds(connection, [len(data).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(data)
pid = read_number()

def hand_on(number, frame):
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass  # It has ended by itself, and its status is on its way.

for number in {signals}:
    signal.signal(number, hand_on)
status = read_number()
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


class WarmPython:
    """The server's address and the program that asks it for processes.

    Args:
        folder: a folder that the workers of a test session share.

    Attributes:
        path: the program; Python itself where processes cannot be followed (other systems than Linux).
    """

    def __init__(self, folder: Path) -> None:
        import fcntl

        self.path, address = sys.executable, folder / "server"
        if not hasattr(os, "pidfd_open") or len(os.fsencode(address)) > 100:
            return
        client = folder / "warm_python"
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            connection = _connect(address)
            if connection is None:  # No worker has begun, or all that had have ended.
                self._start(address)
                words = {"python": sys.executable, "address": str(address), "signals": [int(s) for s in SIGNALS]}
                client.write_text(CLIENT.format(**words))
                client.chmod(0o755)
                connection = _connect(address)
        assert connection is not None
        self.path, self._connection = str(client), connection

    def _start(self, address: Path) -> None:
        address.unlink(missing_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with address.with_name("said").open("w") as said:
            process = subprocess.Popen(
                [sys.executable, __file__, str(address)],
                stdin=subprocess.DEVNULL, stdout=said, stderr=said, env=environment, start_new_session=True,
            )  # fmt: skip
        while not address.exists():
            if process.poll() is not None:
                raise RuntimeError(address.with_name("said").read_text())
            time.sleep(0.02)

    def close(self) -> None:
        if self.path != sys.executable:
            self._connection.close()


def _connect(address: Path) -> socket.socket | None:
    """The server lives as long as any of these connections does; None where there is none."""
    connection = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):
        connection.connect(str(address))
        connection.sendall(bytes(8))
        if connection.recv(1):
            return connection
    connection.close()
    return None


# --- the server ---------------------------------------------------------------------------------------


def import_packages() -> None:
    for name in PACKAGES:
        if importlib.util.find_spec(name.partition(".")[0]) is not None:
            with contextlib.suppress(RuntimeError):  # A torchvision built for another torch; the tests do without it.
                importlib.import_module(name)
    sys.modules.pop("torch.distributed.run")  # Run as a program, it would warn that it is imported already.
    if "deepspeed" in sys.modules:
        import deepspeed.ops
        import deepspeed.utils.numa

        # It would try a compiler on each of its operators at every start, and build one, of shared memory, that only
        # its inference calls.
        deepspeed.ops.__compatible_ops__ = defaultdict(bool)
        # It would start a program that tells the cores, on a CPU at every gradient of ZeRO-3.
        deepspeed.utils.numa.get_numa_cores = functools.cache(deepspeed.utils.numa.get_numa_cores)


def serve(address: str) -> dict[str, Any]:
    """Fork a process for each order; returns in the processes alone, with the order."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address + "-")
    listener.listen(64)
    import_packages()
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    Path(address + "-").rename(address)
    workers: list[socket.socket] = []
    deadline = time.monotonic() + 60
    while workers or time.monotonic() < deadline:
        for ready in select.select([listener, *workers], [], [], 5)[0]:
            if ready is not listener:
                workers.remove(ready)
                ready.close()
                deadline = 0
                continue
            connection, _ = listener.accept()
            head, descriptors, _, _ = socket.recv_fds(connection, 8, 3)
            if not descriptors:
                workers.append(connection)
                connection.sendall(b"+")
            elif os.fork():
                connection.close()
                for descriptor in descriptors:
                    os.close(descriptor)
            else:
                for other in (listener, *workers):
                    other.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                return follow(connection, int.from_bytes(head, "big"), descriptors)
    os._exit(0)


def follow(connection: socket.socket, size: int, descriptors: list[int]) -> dict[str, Any]:
    """Fork once more: the process returns with its order, its parent says how it ends, or ends it with its caller."""
    with connection.makefile("rb") as file:
        order = json.loads(file.read(size))
    pid = os.fork()
    if not pid:
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        return order
    for descriptor in (0, 1, 2, *descriptors):
        os.close(descriptor)
    ended = os.pidfd_open(pid)
    with contextlib.suppress(OSError):
        connection.sendall(pid.to_bytes(8, "big", signed=True))
        if ended not in select.select([connection, ended], [], [])[0]:
            os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(8, "big", signed=True))
    os._exit(0)


def become(order: dict[str, Any]) -> tuple[str, str]:
    """Take the order's folder, environment and words; the kind of program ("-m", "-c", "file") and which."""
    import numpy as np

    os.chdir(order["folder"])
    own = [os.path.realpath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [path for path in sys.path[1:] if path not in own]
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.path[:0] = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    importlib.invalidate_caches()
    np.random.seed()
    words, streams = order["words"], (sys.stdout, sys.stderr)
    if words[0] == "-u":
        words = words[1:]
        for stream in streams:
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(write_through=True)
    kind = words[0] if words[0] in ("-m", "-c") else "file"
    program = words.pop(1 if kind != "file" else 0)
    sys.argv = [program, *words] if kind == "file" else words
    own_folder = {"-m": os.getcwd(), "-c": "", "file": "" if program == "-" else str(Path(program).resolve().parent)}
    sys.path.insert(0, own_folder[kind])
    return kind, program


def run(kind: str, program: str) -> None:
    if kind == "-m":
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    elif kind == "file" and program != "-":
        runpy.run_path(program, run_name="__main__")
    else:
        text = sys.stdin.read() if program == "-" else program
        main = type(sys)("__main__")
        main.__dict__["__builtins__"] = __builtins__
        sys.modules["__main__"] = main
        exec(compile(text, "<stdin>" if program == "-" else "<string>", "exec"), main.__dict__)


def end(kind: str, program: str) -> None:
    """Run a program and end as Python does, but without taking the imported packages apart, which takes a second."""
    status: Any = 0
    try:
        run(kind, program)
    except SystemExit as error:
        status = error.code
    except BaseException as error:  # noqa: BLE001 (all of them end the program)
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    if status is not None and not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit((status or 0) & 0xFF)


if __name__ == "__main__":
    end(*become(serve(sys.argv[1])))
