"""The commands of a run in Redis: each once, answered once, and never too many."""

import pytest

from services.buffer import Buffer
from services.buffer.commands import MAX_KEPT, MAX_WAITING, Action, Answer, Command
from services.config.tree import BufferConfig

ANSWER = Answer(at=2.0, done=True, text="done")


@pytest.fixture
def commands(redis_url, run_name):
    buffer = Buffer.connect(redis_url, run_name, BufferConfig())
    yield buffer.commands
    buffer.close()


def command(number, action=Action.CHECKPOINT):
    return Command(id=str(number), action=action, by="admin@here", at=float(number))


def test_a_command_is_there_once_and_answered_once(commands):
    for _ in range(2):
        assert commands.request(command(1))
    assert commands.waiting() == [command(1)]
    assert commands.answer("1", ANSWER)
    assert not commands.answer("1", Answer(at=3.0, done=False, text="later"))
    assert not commands.answer("unknown", ANSWER)
    assert commands.waiting() == []
    assert [found.answer for found in commands.all()] == [ANSWER]


def test_too_many_do_not_wait(commands):
    assert all(commands.request(command(number)) for number in range(MAX_WAITING))
    assert not commands.request(command(99))
    commands.answer("0", ANSWER)
    assert commands.request(command(99))
    assert [found.id for found in commands.waiting()] == [*map(str, range(1, MAX_WAITING)), "99"]


def test_old_answers_are_forgotten_and_waiting_commands_are_not(commands):
    commands.request(command(0))
    for number in range(1, MAX_KEPT + 20):
        commands.request(command(number))
        commands.answer(str(number), ANSWER)
    found = commands.all()
    assert len(found) == MAX_KEPT
    assert found[0].id == "0"
    assert found[-1].id == str(MAX_KEPT + 19)
