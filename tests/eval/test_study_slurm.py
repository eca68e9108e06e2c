"""A study as a Slurm array, on a cluster of stubs; trainings are made up here."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from slurm_cluster import Cluster

from llava.eval.study import __main__ as command

PYTHON = """#!{python}
# A Python whose trainings fail, are killed or stopped as their cells say, and take no time.
import os, runpy, signal, sys
from pathlib import Path

sys.executable = __file__
module, *words = sys.argv[2:]
sys.argv = [module, *words]
if module != "llava.eval.study":
    sys.exit(runpy.run_module(module, run_name="__main__", alter_sys=True))
from llava.eval.study import __main__ as command
from llava.eval.study import cells

def start(words, log, study, show):
    run = Path(words[words.index("--output_dir") + 1])
    if "b/seed-3" in str(run):
        log.write_text("step 1\\nerror: --learning_rate is bad\\n")
        return 2
    if "c/seed-5" in str(run):
        os.kill(os.getpid(), signal.SIGKILL)
    if "a/seed-5" in str(run) and not run.exists():
        run.mkdir(parents=True)
        os.kill(os.getppid(), signal.SIGUSR1)  # As Slurm does when the time is up.
        return 85
    run.mkdir(parents=True, exist_ok=True)
    (run / "trainer_state.json").write_text('{{"global_step": 2, "log_history": [{{"train_loss": 1.5}}]}}')
    return 0

cells.start_training, command.check_flags = start, lambda study, cells: []
cells.list_versions, cells.device_name = dict, lambda: "none"
sys.exit(command.main(words))
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The current folder, with the file of a study of six cells and a Python that trains them."""
    made = Cluster(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("data.jsonl").write_text("{}")
    Path("study.yaml").write_text(yaml.safe_dump({
        "output_dir": "out", "seeds": [3, 5], "baseline": "a", "slurm": {"account": "x", "gres": "gpu:1"},
        "train": {"model_name_or_path": "gpt2", "data_path": "data.jsonl"},
        "variants": {"a": None, "b": {"learning_rate": 0.02}, "c": {"learning_rate": 0.03}},
    }))  # fmt: skip
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable))
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    for name in ("PATH", "CLUSTER"):
        monkeypatch.setenv(name, made.environment[name])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NUM_NODES"):
        monkeypatch.delenv(name, raising=False)
    return made


def test_an_array_of_six_cells_ends_with_a_table_of_the_two_that_failed(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["study.yaml", "--submit"]) == 0
    assert capsys.readouterr().out == "job 101: 6 cells; job 102: the table behind them, in out/slurm-table-102.out\n"
    assert cluster.calls == [
        "sbatch --parsable out/study.sbatch",
        "scontrol requeue 101_3",
        "sbatch --parsable --dependency=afterany:101 out/table.sbatch",
    ]
    table = Path("out/slurm-table-102.out").read_text()
    assert "4 of 6 cells are done, 2 failed:" in table
    rows = [line for line in table.splitlines() if line.startswith(("| 1 ", "| 5 "))]
    assert rows[0] == ("| 1 | b | 3 | FAILED with status 2: error: --learning_rate is bad (out/b/seed-3/train.log) |")
    assert rows[1].startswith("| 5 | c | 5 | FAILED: killed, begun since ")
    assert rows[1].endswith("/c/seed-5/train.log) |")
    assert len(rows) == 2
    assert "Not done yet: b, seed 3; c, seed 5." in table
    # The task that was requeued has one log: its first start, then its second.
    log = Path("out/slurm-101_3.out").read_text()
    assert log.index("requeueing job 101_3") < log.index("[1/1] a, seed 5: done")
    # Before all are over, what has no end may run.
    assert command.main(["study.yaml", "--table"]) == 1
    assert "4 of 6 cells are done, 1 failed:" in (said := capsys.readouterr().out)
    assert ", or killed |" in said
    assert command.main(["study.yaml", "--over"]) == 2
    assert capsys.readouterr().err == "error: --over says something of --table; give both\n"
    script = Path("out/table.sbatch").read_text()
    assert "#SBATCH --account=x\n" in script
    assert "gres" not in script


def test_names_with_blanks_are_those_of_the_files(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """A blank, the beginning of a comment and Slurm's own letters in the name of a folder."""
    out = 'my "50%A" runs #1'
    study = yaml.safe_load(Path("study.yaml").read_text())
    Path("my study.yaml").write_text(
        yaml.safe_dump({**study, "output_dir": out, "seeds": [3], "variants": {"a": None}})
    )
    assert command.main(["my study.yaml", "--submit"]) == 0
    assert cluster.calls[-1] == f"sbatch --parsable --dependency=afterany:101 {out}/table.sbatch"
    logs = sorted(path.name for path in Path(out).glob("slurm-*"))
    assert logs == ["slurm-101_0.out", "slurm-table-102.out"]
    assert "a, seed 3: done" in Path(out, logs[0]).read_text()
    capsys.readouterr()
    assert command.main(["my study.yaml", "--sbatch"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.endswith(f"$array {shlex.quote(out + '/table.sbatch')}")


def test_what_sbatch_refuses_is_one_line(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch = cluster.folder / "sbatch"
    sbatch.write_text("#!/bin/bash\necho 'sbatch: error: invalid account x' >&2\nexit 1\n")
    assert command.main(["study.yaml", "--submit"]) == 2
    assert capsys.readouterr().err == ("error: sbatch --parsable out/study.sbatch: sbatch: error: invalid account x\n")
    sbatch.unlink()
    assert command.main(["study.yaml", "--submit"]) == 2
    assert "--submit: sbatch cannot be started" in capsys.readouterr().err
