"""The table of docs/plan.md, counted again, and its commands."""

from __future__ import annotations

import importlib
import re
import shlex
import sys


def test_the_table_is_what_the_code_counts(root, monkeypatch):
    monkeypatch.syspath_prepend(root / "benchmarks")
    script = importlib.import_module("plan_table")
    try:
        expected = {"plan.md": ("plans", script.rows()), "vae.md": ("counted", script.vae_rows())}
    finally:
        for name in ("plan_table", "harness"):
            sys.modules.pop(name, None)
    for document, (name, rows) in expected.items():
        text = (root / "docs" / document).read_text("utf-8")
        table = re.search(rf"<!-- {name} -->\n\n(.*?)\n\n<!-- /{name} -->", text, re.DOTALL)[1].splitlines()
        found = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table]
        assert [found[0], *found[2:]] == rows


def test_the_commands_run(root, ditf):
    text = (root / "docs" / "plan.md").read_text("utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "ditf"
        assert ditf(*arguments).returncode == 0, line
