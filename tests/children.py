"""Forked processes for tests: nothing is imported again, so a child costs milliseconds."""

import os
import signal
import socket
import sys
import time
import traceback

import pytest

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def start(function, *args, stderr=None):
    """Run a function in a forked process; returns its pid. An exit code that it returns or raises is its own."""
    sys.stdout.flush(), sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if stderr:
            os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
            sys.stderr = open(2, "w", buffering=1, closefd=False)
        code = function(*args) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def end(pid, within=60):
    """Wait for a process; its exit code, or minus the signal that ended it. One that hangs is killed, and fails."""
    limit = time.monotonic() + within
    while time.monotonic() < limit:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"still running after {within} s")


def run(function, *args, stderr=None, within=60):
    """Run a function in a forked process to its end; returns the exit code."""
    return end(start(function, *args, stderr=stderr), within)


def ranks(function, *args, within=60, **env):
    """Run a function in two processes that are told of each other as by torchrun; their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"} | env

    def one(rank):
        os.environ |= env | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return function(*args)

    return [end(pid, within) for pid in [start(one, rank) for rank in range(2)]]
