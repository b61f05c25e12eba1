"""Processes of fastkd's commands that begin at once: forks of one that has imported everything.

A fork is a process as any other: its signals, exit code, environment, threads and memory are its own. What it is spared
is the five seconds in which a new one imports PyTorch and transformers, and what else `warm` does once. Tests of what a
command does when it is killed, runs twice or has a second rank are about the process, not about its imports; other tests
type the commands out. What a module reads when it is imported (HF_ENDPOINT, TRITON_INTERPRET, OMP_NUM_THREADS) is as the
tests began with it. What they do is `brief`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from multiprocessing import connection, forkserver, reduction
from pathlib import Path
from typing import IO, Any

import brief
import shim

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["warm"])


@cache
def _serve() -> None:
    """Start the process that is forked, with the shim loaded: ``shim.faults`` in an environment arms it in a fork."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])  # where `warm` is
    with shim.loaded():
        forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


class _Descriptor:
    """A file descriptor that a process is given when it starts."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (reduction.DupFd(self.number),)


def _received(sent: Any) -> _Descriptor:
    return _Descriptor(sent.detach())


def _enter(
    command: str, options: tuple[str, ...], environment: dict[str, str], out: _Descriptor, err: _Descriptor
) -> None:
    """In the fork: what ``python -m command options`` or ``python command options`` would do, with STDIN's file as its input."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by what a shell starts in the background
    os.environ.clear()
    os.environ.update(environment)
    for mine, given in ((1, out), (2, err)):
        os.dup2(given.number, mine)
        os.close(given.number)
    if "STDIN" in environment:
        os.dup2(os.open(environment["STDIN"], os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    if "torch" in sys.modules and "OMP_NUM_THREADS" in environment:
        sys.modules["torch"].set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if brief.IN_FULL not in environment:
        brief.shorten(setattr)
    shim.arm(environment)
    sys.argv = [command, *options]
    if command.endswith(".py"):
        runpy.run_path(command, run_name="__main__")
    else:
        sys.exit(import_module(command).main(list(options)))


class Command:
    """A command that runs: part of what ``subprocess.Popen`` offers. It prints into ``stdout``, or where ``output`` leads."""

    def __init__(self, command: str, *options: object, output: int | None = None, **environment: str) -> None:
        _serve()
        self.args = (command, *map(str, options))
        reader, writer = os.pipe()
        self.stdout: IO[str] = os.fdopen(reader)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (read when the process has ended)
        ends = (_Descriptor(writer if output is None else output), _Descriptor(self._errors.fileno()))
        arguments = (command, self.args[1:], os.environ | environment, *ends)
        self._process = FORKS.Process(target=_enter, args=arguments)
        self._process.start()
        os.close(writer)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def sentinel(self) -> int:
        """Ready when the process has ended."""
        return self._process.sentinel

    def poll(self) -> int | None:
        """The exit code, or None while it runs; −n for signal n."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait_a_little(self, seconds: float) -> None:
        """Until it ends, but no longer than this."""
        self._process.join(seconds)

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Read what it prints to its end; its exit code and texts."""
        printed = self.stdout.read()
        self.stdout.close()
        code = self.wait(timeout)
        with self._errors as errors:
            errors.seek(0)
            return subprocess.CompletedProcess(self.args, code, printed, errors.read())


def run(command: str, *options: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command from its start to its end: a module of fastkd that has ``main``, or a script."""
    return Command(command, *options, **environment).finish()


def ranks(command: str, *options: object, count: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """The ranks of a job, as torchrun starts them; one that fails ends the others, and its code is the job's."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    size = str(count)
    job = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    numbered = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    started = [Command(command, *options, **environment, **job, **number) for number in numbered]
    running = {each.sentinel: each for each in started}
    code = 0
    while running:
        for ended in connection.wait(list(running)):
            failed = running.pop(int(ended)).wait(60)
            if failed and not code:
                code = failed
                for other in running.values():
                    with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                        other.send_signal(signal.SIGTERM)
                        other.send_signal(signal.SIGCONT)  # of one that is stopped, so that it ends too
    done = [each.finish() for each in started]
    texts = ("".join(each.stdout for each in done), "".join(each.stderr for each in done))
    return subprocess.CompletedProcess(started[0].args, code, *texts)
