"""Chat templates of tokenizers, rendered in a process whose time and memory are limited.

A template is a program that comes with the checkpoint. Jinja's sandbox keeps it from files and from Python,
but not from looping for years or from filling the memory.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditf.runtime.errors import InputError

_SECONDS, _BYTES, _CHARACTERS = (
    2,
    512 << 20,
    1 << 20,
)  # a chat has about 100 characters
_DEADLINE = 300  # seconds until a process that does nothing is stopped
_PAGE = resource.getpagesize()


def render_chats(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> list[str]:
    """Each prompt as the one message of a chat, as the pipelines of diffusers ask for it.

    Args:
        tokenizer: of transformers, with a chat template.
        thinking: the template's `enable_thinking`.

    Raises:
        InputError: there is no template, it fails, or it takes more than 2 s, 512 MiB or a million
            characters.
    """
    fix = "download the checkpoint again"
    what = f"the chat template of {tokenizer.name_or_path}"
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise InputError(f"{what} is missing", fix) from error
    request = {
        "conversations": [[{"role": "user", "content": prompt}] for prompt in prompts],
        "chat_template": template,
        "add_generation_prompt": True,
        "enable_thinking": thinking,
        **tokenizer.special_tokens_map,
    }
    start = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import _serve; _serve()"
    try:
        ended = subprocess.run(
            [sys.executable, "-c", start],
            input=json.dumps(request, default=str).encode(),
            capture_output=True,
            timeout=_DEADLINE,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{what} takes longer than {_DEADLINE} s", fix) from error
    if ended.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise InputError(f"{what} takes more than {_SECONDS} s, or too much memory", fix)
    if ended.returncode != 0:
        last = ended.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
        raise InputError(f"{what} cannot be rendered ({ascii(last)[2:160]})", fix)
    answer = json.loads(ended.stdout)
    if "problem" in answer:
        raise InputError(f"{what} {answer['problem']}", fix)
    chats: list[str] = answer["chats"]
    return chats


def as_template(chat: str) -> str:
    """A template that gives this very text, whatever is asked."""
    return "{{ " + ascii(chat) + " }}"


def _serve() -> None:
    """Render the request on stdin and write the answer to stdout: the process that is limited."""
    from transformers.utils.chat_template_utils import render_jinja_template

    request = json.load(sys.stdin.buffer)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + _SECONDS
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),  # what ends at the limit of time would leave one
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, pages * _PAGE + _BYTES),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        rendered: Any = render_jinja_template(**request)  # typed as a string, and gives a tuple
        answer: dict[str, Any] = {"chats": rendered[0]}
        if sum(map(len, rendered[0])) > _CHARACTERS:
            answer = {"problem": f"gives more than {_CHARACTERS:,} characters"}
    except MemoryError:
        answer = {"problem": f"needs more than {_BYTES >> 20} MiB"}
    except Exception as error:  # whatever a template can provoke
        answer = {"problem": f"fails ({str(error)[:120] or type(error).__name__!a})"}
    sys.stdout.write(json.dumps(answer))
