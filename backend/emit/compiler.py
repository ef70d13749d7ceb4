"""The compiler as a process of its own, which stays: importing Triton takes as long as compiling a kernel."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any


class Compiler:
    """A process of :mod:`tilelink.backend.emit.compile_worker`; it ends with :meth:`close` or this process."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.messages = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tilelink.backend.emit.compile_worker"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            text=True,
        )

    def request(self, what: dict[str, Any]) -> str | None:
        """Compile one kernel; the messages of the compiler if that fails."""
        assert self.process.stdin is not None and self.process.stdout is not None
        line = ""
        # The end of the process shows when its answer is read.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({**what, "environment": dict(os.environ)}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        if line:
            answer: str | None = json.loads(line)
            return answer
        self.messages.seek(0)
        said = self.messages.read() or "the compiler ended"
        self.close()
        return said

    @property
    def usable(self) -> bool:
        """Whether it is a process of this one, not of what this one is a fork of, and has not been closed."""
        return self.owner == os.getpid() and not self.messages.closed

    def close(self) -> None:
        """Ends the process; in a fork of its owner, only what leads to it."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        self.messages.close()
        if self.owner == os.getpid():
            self.process.kill()
            self.process.wait()


_lock = threading.Lock()
_compiler: Compiler | None = None


def compile_kernel(what: dict[str, Any]) -> str | None:
    """Has the compiler of this process do what a request asks for; its messages if that fails."""
    global _compiler
    with _lock:
        if _compiler is None or not _compiler.usable:
            close()
            _compiler = Compiler()
        try:
            return _compiler.request(what)
        except BaseException:
            # Interrupted: the next answer would be that of this request.
            close()
            raise


@atexit.register
def close() -> None:
    """Ends the compiler of this process, if there is one."""
    global _compiler
    if _compiler is not None and not _compiler.messages.closed:
        _compiler.close()
    _compiler = None
