"""Every command block of docs/checkpoints.md runs."""

from __future__ import annotations

import re
import shlex

import torch
from PIL import Image
from safetensors.torch import save_file
from skimage import data

from tests.original_layouts import original_of


def test_blocks(ditf, checkpoint, root, tmp_path):
    folder = checkpoint("sd35")
    (tmp_path / "my-sd35").symlink_to(folder)
    save_file(original_of(folder, "SD3Transformer2DModel"), tmp_path / "finetune.safetensors")
    module = "transformer.transformer_blocks.0.attn.to_q"
    width = 48
    factors = {"lora_A": torch.ones(2, width) / width, "lora_B": torch.ones(width, 2) / 10}
    lora = {f"{module}.{name}.weight": value for name, value in factors.items()}
    save_file(lora, tmp_path / "style.safetensors")
    (tmp_path / "photos").mkdir()
    for name in ("chelsea", "astronaut"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / "photos" / f"{name}.jpg")
    fence = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    blocks = fence.findall((root / "docs" / "checkpoints.md").read_text("utf-8"))
    commands = [shlex.split(line, comments=True) for block in blocks for line in block.splitlines()]
    assert len(commands) == 5
    for program, *arguments in commands:
        verb = ["export"] if program == "ditf-export" else []
        done = ditf(*verb, *arguments)
        assert done.returncode == 0, (arguments, done.stderr)
