"""Every command block of the README runs, in order, where a reader would run it."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(root: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall((root / "README.md").read_text("utf-8")) if name == language]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, root, tiny_pixart):
    """A directory with the photographs and the checkpoint the README names."""
    import skimage.data
    from PIL import Image

    folder = tmp_path_factory.mktemp("readme")
    left, right, _ = skimage.data.stereo_motorcycle()
    Image.fromarray(left).save(folder / "left.jpg")
    Image.fromarray(right).save(folder / "right.jpg")
    mask = np.zeros(left.shape[:2], np.uint8)
    mask[150:350, 200:500] = 1
    Image.fromarray(mask).save(folder / "mask.png")
    (folder / "my-pixart").symlink_to(tiny_pixart)
    return folder


def test_shell_and_python_blocks(root, workplace, monkeypatch):
    """In the order of the page, in one process: each `ditf` alone would import torch for seconds."""
    from ditf.cli.main import run

    monkeypatch.chdir(workplace)
    handler = signal.getsignal(signal.SIGTERM)
    lines = [line for block in blocks(root, "sh") for line in block.splitlines()]
    commands = [shlex.split(line, comments=True) for line in lines]
    ours = [command for command in commands if command[0] in ("ditf", "ditf-export")]
    assert {command[0] for command in commands} - {"make", "pip"} == {"ditf", "ditf-export"}
    for program, *arguments in ours:
        assert run([*(["export"] if program == "ditf-export" else []), *arguments]) == 0, arguments
    signal.signal(signal.SIGTERM, handler)
    for block in blocks(root, "python"):
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", block], cwd=workplace, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_every_fence_says_what_it_is(root):
    text = (root / "README.md").read_text("utf-8")
    assert {name for name, _ in FENCE.findall(text)} <= {"sh", "python", "text"}


def test_links_and_pictures_exist(root):
    text = (root / "README.md").read_text("utf-8")
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (root / link).exists(), link


def test_the_table_of_parameters(root):
    """Counted again from the configs."""
    from ditf.export.estimate.published_configs import CONFIGS, published_family
    from tests.export.estimate.test_parameter_shapes import transformer_parameters

    text = (root / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (\d+) of \d+ \|(.+)\|$", text, re.MULTILINE)
    assert len(rows) == 6
    for name, layer, figures in rows:
        assert name in CONFIGS
        family = published_family(name)
        side = family.defaults.size[0] if family.defaults.size else 8 * family.sample_size
        text_tokens = 8 if family.name == "pixart" else None
        whole, cut, folded = transformer_parameters(name, layer, (side, side), text_tokens)
        expected = [f"{count / 1e9:.2f} B" for count in (whole, cut, folded)]
        expected += [f"{1 - folded / count:.0%}" for count in (cut, whole)]
        assert [figure.strip() for figure in figures.split("|")] == expected, name
