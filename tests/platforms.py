"""A program for ``test_platforms``: the library as a system without Linux's own names sees it.

It loads all modules once, so that other packages are there, takes the names away, and loads the modules anew. With
arguments it then trains with them: they are a command line of ``llava.train.train``.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import select
import signal
import sys

MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "syslog", "decord")
NAMES = {
    os: (
        "sched_getaffinity fork forkpty register_at_fork getuid geteuid getgid setsid killpg getpgid mkfifo "
        "nice O_NOFOLLOW O_DIRECTORY O_DIRECT O_CLOEXEC O_NONBLOCK posix_fadvise posix_fallocate sched_yield getloadavg"
    ),
    signal: "SIGUSR1 SIGUSR2 SIGALRM SIGKILL SIGHUP SIGQUIT SIGSTOP SIGCHLD setitimer ITIMER_REAL alarm pause sigwait",
    select: "poll epoll",
}


def load_all() -> list[str]:
    """Import every module of the library but programs, and return their names."""
    import llava

    names = [module.name for module in pkgutil.walk_packages(llava.__path__, "llava.")]
    names = [name for name in names if not name.endswith("__main__")]
    for name in names:
        importlib.import_module(name)
    return names


def main() -> int:
    before = load_all()
    for name in [name for name in sys.modules if name.partition(".")[0] == "llava"]:
        del sys.modules[name]
    for name in MODULES:
        sys.modules[name] = None  # type: ignore[assignment]
    for module, names in NAMES.items():
        for name in names.split():
            if hasattr(module, name):
                delattr(module, name)
    assert load_all() == before
    print(len(before))
    if sys.argv[1:]:
        from llava.train.train import main as train

        trainer = train(sys.argv[1:])
        print(trainer.state.global_step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
