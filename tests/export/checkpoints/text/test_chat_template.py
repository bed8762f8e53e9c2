"""Chat templates are rendered as transformers renders them, and a hostile one is bad input."""

from __future__ import annotations

import pytest

from ditf.export.checkpoints.text.chat_template import as_template, check_marks, render_chats
from ditf.runtime.errors import InputError
from tests.checkpoint_parts import tiny_qwen_tokenizer

PROMPTS = ["a cat", "quotes ' \" {{ 1 }} {% raw %}\n\u00e9 \U0001f600 \\n"]


@pytest.mark.parametrize("thinking", [True, False])
def test_a_chat_is_what_transformers_makes_of_it(thinking):
    tokenizer = tiny_qwen_tokenizer()
    expected = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=thinking,
        )
        for prompt in PROMPTS
    ]
    assert render_chats(tokenizer, PROMPTS, thinking) == expected
    for chat in expected:
        tokenizer.chat_template = as_template(chat)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == chat


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ ''.__class__.__mro__ }}", "fails .*unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "fails .*unsafe"),
        ("{% for", "fails"),
        ("{{ raise_exception('a\nb') }}", "fails"),
        ("{{ 1 / 0 }}", "fails"),
        ("{{ 'a' * 9999999999 }}", "needs more than 512 MiB"),
        ("{{ 'a' * 2000000 }}", "gives more than 1,048,576 characters"),
        (
            "{% set x = namespace(y='a') %}{% for i in range(60) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
            "needs",
        ),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "takes more than 2 s",
        ),
        (None, "is missing"),
    ],
)
def test_a_hostile_template_is_bad_input(template, problem):
    tokenizer = tiny_qwen_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=rf"the chat template of .* {problem}") as caught:
        render_chats(tokenizer, ["a cat"], True)
    assert "\n" not in str(caught.value)


def test_the_marks_of_a_chat_are_tokens():
    """A mark that the vocabulary lacks would be read letter by letter."""
    tokenizer = tiny_qwen_tokenizer()
    check_marks(tokenizer, "<|im_start|>user\na <|cat|><|im_end|>", "a <|cat|>")
    with pytest.raises(InputError, match=r"writes <\|end\|>, which is no token"):
        check_marks(tokenizer, "<|im_start|>user\na cat<|end|>", "a cat")
