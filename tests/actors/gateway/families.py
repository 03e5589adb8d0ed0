"""Chat templates of the structures that models have, and the starter policy's tokenizer with their markers.

Each is as short as its structure allows:

    chatml    every message between two markers; calls as JSON in tags; results of tools within a user's turn
    thinking  as chatml; thoughts of turns before the last user's message are dropped, later ones are written out
    llama     headers before messages; a call is a JSON object; BOS
    mistral   only users' messages are marked; calls and results are JSON lists; roles must alternate; ids of 9 letters
    glm       nothing ends an answer but the marker of the next role; arguments between tags
    harmony   channels; an answer ends with one marker in the history and with another when it is sampled
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[3] / "models" / "starter"

_TOOLS = (
    "{% if tools %}<|im_start|>system\n"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}# Tools\n"
    "{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}<|im_end|>\n"
    "{% elif messages[0].role == 'system' %}<|im_start|>system\n{{ messages[0].content }}<|im_end|>\n{% endif %}"
)
_RESULTS = (
    "{% elif m.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}<|im_start|>user{% endif %}\n"
    "<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% if loop.last or loop.nextitem.role != 'tool' %}<|im_end|>\n{% endif %}"
)
_CALLS = (
    "{% for call in m.tool_calls or [] %}"
    "{% if not loop.first or m.content %}\n{% endif %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}"
)

CHATML = (
    _TOOLS + "{% for m in messages %}{% if m.role == 'system' %}{% if not loop.first %}"
    "<|im_start|>system\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content }}"
    + _CALLS
    + "<|im_end|>\n"
    + _RESULTS
    + "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_THINKING = (
    _TOOLS + "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% if not loop.first %}"
    "<|im_start|>system\n{{ m.content }}<|im_end|>\n{% endif %}"
    "{% elif m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n"
    "{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% if KEEP %}"
    "<think>\n{{ (m.reasoning_content or '').strip() }}\n</think>\n\n{% endif %}"
    "{{ m.content.strip() }}" + _CALLS + "<|im_end|>\n" + _RESULTS + "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
THINKING = _THINKING.replace("KEEP", "loop.index0 > ns.last and (loop.last or m.reasoning_content)")
KEEPING = _THINKING.replace("KEEP", "true")
"""As `THINKING`, but the thoughts of all turns are written."""

LLAMA = (
    "{{ bos_token }}"
    "{% if tools %}<|start_header_id|>system<|end_header_id|>\n\nYou have functions.\n"
    "{% for tool in tools %}{{ tool | tojson(indent=4) }}\n\n{% endfor %}<|eot_id|>{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ m.content | tojson }}<|eot_id|>"
    "{% elif m.tool_calls %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{"name": "{{ m.tool_calls[0].function.name }}", '
    '"parameters": {{ m.tool_calls[0].function.arguments | tojson }}}<|eot_id|>'
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% set ns = namespace(asked=false) %}"
    "{% for m in messages %}"
    "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}"
    "{% if ns.asked %}{{ raise_exception('roles must alternate user/assistant') }}{% endif %}{% set ns.asked = true %}"
    "{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}"
    '[TOOL_RESULTS]{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}[/TOOL_RESULTS]'
    "{% elif m.tool_calls %}{% set ns.asked = false %}[TOOL_CALLS]["
    "{% for call in m.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids must have nine letters') }}{% endif %}"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}'
    "{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"
    "{% else %}{% set ns.asked = false %}{{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
MISTRAL_ANSWERS = {
    "start_anchor": "[/INST]",
    "fields": {
        "tool_calls": {
            "open": "[TOOL_CALLS]",
            "close": "<|endoftext|>",
            "content": "json",
            "transform": {"id": "{id}", "function": {"name": "{name}", "arguments": "{arguments}"}},
            "transform_each": True,
        },
        "content": {"close": "<|endoftext|>", "content": "text"},
    },
}

GLM = (
    "[gMASK]<sop>"
    "{% if tools %}<|system|>\n# Tools\n{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|assistant|>\n{{ m.content | trim }}"
    "{% for call in m.tool_calls or [] %}\n<tool_call>{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %}\n"
    "<arg_key>{{ key }}</arg_key>\n<arg_value>{{ value if value is string else value | tojson }}</arg_value>"
    "{% endfor %}\n</tool_call>{% endfor %}"
    "{% elif m.role == 'tool' %}{% if loop.previtem.role != 'tool' %}<|observation|>{% endif %}\n"
    "<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}<|{{ m.role }}|>\n{{ m.content }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GLM_ANSWERS = {
    "start_anchor": "<|assistant|>\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>(?P<name>[^\n<]+)",
            "close": "</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<arg_key>(?P<key>[^<\n]+)</arg_key>\s*<arg_value>(?P<value>.*?)</arg_value>"
            },
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {
            "close_pattern": r"\s*(?:<\|user\|>|<\|observation\|>|<\|endoftext\|>)",
            "content": "text",
            "repeats": True,
            "join": "\n",
        },
    },
}

HARMONY = (
    "<|start|>system<|message|>You are an assistant.<|end|>"
    "{% if tools %}<|start|>developer<|message|># Tools\n{{ tools | tojson }}<|end|>{% endif %}"
    "{% set ns = namespace(tool='', last=-1) %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and not m.tool_calls %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' and m.tool_calls %}"
    "{% if m.thinking and loop.index0 > ns.last %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "{% set call = m.tool_calls[0].function %}{% set ns.tool = call.name %}"
    "<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>"
    "{{ call.arguments | tojson }}<|call|>"
    "{% elif m.role == 'assistant' %}"
    "{% if loop.last and m.thinking %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% elif m.role == 'tool' %}"
    "<|start|>functions.{{ ns.tool }} to=assistant<|channel|>commentary<|message|>{{ m.content | tojson }}<|end|>"
    "{% else %}<|start|>{{ 'developer' if m.role == 'system' else m.role }}<|message|>{{ m.content }}<|end|>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
HARMONY_ANSWERS = {
    "start_anchor_pattern": r"<\|start\|>assistant",
    "fields": {
        "thinking": {"open": "<|channel|>analysis<|message|>", "close": "<|end|>", "content": "text"},
        "tool_calls": {
            "open_pattern": r"(?:<\|start\|>assistant)? to=functions\.(?P<name>[^<\s]+)"
            r"<\|channel\|>commentary json<\|message\|>",
            "close": "<|call|>",
            "repeats": True,
            "content": "json",
            "transform": {"function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {
            "open_pattern": r"(?:<\|start\|>assistant)?<\|channel\|>final<\|message\|>",
            "close_pattern": r"<\|return\|>|<\|end\|>",
            "content": "text",
        },
    },
}

TEMPLATES: dict[str, tuple[str, dict[str, Any] | None, str, list[str]]] = {
    "chatml": (CHATML, None, "<|im_end|>", ["<|im_start|>", "<|im_end|>"]),
    "thinking": (THINKING, None, "<|im_end|>", ["<|im_start|>", "<|im_end|>"]),
    "llama": (
        LLAMA,
        None,
        "<|eot_id|>",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
    ),
    "mistral": (
        MISTRAL,
        MISTRAL_ANSWERS,
        "<|endoftext|>",
        [
            "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
        ],
    ),
    "glm": (
        GLM,
        GLM_ANSWERS,
        "<|endoftext|>",
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
    ),
    "harmony": (
        HARMONY,
        HARMONY_ANSWERS,
        "<|return|>",
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"],
    ),
}  # fmt: skip
"""By name: chat template, response template, EOS, special tokens."""

STOPS = {
    "chatml": ["<|im_end|>", "<|endoftext|>"],
    "thinking": ["<|im_end|>", "<|endoftext|>"],
    "llama": ["<|eot_id|>"],
    "mistral": ["<|endoftext|>"],
    "glm": ["<|user|>", "<|observation|>"],
    "harmony": ["<|return|>", "<|call|>"],
}
"""Tokens that end an answer when they are sampled."""
_MARKUP = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
_BOS = {"llama": "<|begin_of_text|>", "mistral": "<s>"}


@functools.cache
def tokenizer(family: str) -> Any:
    """The starter policy's tokenizer with a family's markers, chat template and response template."""
    from tokenizers import AddedToken
    from transformers import AutoTokenizer

    template, answers, eos, special = TEMPLATES[family]
    made = AutoTokenizer.from_pretrained(str(MODEL), local_files_only=True)
    made.add_tokens([AddedToken(token, special=True, normalized=False) for token in special], special_tokens=True)
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in _MARKUP])
    made.eos_token = eos
    if family in _BOS:
        made.bos_token = _BOS[family]
    made.chat_template = template
    if answers is not None:
        made.response_template = answers
    return made


def written(family: str, thought: str, content: str, calls: Sequence[tuple[str, dict[str, object]]]) -> str:
    """An answer as a model of the family writes it after the prompt, without the token that ends it."""
    made = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    tags = [f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>' for name, text in made]
    if family == "chatml":
        return "\n".join(part for part in (content, *tags) if part)
    if family == "thinking":
        return f"{thought}\n</think>\n\n" + "\n".join(part for part in (content, *tags) if part)
    if family == "llama":
        return f'{{"name": "{made[0][0]}", "parameters": {made[0][1]}}}' if made else content
    if family == "mistral":
        listed = ", ".join(f'{{"name": "{n}", "arguments": {t}, "id": "call0000{i}"}}' for i, (n, t) in enumerate(made))
        return f"[TOOL_CALLS][{listed}]" if made else content
    if family == "glm":
        return content + "".join(
            f"\n<tool_call>{name}\n"
            + "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in arguments.items())
            + "</tool_call>"
            for name, arguments in calls
        )
    analysis = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    if made:
        return f"{analysis} to=functions.{made[0][0]}<|channel|>commentary json<|message|>{made[0][1]}"
    return f"{analysis}<|channel|>final<|message|>{content}"


def stop(family: str, is_call: bool) -> str:
    """The token with which a model of the family ends an answer."""
    return {"glm": ("<|user|>", "<|observation|>"), "harmony": ("<|return|>", "<|call|>")}.get(
        family, (STOPS[family][0],) * 2
    )[is_call]


CALLS_AT_ONCE = {"chatml": 3, "thinking": 3, "llama": 1, "mistral": 3, "glm": 3, "harmony": 1}
WITH_THOUGHTS = ("thinking", "harmony")
