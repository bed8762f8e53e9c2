"""SIGTERM ends a command at once, with nothing half-written, whatever its main thread is at."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from ditf.cli.support.termination import Terminated, terminable

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
import hashlib, sys, time
from ditf.cli.support import termination
from ditf.cli.main import run
from ditf.runtime.files.hashed import HashedFile
termination._UNWOUND = 0.2
def copy(*arguments):
    print('working', flush=True)
    {0}
HashedFile.copy = copy
sys.exit(run(['export-triton', sys.argv[1], '--repository', 'models', '-q']))
"""


@pytest.mark.parametrize("at", [NATIVE, LOST, FINALISER], ids=["native", "lost", "finaliser"])
def test_it_ends_whatever_the_main_thread_is_at(demo_bundle, tmp_path, at):
    command = [sys.executable, "-c", CODE.format(at), str(demo_bundle)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, text=True, **pipes) as process:
        try:
            assert process.stdout.readline() == "working\n"
            assert list(tmp_path.iterdir())
            process.send_signal(signal.SIGTERM)
            error = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 143
    assert error == "error: terminated; nothing was left half-written\n"
    assert not list(tmp_path.iterdir())


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
