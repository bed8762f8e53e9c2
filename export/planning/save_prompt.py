"""`ditf export --save-prompt-embeds`: runs the text encoders only, on a machine that has them."""

from __future__ import annotations

from pathlib import Path

import torch

from ditf.export.checkpoints.opening import open_checkpoint
from ditf.export.planning.conditions import check_prompts, encode, warnings_of
from ditf.export.planning.export_options import ExportOptions
from ditf.export.planning.plan import plan_from_configs
from ditf.export.planning.prompt_embeds import write_embeddings
from ditf.export.planning.stages import Warn
from ditf.runtime.errors import InputError

_UNNEEDED = ("transformer", "vae")


def save_prompt(options: ExportOptions, path: Path, warn: Warn = lambda line: None) -> str:
    """Encode the prompt of an export and write it for `--prompt-embeds`.

    Transformer and VAE need their configs only, not their weights.

    Args:
        warn: as for `export_bundle`.

    Returns:
        The prompt.

    Raises:
        DitfError: as an export; or there are several prompts, or the model reads none.
    """
    if options.prompt_embeds:
        raise InputError("--prompt-embeds and --save-prompt-embeds exclude each other", "leave one out")
    with open_checkpoint(**options.opened | {"unneeded": _UNNEEDED}) as checkpoint:
        plan = plan_from_configs(options, checkpoint)
        checkpoint = plan.checkpoint  # with the LoRAs
        if not plan.family.takes_prompt:
            raise InputError(f"{plan.family.name} reads no text", "leave --save-prompt-embeds out")
        checkpoint.check_loras(_UNNEEDED)
        if len({entry.prompt for entry in plan.entries}) > 1:
            raise InputError("--save-prompt-embeds writes one prompt to a file", "run it once for each")
        entries = check_prompts(plan.entries[:1], plan.family, checkpoint)
        for line in warnings_of(entries):
            warn(line)
        with torch.no_grad():
            entry = encode(entries, plan.family, checkpoint, plan.guidance)[0]
    prompt = str(entry.prompt)
    write_embeddings(path, entry.condition, prompt, checkpoint.id)
    return prompt
