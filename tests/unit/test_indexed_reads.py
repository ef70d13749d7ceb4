"""Reads by indices that are data: what they may ask for has to be where they look."""

import json
from pathlib import Path

import numpy as np
import pytest

from tilelink.backend.expand_walk import expand
from tilelink.backend.pipeline import run_passes
from tilelink.backend.verify import DataflowError, verify
from tilelink.backend.verify.dataflow import ANY, Dataflow
from tilelink.cli.main import main
from tilelink.ir import parse_ir, print_ir
from tilelink.kernel import load_kernels
from tilelink.schedules import default_schedule

FILE = Path(__file__).parents[1] / "kernels" / "indexed.py"
SHIFT = "RANK * 12", "(RANK + 1) % WORLD * 12"


def text_of(name: str) -> str:
    """A fused program of four ranks, and with it the kernel."""
    kernel = load_kernels(FILE)[name]
    op = kernel.build(kernel.example, world=4, dtype="bf16")
    return print_ir(run_passes(op, default_schedule(op)))


def outside_the_kernel(text: str, old: str, new: str) -> str:
    """``text`` with the ops changed, and not the kernel that it carries."""
    head, rest = text.split("\n", 1)
    assert old in rest
    return f"{head}\n{rest.replace(old, new)}"


@pytest.mark.parametrize("name", ["embed", "expert_up", "permuted_sum", "one_row"])
def test_what_the_passes_make_is_accepted(name: str) -> None:
    assert "dataflow" in verify(parse_ir(text_of(name))).rules


@pytest.mark.parametrize(
    ("name", "old", "new", "detail"),
    [
        ("embed", "load @E.all[", "load @E[", "known at run time only .* 12 of 48 are there"),
        ("expert_up", "load @A.all[", "load @A[", "known at run time only .* 12 of 48 are there"),
        ("one_row", "load @E.all[5", "load @E[5", "shard holds another part"),
        ("one_row", "load @E.all[5", "load @E.all[6", "kernel's index"),
        ("permuted_sum", "load_sum @P.parts[:, ", "load @P.parts[0, ", "not what the kernel"),
        # What is there is there in the place of another rank's rows.
        ("embed", *SHIFT, "another tile's data"),
        ("expert_up", *SHIFT, "another tile's data"),
    ],
)
def test_a_read_of_something_else_is_refused(name: str, old: str, new: str, detail: str) -> None:
    text = text_of(name)
    with pytest.raises(DataflowError, match=detail):
        verify(parse_ir(outside_the_kernel(text, old, new)))


def test_an_axis_in_cyclic_order_is_no_run() -> None:
    text = text_of("embed").replace("owner = e / (V / WORLD)", "owner = e / 4 % WORLD")
    flow = Dataflow(expand(parse_ir(text)), {})
    lo, hi = np.array([0, 0, 8, 4, 44]), np.array([48, 4, 12, 12, 52])
    first, together = flow.run("E", lo, hi)
    assert together.tolist() == [False, True, True, False, False]
    assert first[:4].tolist() == [0, 0, 24, 12] and first[4] != ANY


@pytest.mark.parametrize("name", ["embed", "expert_up"])
def test_no_mutant_is_missed_or_undecided(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    classes = [x for c in ("wrong-buffer", "weaken", "re-order") for x in ("--class", c)]
    main(["mutate", f"{FILE}::{name}", *classes, "--json"])
    found = json.loads(capsys.readouterr().out)["classes"]
    assert len(found) >= 3
    for counts in found.values():
        assert counts["mutants"] > 0
        assert not any(counts.get(key) for key in ("undecided", "proof missed", "simulator missed"))


@pytest.mark.parametrize(
    ("name", "form"), [("embed", "whose offset is data"), ("banded", "two axes at once")]
)
def test_what_validation_does_not_cover_is_no_fault_of_the_module(
    name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "module.py"
    assert main(["emit", f"{FILE}::{name}", "-o", str(module)]) == 0
    assert main(["check", "--emitted", str(module), f"{FILE}::{name}"]) == 1
    said = capsys.readouterr().err
    assert "error[emitted-not-covered]: validation does not cover" in said and form in said
    assert "do not edit it" not in said
