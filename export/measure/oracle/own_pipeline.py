"""A checkpoint's own diffusers pipeline, loaded by plain calls and run one step at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from ditf.export.checkpoints.loading import first_line
from ditf.export.measure.observation import Stop
from ditf.export.measure.oracle.choice import PipelineFails
from ditf.export.measure.oracle.parts import Parts, check_chat, quiet_classes
from ditf.export.measure.oracle.pipelines import pipeline_of, step_of
from ditf.export.measure.scheduler_noise import SchedulerNoise
from ditf.export.planning.conditions import Entry
from ditf.export.planning.plan import Plan
from ditf.runtime.errors import DitfError


class OwnPipeline:
    """The pipeline of a checkpoint, whose prompts are encoded and whose transformer is loaded.

    The text encoders run first and are freed before the transformer is loaded.

    Args:
        plan: names the checkpoint, the replacement VAE if there is one, and the guidance. Layer, size and
            noise are not read: a pipeline serves plans that differ in them.
        entries: the conditions that will be asked for. The prompts among them are encoded here; where
            embeddings were given, `condition` has them.
        chats_rendered: the checkpoint's chat template was rendered for these prompts before, with limits. By
            default that is done here.

    Attributes:
        transformer: the unmodified transformer.
        record: what each part was made by, as golden.npz and the manifest record it.

    Raises:
        InputError: a part cannot be loaded, or a loading report says that not all of it was read.
        PipelineFails: the pipeline cannot be run on this checkpoint. So may the methods.
    """

    def __init__(self, plan: Plan, entries: Sequence[Entry], chats_rendered: bool = False) -> None:
        checkpoint, family = plan.checkpoint, plan.family
        parts = Parts(checkpoint, family.transformer_class)
        name = pipeline_of(family.name, str(checkpoint.index().get("_class_name")))
        self._class_conditional = not family.takes_prompt
        self._guidance = plan.guidance
        self._step = step_of(family.name, family.text_padding)
        self._noise = SchedulerNoise(checkpoint.config("scheduler"), self._step.flow)
        self._own_vae = self._vae = parts.vae()
        if plan.latents is not plan.own_latents and plan.latents.source is not None:
            self._vae = parts.vae_of(plan.latents.source)
        self._x_0: dict[tuple[tuple[int, ...], bytes, bool], torch.Tensor] = {}
        prompts = [entry.prompt for entry in entries if entry.embeds is None and entry.prompt is not None]
        text = parts.text() if prompts else {}
        self._pipe = self._assembled(name, {**text, "transformer": parts.transformer_shell()})
        for prompt in dict.fromkeys(prompts):
            if self._step.thinking is not None and not chats_rendered:
                check_chat(text, prompt, self._step.thinking)
            self._encode_prompt(prompt, plan.noise_shape)
        self._pipe.register_modules(**dict.fromkeys(text))
        del text
        self._pipe.transformer = self.transformer = parts.transformer()
        given = entries[0].embeds is not None
        self.record = {
            "oracle": "independent",
            "transformer": f"{name}.__call__{self._step.remark}",
            "noise": self._noise.source,
            "text": "prompt embeds given" if given else f"{name}.encode_prompt" if prompts else "no text",
            "vae": "none" if self._vae is None else f"{type(self._vae).__name__}: {self._step.encoder}",
        }

    @torch.no_grad()
    def x_0(self, image: np.ndarray, whole: bool = False) -> torch.Tensor:
        """Encode an image: x_0 [1, c, h', w'].

        Args:
            image: uint8 [H, W, 3].
            whole: by the checkpoint's own VAE where the bundle has another.
        """
        key = (image.shape, image.tobytes(), whole)
        if key not in self._x_0:
            self._pipe.vae = self._own_vae if whole else self._vae
            with self._running():
                pixels = self._step.pixels(self._pipe, Image.fromarray(image))
                self._x_0[key] = pixels if self._pipe.vae is None else self._step.encode(self._pipe, pixels)
        return self._x_0[key]

    def add_noise(self, x_0: torch.Tensor, eps: torch.Tensor, timestep: int) -> torch.Tensor:
        """x_t [1, c, h', w'] of x_0 and eps, both [1, c, h', w']."""
        return self._noise.add(x_0, eps, timestep)

    def run(self, x_t: torch.Tensor, entry: Entry, text_tokens: int | None = None) -> None:
        """Run one step from x_t [1, c, h', w'] under a condition.

        Args:
            text_tokens: the number of T5 tokens that the transformer is given (--text-tokens); None for all.
        """
        if entry.embeds is not None:  # they are cut already
            self._run(x_t, entry.timestep, self._step.embeddings(entry.condition))
        elif self._class_conditional:
            self._run(x_t, entry.timestep, {"class_label": entry.class_label})
        else:
            self._run(x_t, entry.timestep, {"prompt": entry.prompt}, text_tokens)

    def _run(
        self, x_t: torch.Tensor, timestep: int, condition: dict[str, Any], text_tokens: int | None = None
    ) -> None:
        with self._running():
            self._step.run(self._pipe, x_t, timestep, condition, self._guidance, text_tokens)

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Run the pipeline in this context.

        Raises:
            PipelineFails: the pipeline raised an error of its own.
        """
        try:
            with quiet_classes():
                yield
        except (Stop, DitfError, MemoryError):
            raise
        except Exception as error:
            name = type(self._pipe).__name__
            raise PipelineFails(f"{name} cannot be run on this checkpoint ({first_line(error)})") from error

    def _assembled(self, name: str, parts: dict[str, Any]) -> Any:
        """The pipeline; it has no part that is not given."""
        pipeline_class = getattr(diffusers, name)
        expected, _ = pipeline_class._get_signature_keys(pipeline_class)
        pipe = pipeline_class(**{**dict.fromkeys(expected), **parts, "vae": self._own_vae})
        pipe.set_progress_bar_config(disable=True)
        if hasattr(pipe, "encode_prompt"):
            pipe.encode_prompt = _remembering(pipe.encode_prompt)
        return pipe

    def _encode_prompt(self, prompt: str, shape: tuple[int, int, int, int]) -> None:
        """Run the pipeline up to the call of its transformer: its text embeddings are then remembered."""

        def stop(*_: Any) -> None:
            raise Stop

        handle = self._pipe.transformer.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self._run(torch.zeros(1, *shape[1:]), 1, {"prompt": prompt})
        except Stop:
            pass
        finally:
            handle.remove()


def _remembering(encode: Callable[..., Any]) -> Callable[..., Any]:
    """`encode_prompt` of a pipeline, which runs the text encoders once for each prompt."""
    known: dict[str, Any] = {}

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        prompt = args[0] if args else kwargs.get("prompt")
        if prompt is None:  # embeddings were given
            return encode(*args, **kwargs)
        if prompt not in known:
            known[prompt] = encode(*args, **kwargs)
        return known[prompt]

    return encode_prompt
