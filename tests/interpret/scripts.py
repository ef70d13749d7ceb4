"""Scripts that are run under Triton's interpreter, with the arenas of two ranks in one process."""

import atexit
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]

_PRELUDE = """
import torch
import triton
import triton.language as tl
from tilelink import device
from tilelink.ir import layout

WORDS = 70000
arenas = [torch.zeros(WORDS, dtype=torch.int32) for _ in range(2)]
peers = torch.tensor([a.data_ptr() for a in arenas])

def head(rank, wait=True, limit=10**6, signals=True):
    device.head_kernel[(1,)](
        arenas[rank], peers, rank, 32768, 32800, limit, limit,
        ACK=layout.ACK, WORLD=2, WAIT=wait, SIGNALS=signals,
    )
"""


# Runs each script that is named on standard input in a fork, which need not import anything again.
_SERVER = """
import os, runpy, signal, sys, traceback
import torch, triton
from tilelink.backend.runtime.worker import spare_work

spare_work()
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        code = 1
        try:
            runpy.run_path(line.strip())
            code = 0
        except BaseException:
            traceback.print_exc(file=open(line.strip() + ".said", "w"))
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def server() -> subprocess.Popen[str]:
    """The process that runs scripts on the interpreter: the variable must be set before Triton is imported."""
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.kill)
    return process


def interpreted(tmp_path: Path, script: str) -> None:
    """Runs a script on the interpreter, behind the prelude."""
    path = tmp_path / "script.py"
    path.write_text(_PRELUDE + script)
    process = server()
    assert process.stdin is not None and process.stdout is not None
    print(path, file=process.stdin, flush=True)
    code = int(process.stdout.readline())
    said = Path(f"{path}.said")
    assert code == 0, said.read_text()[-2000:] if said.exists() else code
