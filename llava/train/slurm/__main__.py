"""``llava slurm``, or ``python -m llava.train.slurm``: a module within a Slurm job, on all of its nodes.

A job's script ends with it::

    exec python -m llava.train.slurm --nproc_per_node gpu -m llava.train.train --config my_run.yaml ...

On several nodes ``srun`` starts one launcher a node, which start the ranks. The first node of the job's list is where
they meet, at a port that comes from the job's number. A signal to this process, which Slurm sends before the time is up
(``#SBATCH --signal=B:USR1@120``), goes on to every node; what has saved and left with status 85 is requeued, once.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import FrameType

from llava.command import CommandLineError, CommandParser, run_command
from llava.messages import shorten
from llava.train.command_line import read_variables
from llava.train.preemption import PREEMPTED

PROGRAM = "python -m llava.train.slurm"
NOT_YET = 128 + getattr(signal, "SIGUSR1", 10)
"""Status of what was asked to stop in the first moments of its start, when it did not listen yet."""
WAIT = 300
"""Seconds that other nodes have once one has ended: to save, or to find out that it is gone."""
FIRST_PORT, NUM_PORTS = 10_000, 20_000
"""Below 32768, from where systems give ports to whoever asks for any."""
_TRIES = 16
_TIMEOUT = 60.0  # of scontrol, in seconds
_VARIABLES = (
    "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_NODEID", "SLURM_ARRAY_JOB_ID",
    "SLURM_ARRAY_TASK_ID", "SLURM_NNODES", "SLURM_STEP_NUM_TASKS", "PYTHON_EXEC",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What Slurm says of the job that this process is in.

    Attributes:
        number: of the job, different for each task of an array; 0 outside of one.
        name: of the job for ``scontrol``; a task of an array has its number behind that of the array.
        nodes: the list of nodes as Slurm writes it, such as ``gpu[3-4]``.
        num_nodes: how many these are.
    """

    number: int = 0
    name: str = ""
    nodes: str = ""
    num_nodes: int = 1

    @staticmethod
    def read() -> Job:
        """The job of this process."""
        given = read_variables(_VARIABLES)
        number = given.get("SLURM_JOB_ID", "")
        if not number.isdigit():
            return Job()
        tasks = given.get("SLURM_STEP_NUM_TASKS", "")
        if tasks.isdigit() and int(tasks) > 1:
            # Each would start a whole training, on all nodes.
            raise ValueError(
                f"srun has started this {tasks} times (SLURM_STEP_NUM_TASKS), and it starts the ranks of all nodes "
                "itself: let the job's script start it once, without srun, with --nproc_per_node for a node's ranks; "
                "or, if that variable comes from where the job was submitted, unset it"
            )
        array, task = given.get("SLURM_ARRAY_JOB_ID", ""), given.get("SLURM_ARRAY_TASK_ID", "")
        # One task of an array has the array's number, which would mean all of them.
        name = f"{array}_{task}" if array and task else number
        nodes = given.get("SLURM_JOB_NUM_NODES", given.get("SLURM_NNODES", "1"))
        if not nodes.isdigit() or not int(nodes):
            raise ValueError(f"SLURM_JOB_NUM_NODES is {shorten(nodes)}, expected a number of nodes")
        return Job(int(number), name, given.get("SLURM_JOB_NODELIST", ""), int(nodes))


def build_parser() -> CommandParser:
    parser = CommandParser(
        prog=PROGRAM,
        usage="%(prog)s [--nproc_per_node N] [--no_requeue] -m MODULE [WORDS OF THE MODULE ...]",
        description="Run a module within a Slurm job: with several ranks on each of its nodes, asked to stop on all of "
        "them by a signal, and requeued when it has saved a checkpoint. Outside of a job it runs on this machine.",
    )
    parser.add_argument(
        "--nproc_per_node",
        metavar="N",
        help="ranks on each node, or gpu for one a GPU (default: on one node the module itself, without a launcher; "
        "on several, gpu)",
    )
    parser.add_argument("--no_requeue", action="store_true", help="leave it to whoever started this to requeue the job")
    # As the help says it: split_words has taken it off, whose words are the module's to read.
    parser.add_argument(
        "-m", dest="program", nargs=argparse.REMAINDER, metavar="MODULE", help="what to run, and its words"
    )
    # srun's tasks are given these by the process that starts srun.
    for name in ("--rendezvous", "--nnodes"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a module within a job; its exit status is this process's too."""

    def run() -> int:
        words = list(sys.argv[1:] if argv is None else argv)
        own, program = split_words(words)
        args = build_parser().parse_args(own)
        if not program:
            raise CommandLineError("-m MODULE is missing; see --help")
        ranks = args.nproc_per_node
        if ranks not in (None, "gpu") and not (ranks.isdecimal() and int(ranks)):
            raise CommandLineError(f"--nproc_per_node is {shorten(ranks)}, expected a number or gpu")
        if args.rendezvous is not None:
            return run_on_node(args.rendezvous, args.nnodes, args.nproc_per_node, program)
        job = Job.read()
        status, requeue = watch_over(build_command(job, args.nproc_per_node, program))
        if requeue and not args.no_requeue and status in (PREEMPTED, NOT_YET) and job.number:
            requeue_job(job)
        return status

    return run_command(run)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of this command, and from ``-m`` on those of the module."""
    place = next((place for place, word in enumerate(words) if word == "-m"), len(words))
    program = list(words[place:])
    return list(words[:place]), program if len(program) > 1 else []


def build_command(job: Job, processes: str | None, program: Sequence[str]) -> list[str]:
    """The command that runs a module on all nodes of a job.

    Raises:
        ValueError: the nodes or a port for them cannot be found.
    """
    # As torchrun finds the Python of its ranks.
    python = read_variables(("PYTHON_EXEC",)).get("PYTHON_EXEC", sys.executable)
    if job.num_nodes == 1:
        launcher = ["-m", "llava.train.launch", "--standalone", "--nproc_per_node", str(processes)] if processes else []
        return [python, *launcher, *program]
    host = find_hosts(job)[0]
    port = find_port(job.number)
    print(f"job {job.name}: {job.num_nodes} nodes, which meet at {host}:{port}", file=sys.stderr, flush=True)
    return [
        "srun", "--nodes", str(job.num_nodes), "--ntasks", str(job.num_nodes), "--ntasks-per-node", "1",
        # A launcher starts the ranks of its node, and has all cores of it.
        "--cpu-bind", "none",
        # Ranks that have saved leave one after the other, with a status that is not 0: none of them may be killed for
        # it. Where one has really failed, the others, which may wait for it for half an hour, are ended by --wait.
        "--kill-on-bad-exit=0", f"--wait={WAIT}",
        python, "-m", "llava.train.slurm", "--rendezvous", f"{host}:{port}", "--nnodes", str(job.num_nodes),
        "--nproc_per_node", processes or "gpu", *program,
    ]  # fmt: skip


def find_hosts(job: Job) -> list[str]:
    """The names of a job's nodes, in the order in which srun counts them.

    Raises:
        ValueError: scontrol does not tell them.
    """
    command = ["scontrol", "show", "hostnames", job.nodes]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
        said, hosts = told.stderr.strip(), told.stdout.split()
    except (OSError, subprocess.TimeoutExpired) as error:
        said, hosts = str(error), []
    if len(hosts) != job.num_nodes:
        raise ValueError(
            f"the job has {job.num_nodes} nodes, but 'scontrol show hostnames {job.nodes}' tells {len(hosts)}"
            + (f": {shorten(said.splitlines()[-1])}" if said else "")
        )
    return hosts


def find_port(number: int) -> int:
    """A port of this machine, the job's first node, by the job's number: jobs that share a node have others.

    Raises:
        ValueError: it and those behind it are taken.
    """
    first = FIRST_PORT + number % NUM_PORTS
    for port in range(first, first + _TRIES):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried, contextlib.suppress(OSError):
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # One that this job has just left is free.
            tried.bind(("", port))
            return port
    raise ValueError(f"ports {first} to {first + _TRIES - 1}, where the nodes would meet, are taken on this machine")


def run_on_node(rendezvous: str, nodes: str, processes: str, program: Sequence[str]) -> int:
    """A node's launcher, in this process, which srun has started."""
    from llava.train import launch

    place = read_variables(_VARIABLES).get("SLURM_NODEID", "")
    if not place.isdigit():
        raise ValueError("SLURM_NODEID is not set: srun does not tell which node of the job this is")
    host, _, port = rendezvous.rpartition(":")
    # A preempted job's tasks get SIGTERM from Slurm itself, which torchrun would answer by killing after 30 s.
    return launch.main(
        ["--nnodes", nodes, "--node_rank", place, "--nproc_per_node", processes, "--master_addr", host,
         "--master_port", port, *program],
        stop_at_term=True,
    )  # fmt: skip


@dataclass
class _Watched:
    """A process that gets the signals of this one.

    Attributes:
        process: None until it is started.
        requeue: whether Slurm has said that the job's time is up.
    """

    process: subprocess.Popen[bytes] | None = None
    requeue: bool = False
    _early: list[int] = field(default_factory=list)

    def note(self, number: int, frame: FrameType | None) -> None:
        """Pass a signal on. What asks to stop becomes SIGUSR1: srun hands that on, and kills its tasks at SIGTERM."""
        if number == signal.SIGUSR1:
            self.requeue = True
        passed = signal.SIGUSR1 if number == signal.SIGTERM else number
        if self.process is None:
            self._early.append(passed)
        else:
            self.process.send_signal(passed)

    def start(self, command: Sequence[str]) -> None:
        # In a session of its own: ^C in a terminal comes once, by way of this process.
        self.process = subprocess.Popen(command, start_new_session=True)
        for number in self._early:
            self.process.send_signal(number)


def watch_over(command: Sequence[str]) -> tuple[int, bool]:
    """Run a command that gets the signals of this process.

    Returns:
        Its exit status as a shell gives it, and whether SIGUSR1 came, by which Slurm announces the end of the time.
    """
    watched = _Watched()
    # SIGTERM comes from Slurm when it preempts, and then it requeues by itself, or from whoever cancels the job.
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, watched.note)
    try:
        watched.start(command)
    except OSError as error:
        raise ValueError(f"{command[0]} cannot be started: {error}; is this a job of Slurm?") from error
    assert watched.process is not None
    status = watched.process.wait()
    # The handlers stay: a signal that comes now finds nobody, and does not end this process before it has requeued.
    return (128 - status if status < 0 else status), watched.requeue


def requeue_job(job: Job) -> None:
    """Put this job back into the queue, whose next start goes on where this one has stopped."""
    print(f"requeueing job {job.name}, which goes on from its last checkpoint", file=sys.stderr, flush=True)
    try:
        told = subprocess.run(
            ["scontrol", "requeue", job.name], capture_output=True, text=True, check=False, timeout=_TIMEOUT
        )
        problem = "" if told.returncode == 0 else told.stderr.strip() or f"status {told.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        print(
            f"error: scontrol requeue {job.name}: {shorten(problem)}; submit the same script again: it goes on from "
            "the last checkpoint",
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(main())
