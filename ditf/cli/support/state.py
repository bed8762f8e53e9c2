"""The running command line: how much it prints, which bundles it accepts, and where models run."""

from __future__ import annotations

from typing import Optional

from ditf.runtime.bundles.signing import ANYONE


class _State:
    def __init__(self) -> None:
        self.reset("")

    def reset(self, command: str) -> None:
        self.command = command
        self.verbose = False
        self.quiet = False
        self.trust = ANYONE
        self.device: Optional[str] = None


state = _State()
