"""Renders the chat templates of tokenizers in a process with limited time and memory.

A template is a program that comes with the checkpoint. Jinja's sandbox keeps it away from files and from
Python, but it can still loop for years or fill the memory.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ditf.runtime.errors import InputError

_SECONDS, _BYTES, _CHARACTERS = 2, 512 << 20, 1 << 20  # a chat has about 100 characters
_DEADLINE = 300  # seconds after which the process is stopped, whatever it does
_PAGE = resource.getpagesize()
_MARK = re.compile(r"<\|[^<>|]+\|>")


def render_chats(tokenizer: Any, prompts: Sequence[str], thinking: bool) -> list[str]:
    """Render each prompt as the only message of a chat, as diffusers' pipelines do.

    Args:
        tokenizer: a tokenizer of transformers that has a chat template.
        thinking: the template's `enable_thinking`.

    Raises:
        InputError: the template is missing, fails, or takes more than 2 s, 512 MiB or a million characters;
            or it writes a mark that is no token.
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
    for chat, prompt in zip(chats, prompts, strict=True):
        check_marks(tokenizer, chat, prompt)
    return chats


def check_marks(tokenizer: Any, chat: str, prompt: str) -> None:
    """Check that the marks which a chat template has put around a prompt are tokens.

    Raises:
        InputError: one is not in the vocabulary, and would be read as letters; names it.
    """
    for mark in sorted(set(_MARK.findall(chat)) - set(_MARK.findall(prompt))):
        if mark not in tokenizer.get_vocab():
            raise InputError(
                f"the chat template of {tokenizer.name_or_path} writes {mark}, which is no token of it",
                "take the tokenizer from the checkpoint of its text encoder",
            )


def as_template(chat: str) -> str:
    """A template that always renders to this text."""
    return "{{ " + ascii(chat) + " }}"


def _serve() -> None:
    """Limit this process, render the request on stdin, and write the answer to stdout."""
    from transformers.utils.chat_template_utils import render_jinja_template

    request = json.load(sys.stdin.buffer)
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + 1 + _SECONDS
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    for kind, limit in (
        (resource.RLIMIT_CORE, 0),  # a process that hits the limit of time would leave a core file
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, pages * _PAGE + _BYTES),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        rendered: Any = render_jinja_template(**request)  # annotated as a string, but returns a tuple
        answer: dict[str, Any] = {"chats": rendered[0]}
        if sum(map(len, rendered[0])) > _CHARACTERS:
            answer = {"problem": f"gives more than {_CHARACTERS:,} characters"}
    except MemoryError:
        answer = {"problem": f"needs more than {_BYTES >> 20} MiB"}
    except Exception as error:  # a template can raise anything
        answer = {"problem": f"fails ({str(error)[:120] or type(error).__name__!a})"}
    sys.stdout.write(json.dumps(answer))
