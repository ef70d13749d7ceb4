"""The folder of emitted modules: whose it is, and that what is executed is what was emitted."""

from __future__ import annotations

import os
import py_compile
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tilelink import knobs
from tilelink.backend import runtime
from tilelink.backend.runtime import load_module, write_module

SOURCE = "VALUE = 'emitted'\n"
EVIL = "VALUE = 'planted'\n"


def use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has ``folder`` be the default one, as it is where the environment says so from the start."""
    monkeypatch.delenv("TILELINK_CACHE", raising=False)
    monkeypatch.setattr(knobs, "CACHE", replace(knobs.CACHE, default=folder))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home" / ".cache" / "tilelink"
    use(folder, monkeypatch)
    return folder


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({"XDG_CACHE_HOME": "/x/y", "HOME": "/h"}, "/x/y/tilelink"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/h"}, "/h/.cache/tilelink"),
        ({"HOME": "/h"}, "/h/.cache/tilelink"),
        ({"HOME": "/h", "TILELINK_CACHE": "/c"}, "/c"),
    ],
)
def test_the_folder_is_the_users(environment: dict[str, str], found: str) -> None:
    program = "from tilelink import knobs; print(knobs.CACHE.get())"
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**environment, **path}, capture_output=True, text=True
    )
    assert done.stdout.strip() == found, done.stderr


def test_nobody_else_may_look_or_write_there(cache: Path) -> None:
    path = write_module(SOURCE, "module")
    assert path.parent == cache and mode(cache) == 0o700 and mode(path) == 0o600
    cache.chmod(0o777)
    assert write_module(SOURCE, "module") == path and mode(cache) == 0o700
    assert [p.name for p in cache.iterdir()] == [path.name]


def test_what_was_planted_in_place_of_a_module_is_not_executed(cache: Path) -> None:
    path = write_module(SOURCE, "planted")
    path.write_text(EVIL)
    again = write_module(SOURCE, "planted")
    assert again == path and path.read_text() == SOURCE
    assert load_module(again).VALUE == "emitted"


def test_bytecode_beside_a_module_is_not_executed(cache: Path) -> None:
    path = write_module(SOURCE, "compiled")
    status = path.stat()
    path.write_text(EVIL)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    py_compile.compile(str(path))
    path.write_text(SOURCE)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load_module(path).VALUE == "emitted"


@pytest.mark.parametrize("why", ["a file in the way", "another user's", "no home"])
def test_where_there_is_no_folder_of_the_users_one_of_the_process_serves(
    why: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime._private.cache_clear()
    if why == "a file in the way":
        cache.parent.mkdir(parents=True)
        cache.write_text("")
    elif why == "another user's":
        owner = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    else:
        use(Path("~/.cache/tilelink"), monkeypatch)
    path = write_module(SOURCE, "module")
    assert not path.is_relative_to(cache) and mode(path.parent) == 0o700
    assert write_module(SOURCE, "module") == path
    assert not Path("~").exists()
    shutil.rmtree(path.parent)
    runtime._private.cache_clear()


def test_the_folder_of_the_process_goes_with_it(tmp_path: Path) -> None:
    program = (
        "from tilelink.backend.runtime import write_module\n"
        "import os\n"
        "path = write_module('', 'm')\n"
        "if not os.fork(): raise SystemExit\n"
        "os.wait(); assert path.exists(); print(path)\n"
    )
    (tmp_path / ".cache").write_text("")
    environment = {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout, done.stderr
    assert not Path(done.stdout.strip()).parent.exists()


def test_a_folder_that_was_asked_for_and_cannot_be_written_is_an_error_by_name(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TILELINK_CACHE", str(tmp_path / "file"))
    with pytest.raises(knobs.BadKnob, match=r"TILELINK_CACHE=.* is not a folder that can be writt"):
        write_module(SOURCE, "module")
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    monkeypatch.setenv("TILELINK_CACHE", str(shared))
    assert write_module(SOURCE, "module").parent == shared and mode(shared) == 0o755
