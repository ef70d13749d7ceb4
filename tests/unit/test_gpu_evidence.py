"""The runner of all GPU evidence, without GPUs: what it starts exists, and it keeps its time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.gpu.evidence import OUT, STEPS, Step, command_of, execute, main, run_step, run_steps

ROOT = Path(__file__).resolve().parents[2]


@cache
def help_of(*program: str) -> str:
    """What ``python program --help`` prints."""
    shown = subprocess.run(
        [sys.executable, *program, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return shown.stdout


@pytest.mark.parametrize("step", STEPS, ids=lambda s: s.name)
def test_the_command_of_a_step_is_understood(step: Step, tmp_path: Path) -> None:
    words = command_of(step, 4, tmp_path)
    assert str(tmp_path) in words and OUT not in words
    program = words[words.index("4") + 1 :] if step.launched else words[1:]
    options = [w for w in program if w.startswith("--")]
    length = 2 if program[0] == "-m" else 1
    assert [o for o in options if o not in help_of(*program[:length])] == []
    assert 0 < step.seconds[0] <= step.seconds[1]


def test_steps_share_the_time_and_what_has_none_is_named(tmp_path: Path) -> None:
    now, limits = [0.0], {}

    def run(command: Sequence[str], _: dict[str, str], log: Path, limit: float) -> int | None:
        limits[log.name] = limit
        now[0] += 50.0
        return {"a_h200x4.log": 0, "b_h200x4.log": 1}[log.name]

    steps = [Step(name, ("x.py", OUT), (30, 60)) for name in "abc"]
    ends = run_steps(steps, 4, "h200", tmp_path, 120.0, run, lambda: now[0])
    assert ends == {
        "a": "passed",
        "b": "exit code 1",
        "c": "left out: 20 s were left, it takes 30",
    }
    assert limits == {"a_h200x4.log": 60.0, "b_h200x4.log": 60.0}


def test_a_step_that_runs_out_of_time_is_killed_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1], 'rows.json').write_text('[1]')"
    step = Step("slow", ("-c", f"{code}; time.sleep(60)", OUT), (1, 2), "rows.json", False)
    assert run_step(step, 2, tmp_path, "slow_h200x2", 3.0) == "stopped after 3 s"
    assert (tmp_path / "slow_h200x2.json").read_text() == "[1]"


def test_the_output_of_a_command_is_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert execute([sys.executable, "-c", "print('seen'); raise SystemExit(3)"], {}, log, 20) == 3
    assert log.read_text() == "seen\n"


def test_no_gpus_is_said_and_no_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.gpu.evidence.gpus", lambda: ("none", 0))
    assert main(["--out", "unused"]) == 0
    assert "2 GPUs are needed, there are 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--out", "unused", "nonsense"])
    assert "there are gpu_tests, grid" in capsys.readouterr().err
