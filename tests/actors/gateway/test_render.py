"""Chat templates: what is found out about them, and when they are refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from actors.gateway.messages import Message, ToolCall
from actors.gateway.render import HistoryUndecided, Renderer, TemplateRefused
from services.errors import ModelUnavailable
from tests.actors.gateway.families import KEEPING, TEMPLATES, tokenizer
from tests.actors.tokenizers_of_all_kinds import KINDS

ENDS = {
    "chatml": ("<|im_end|>",),
    "thinking": ("<|im_end|>",),
    "llama": ("<|eot_id|>",),
    "mistral": ("<|endoftext|>",),
    "glm": ("<|user|>", "<|observation|>"),
    "harmony": ("<|end|>", "<|call|>"),
}


def with_template(template: str | None) -> Any:
    made = copy.deepcopy(tokenizer("chatml"))
    made.chat_template = template
    return made


@pytest.mark.parametrize("family", TEMPLATES)
def test_what_a_template_does_is_found_out(family: str) -> None:
    renderer = Renderer(tokenizer(family), history="sampled")
    facts = renderer.facts
    assert (facts.system, facts.tools, facts.tool_messages, facts.stub) == (True, True, True, True)
    assert facts.ends == ENDS[family]
    assert facts.drops_thoughts == (family in ("thinking", "harmony"))
    assert renderer.splices
    assert facts.lines()[-1] == "rendered for each call: what is new"


def test_a_template_that_drops_thoughts_needs_a_choice() -> None:
    with pytest.raises(HistoryUndecided, match=r"drops the thoughts of earlier turns: agent\.history=sampled trains"):
        Renderer(tokenizer("thinking"))
    assert not Renderer(tokenizer("thinking"), history="template").splices
    assert Renderer(with_template(KEEPING)).history == "sampled"
    inline = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    with pytest.raises(HistoryUndecided):
        Renderer(with_template(inline))


def test_a_template_whose_tail_depends_on_all_that_was_before_is_rendered_whole() -> None:
    counting = "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.index }}\n{{ m.content }}<|im_end|>{% endfor %}"
    renderer = Renderer(with_template(counting))
    assert (renderer.facts.stub, renderer.facts.tool_messages, renderer.splices) == (False, False, False)
    assert renderer.facts.lines()[-1] == "rendered for each call: the whole conversation"


def test_a_template_without_tools_still_splices_texts() -> None:
    plain = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    renderer = Renderer(with_template(plain + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"))
    assert (renderer.facts.tools, renderer.facts.tool_messages, renderer.splices) == (False, False, True)
    called = Message("assistant", tool_calls=(ToolCall("act"),))
    tail = renderer.tail([Message("user", "Hi")], called, [Message("tool", "It is.")], "")
    assert tail.text == "<|im_end|>\n<|im_start|>tool\nIt is.<|im_end|>\n<|im_start|>assistant\n"


def test_templates_that_cannot_be_used_are_refused_in_one_line() -> None:
    with pytest.raises(ModelUnavailable, match="has no chat template"):
        Renderer(with_template(None))
    with pytest.raises(ModelUnavailable, match="leaves out the text"):
        Renderer(with_template("{% for m in messages %}{{ m.content[0].text }}{% endfor %}"))
    with pytest.raises(ModelUnavailable, match="cannot write this conversation: no users"):
        Renderer(with_template("{{ raise_exception('no users') }}"))


def test_what_a_template_refuses_is_one_line() -> None:
    renderer = Renderer(tokenizer("mistral"))
    with pytest.raises(
        TemplateRefused, match=r"^the chat template cannot write this conversation: roles must alternate"
    ):
        renderer.whole([Message("user", "Hi"), Message("user", "Ho")], "")


def test_what_begins_a_prompt_occurs_once_whatever_the_tokenizer() -> None:
    for kind, made in KINDS.items():
        renderer = Renderer(made())
        ids = renderer.encode_whole(
            renderer.whole(
                [
                    Message("user", "Go <|im_end|> </s>"),
                ],
                "",
            ).text
        )
        prefix = list(renderer.tokens.prefix)
        assert ids[: len(prefix)] == prefix, kind
        assert ids[len(prefix) : 2 * len(prefix)] != prefix or not prefix, kind


@pytest.mark.parametrize("family", TEMPLATES)
def test_conversations_have_the_ids_of_the_tokenizers_own_template(family: str) -> None:
    """Parts that are encoded apart, and remembered, have the ids of the whole."""
    made = tokenizer(family)
    renderer = Renderer(made, history="sampled")
    messages = [Message("system", "Be brief."), Message("user", "Hi é")]
    for number in range(3):
        messages += [Message("assistant", f"Yes {number}."), Message("user", f" and {number}\n")]
        plain = [{"role": one.role, "content": one.content} for one in messages]
        expected = made.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
        assert renderer.encode_whole(renderer.whole(messages, "").text) == expected
