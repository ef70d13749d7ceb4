"""README.md: each command there prints what the page shows."""

import re
import shlex
from pathlib import Path

import pytest

from tests.pages import shown
from tilelink.cli.main import main

ROOT = Path(__file__).parents[2]
SHOWN = shown((ROOT / "README.md").read_text())


def test_readme_shows_the_example_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text()
    block = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert block is not None
    shown = [line.partition("  #")[0].rstrip() for line in block[1].splitlines()]
    example = (ROOT / "examples" / "ag_gemm.py").read_text()
    assert "\n".join(shown[3:]).strip() in example


def test_page_shows_the_main_commands() -> None:
    assert {command.split()[1] for command in SHOWN} == {"run", "check", "mutate", "ir", "simulate"}


@pytest.mark.parametrize("command", SHOWN)
def test_command_prints_what_is_shown(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    monkeypatch.chdir(ROOT)
    # pytest-xdist sets it for its workers; this is the width where there is no terminal.
    monkeypatch.setenv("COLUMNS", "100")
    words = shlex.split(command)
    assert words[0] == "tilelink"
    assert main(words[1:]) == 0
    said = capsys.readouterr().out.rstrip()
    # The page leaves out kernel and schedule, and rounding differs from one processor to the next.
    said = re.sub(r'(kernel_text|schedule) = "(?:[^"\\]|\\.)*"', r'\1 = "…"', said)
    rounding = re.compile(r"\d\.\de-\d\d(?=  1e-02  ok)|0\.0e\+00(?=  1e-02  ok)")
    assert rounding.sub("E", said) == rounding.sub("E", SHOWN[command])
