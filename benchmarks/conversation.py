"""What a call costs the actor in processor time before and after sampling: recognise, render, encode, read, remember.

    python -m benchmarks.conversation

A conversation of 20 messages with two tools is sent again and again, as an agent sends it: the policy's answers are in
it, and one result of a tool is new. The tokenizer is the starter policy's, with the chat template of warm starts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.gateway.conversation import Conversation
from actors.gateway.messages import Message, Tool
from actors.gateway.read import AnswerReader
from actors.gateway.render import Renderer
from actors.prompts import load_tokenizer
from learner.warmstart import CHAT_MARKERS, CHAT_TEMPLATE

MODEL = Path(__file__).parents[1] / "models" / "starter"
MESSAGES = 20
RESULT = "You open the drawer 1. The drawer 1 is open. In it, you see a pen 1, a book 2 and a key chain 1."


@dataclass(frozen=True)
class Cost:
    """Processor time of one call, in milliseconds; `first`: of a conversation that is new."""

    first: float
    ask: float
    read: float
    answered: float

    @property
    def call(self) -> float:
        """Of a call that continues a conversation, in all."""
        return self.ask + self.read + self.answered


def chat_tokenizer() -> Any:
    """The starter policy's tokenizer with the chat template of warm starts."""
    tokenizer = load_tokenizer(MODEL)
    tokenizer.add_tokens([*CHAT_MARKERS], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tools() -> list[Tool]:
    """Two tools, with descriptions of the usual length."""
    text = {"type": "string", "description": "The action, one of those that the observation allows."}
    parameters = {"type": "object", "properties": {"action": text}, "required": ["action"]}
    described = "Take an action in the environment and return what is observed afterwards."
    return [
        {"type": "function", "function": {"name": name, "description": described, "parameters": parameters}}
        for name in ("act", "plan")
    ]


def measure(calls: int = 500) -> Cost:
    """The cost of a call, over `calls` of them.

    Args:
        calls: that continue a conversation of `MESSAGES` messages.
    """
    renderer = Renderer(chat_tokenizer())
    reader, declared = AnswerReader(renderer), tools()
    said = '<tool_call>{"name": "act", "arguments": {"action": "open drawer 1"}}</tool_call>'
    ids = [*renderer.tokenizer.encode(said, add_special_tokens=False), renderer.tokenizer.eos_token_id]
    spent = dict.fromkeys(("first", "ask", "read", "answered"), 0.0)
    counted = first = 0
    while counted < calls:
        conversation = Conversation(renderer)
        messages = [Message("system", "You are in a house. " * 20), Message("user", f"{first}: put a pen on the desk.")]
        first += 1
        for number in range(MESSAGES // 2 + 20):
            continues = len(messages) >= MESSAGES
            began = time.process_time()
            prompt = conversation.ask(messages, declared)
            asked = time.process_time()
            reading = reader.read(prompt.begun, ids, finished=True, tools=declared)
            read = time.process_time()
            conversation.answered(number, prompt, ids, reading)
            ended = time.process_time()
            if number == 0:
                spent["first"] += asked - began
            if continues:
                counted += 1
                spent["ask"] += asked - began
                spent["read"] += read - asked
                spent["answered"] += ended - read
                messages = [*messages[:-1], Message("tool", f"{number} {RESULT}", tool_call_id="call_1")]
            else:
                result = Message("tool", f"{number} {RESULT}", tool_call_id=f"call_{number}")
                messages = [*messages, reading.message, result]
    times = {name: 1000 * seconds / (first if name == "first" else counted) for name, seconds in spent.items()}
    return Cost(**times)


def main() -> None:
    """Print the cost of a call."""
    cost = measure()
    print(f"first call      {cost.first:6.2f} ms")
    print(
        f"later calls     {cost.call:6.2f} ms: ask {cost.ask:.2f}, read {cost.read:.2f}, answered {cost.answered:.2f}"
    )


if __name__ == "__main__":
    main()
