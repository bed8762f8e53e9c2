"""Signals end a command at once, with nothing half-written, whatever its main thread is at."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

from ditf.cli.support.termination import Terminated, terminable
from tests.processes import started

# A main thread that is in native code for minutes, without the interpreter's lock; and two that lose what the
# handler raises, as callbacks of native code and finalisers do.
NATIVE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)"
LOST = """
    while True:
        try:
            time.sleep(60)
        except BaseException:
            print('lost', flush=True)
"""
FINALISER = """
    class Finaliser:
        def __del__(self):
            time.sleep(60)
    for _ in range(60): Finaliser()
"""
CODE = """
import atexit, hashlib, sys, time
from ditf.cli.support import termination
from ditf.cli.main import main
from ditf.runtime.files.hashed import HashedFile
atexit.register(time.sleep, 100)  # an interpreter that has imported torch takes seconds to leave
termination._UNWOUND = 0.2
def copy(*arguments):
    print('working', flush=True)
    {0}
HashedFile.copy = copy
sys.argv = ['ditf', 'export-triton', sys.argv[1], '--repository', 'models', *sys.argv[2:]]
main()
"""
SLEEP = "time.sleep(100)"
SIGNALS = {
    signal.SIGTERM: "terminated",
    signal.SIGHUP: "the terminal was closed",
    signal.SIGINT: "interrupted",
}


@pytest.mark.parametrize(
    ("at", "number"),
    [
        *((NATIVE, number) for number in SIGNALS),
        *((SLEEP, number) for number in SIGNALS),
        (LOST, signal.SIGTERM),
        (LOST, signal.SIGINT),
        (FINALISER, signal.SIGTERM),
    ],
)
def test_it_ends_whatever_the_main_thread_is_at(demo_bundle, tmp_path, at, number):
    command = [sys.executable, "-c", CODE.format(at), str(demo_bundle), "-q"]
    with started(command, cwd=tmp_path, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == "working\n"
            assert list(tmp_path.iterdir())
            process.send_signal(number)
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 128 + number
    assert error.strip() == f"error: {SIGNALS[number]}; nothing was left half-written"
    assert not list(tmp_path.iterdir())


def test_a_terminal_that_is_closed(demo_bundle, tmp_path):
    """The kernel sends SIGHUP, and whatever is written to the terminal from then on is an error."""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(tmp_path)
        os.execv(sys.executable, [sys.executable, "-c", CODE.format(SLEEP), str(demo_bundle)])
    shown = b""
    while b"working" not in shown:
        shown += os.read(terminal, 1024)
    assert list(tmp_path.iterdir())
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGHUP
    assert not list(tmp_path.iterdir())


def test_a_signal_that_is_ignored_stays_ignored():
    """As SIGHUP under nohup, and SIGINT in a shell's background jobs."""
    numbers = (signal.SIGHUP, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        with terminable():
            for number in numbers:
                os.kill(os.getpid(), number)
        assert [signal.getsignal(number) for number in numbers] == [signal.SIG_IGN] * 2
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def test_a_second_signal_does_not_interrupt_the_cleaning_up():
    cleaned = []

    def work():
        with terminable():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
                cleaned.append(True)

    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Terminated):
        work()
    assert cleaned
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12, where there are threads
def test_a_forked_childs_signal_is_its_own():
    """Both would write into one pipe."""
    with terminable():
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert signal.set_wakeup_fd(-1) != -1
