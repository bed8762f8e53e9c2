"""The running command line, how much it prints, and which bundles it accepts."""

from __future__ import annotations

from ditf.runtime.bundles.signing import ANYONE


class _State:
    def __init__(self) -> None:
        self.reset("")

    def reset(self, command: str) -> None:
        self.command = command
        self.verbose = False
        self.quiet = False
        self.trust = ANYONE


state = _State()
