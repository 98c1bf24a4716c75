"""Runs work that foreign data could make endless, huge or fatal, in a process that may be killed at any time.

Each worker is a file run by path, so that nothing of this package (JAX above all) is imported. It sets its own limits,
which the kernel enforces, writes `"ready"`, and then answers each JSON line with one JSON line.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dail_jax.errors import UserError

START_SECONDS = 120.0  # imports, on a busy machine
ATTEMPTS = 3  # to start: a system short of memory also kills new processes


class Lost(Exception):
    """The worker did not answer. `reason` is timeout, memory or crash."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


class Worker:
    """One process at a time, started on the first request and again after it was lost.

    The limit on wall-clock time (`wall_seconds` per answer) only ends a process that hangs: a busy one reaches the
    worker's own limit on CPU time first, however loaded the machine is.
    """

    def __init__(self, script: Path, arguments: Sequence[str] = (), wall_seconds: float = 60.0):
        self.command = [sys.executable, "-P", str(script), *arguments]
        self.wall_seconds = wall_seconds
        self.process: subprocess.Popen[bytes] | None = None
        self.closed = False

    def ask(self, message: Any) -> Any:
        """The answer to a message. Raises Lost if there is none; the next message then goes to a new process."""
        process = self.process or self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            return self._read(process, self.wall_seconds)
        except (BrokenPipeError, Lost) as error:
            reason = error.reason if isinstance(error, Lost) else _death(process)
            self.stop()
            raise Lost(reason) from None

    def close(self) -> None:
        """Kills the process for good; may be called from a thread other than the one that asks."""
        self.closed = True
        if process := self.process:
            process.kill()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            with contextlib.suppress(BrokenPipeError), self.process:  # closes the pipes and waits
                pass
            self.process = None

    def _start(self) -> subprocess.Popen[bytes]:
        reason = ""
        for _ in range(ATTEMPTS):
            if self.closed:
                raise RuntimeError("the worker was closed")
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONHASHSEED": "0"},  # sympy orders sets by hash
                start_new_session=True,  # an interrupt from the terminal is the parent's to handle
            )
            try:
                if self._read(self.process, START_SECONDS) == "ready":
                    return self.process
                reason = "it did not report that it is ready"
            except Lost as error:
                reason = error.reason
            self.stop()
        command = " ".join(self.command)
        raise UserError(f"a worker process did not start in {ATTEMPTS} attempts ({reason}): try {command}")

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> Any:
        assert process.stdout is not None
        handle, pieces, deadline = process.stdout.fileno(), [b""], time.monotonic() + seconds
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        while not pieces[-1].endswith(b"\n"):
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise Lost("timeout")
            pieces.append(os.read(handle, 1 << 16))
            if not pieces[-1]:
                raise Lost(_death(process))
        return json.loads(b"".join(pieces))


def _death(process: subprocess.Popen[bytes]) -> str:
    """What ended a process: its CPU limit (timeout), the system when short of memory (memory), or itself (crash)."""
    try:
        return {-signal.SIGXCPU: "timeout", -signal.SIGKILL: "memory"}.get(process.wait(timeout=10), "crash")
    except subprocess.TimeoutExpired:
        return "crash"
