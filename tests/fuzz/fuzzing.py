"""How much is fuzzed, and what every target takes for granted.

``ci`` is a small slice, the same in every run, which the other tests run beside. ``offline`` is the search, with
23,000 cases and a memory of what failed: ``make fuzz``, which loads this module as a plugin of pytest.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.database import DirectoryBasedExampleDatabase

from llava.messages import explain_error

Test = TypeVar("Test", bound=Callable[..., Any])

ROOT = Path(__file__).parents[2]
OFFLINE = "offline"
_COMMON: dict[str, Any] = {
    "deadline": None,  # Each target has a limit of its own where time is what it is about.
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    "print_blob": True,
}
settings.register_profile("ci", derandomize=True, database=None, **_COMMON)
settings.register_profile(OFFLINE, database=DirectoryBasedExampleDatabase(ROOT / ".hypothesis" / "examples"), **_COMMON)
if settings.get_current_profile_name() == "default":
    settings.load_profile("ci")

MOST_SECONDS = 60
"""What no single case takes, on a machine that does other things as well."""


def cases(offline: int, in_ci: int) -> Callable[[Test], Test]:
    """How many cases a target gets in a search, of 23,000 for all together, and in each run of CI."""
    count = offline if settings.get_current_profile_name() == OFFLINE else in_ci
    return settings(max_examples=count)


class Hang(BaseException):
    """A case that does not end; no ``except Exception`` takes it for an error of a user."""


@contextmanager
def ends_in_time(seconds: float = MOST_SECONDS) -> Iterator[None]:
    """A ``Hang`` in the midst of what takes longer; C code that never returns to Python is not ended."""

    def give_up(number: int, frame: object) -> None:
        raise Hang(f"it takes longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def attempt(run: Callable[..., Any], *words: Any, **named: Any) -> Any:
    """What a call gives, or the ValueError that a user would be shown as one line; any other error is a finding."""
    with ends_in_time():
        try:
            return run(*words, **named)
        except ValueError as error:
            said = explain_error(error)
            assert said.strip()
            assert len(said) < 2000
            return error


def names(error: ValueError, *one_of: str) -> bool:
    """Whether what a user is shown names a file, a sample or a flag."""
    return any(name in str(error) for name in one_of)


# As a plugin of pytest: how many cases each target had.

_COUNTS = re.compile(r"(\d+) passing, (\d+) failing, and (\d+) invalid test cases")
_counted: dict[str, tuple[int, int]] = {}


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Hang the numbers of a target on its last report, with which they also come from other processes."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.when == "teardown" and (statistics := getattr(item, "hypothesis_statistics", "")):
        found = [(int(passing), int(failing)) for passing, failing, _ in _COUNTS.findall(statistics)]
        report.user_properties.append(("cases", [sum(numbers) for numbers in zip(*found, strict=True)]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, value in report.user_properties:
        if name == "cases" and report.when == "teardown" and value:
            _counted[report.nodeid] = tuple(value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """A line for each target, and their sum."""
    if _counted:
        terminalreporter.section("cases")
        for target, (passing, failing) in sorted(_counted.items()):
            terminalreporter.write_line(f"{passing + failing:6} {failing:6} failed  {target}")
        total, failed = (sum(numbers) for numbers in zip(*_counted.values(), strict=True))
        terminalreporter.write_line(f"{total + failed:6} {failed:6} failed  in all")
