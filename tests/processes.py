"""Starting processes that the tests interrupt."""

from __future__ import annotations

import signal
import subprocess
from typing import Any


def started(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """A process whose stderr is read, and which Ctrl-C ends even where the tests were started with `&`."""
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        **options,
    )
