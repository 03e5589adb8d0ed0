"""Agent processes: what they get, what is kept of them, and that none outlives its end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from actors.harness import command
from actors.harness.command import (
    OUTPUT_BYTES,
    AgentProcess,
    AgentUnavailable,
    Launcher,
    command_problem,
    split_command,
)
from services.config.agent import AgentConfig
from tests.waiting import until

Run = Callable[..., Awaitable[AgentProcess]]


@pytest_asyncio.fixture
async def run(tmp_path: Path) -> AsyncIterator[Run]:
    """Starts an agent with this text; further arguments are the configuration's."""
    launchers: list[Launcher] = []

    async def start(text: str, **agent: object) -> AgentProcess:
        script = tmp_path / f"agent{len(launchers)}.py"
        script.write_text(text)
        launcher = Launcher(AgentConfig.model_validate({"command": ["python", str(script), "--flag"], **agent}))
        launchers.append(launcher)
        return await launcher.launch({"ANCHORAGE_GOAL": "count"})

    start.launchers = launchers  # type: ignore[attr-defined]
    yield start
    for launcher in launchers:
        await launcher.close()


async def code_of(process: AgentProcess) -> int | None:
    async with asyncio.timeout(120):
        return await asyncio.shield(process.exited)


async def test_an_agent_gets_its_variables_and_none_of_the_actors(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REDIS_URL", "ANCHORAGE_ENV_TOKEN", "RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH"):
        monkeypatch.setenv(name, "a-secret")
    monkeypatch.setenv("MY_MODE", "fast")
    text = (
        "import json, os, resource, sys\n"
        "files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]\n"
        "print(json.dumps([dict(os.environ), os.getcwd(), sorted(os.listdir('/proc/self/fd')), files, sys.argv[1:],"
        " resource.getrlimit(resource.RLIMIT_DATA)[0], os.getsid(0) == os.getpid(), __name__]))"
    )
    process = await run(text, pass_environment=["MY_MODE"], memory_mib=1024)
    assert await code_of(process) == 0
    environment, folder, descriptors, files, arguments, data, alone, name = json.loads(process.output())
    assert environment.pop("PATH").startswith(str(Path(sys.executable).parent))
    home = environment["HOME"]
    assert environment == {
        "LANG": "C.UTF-8",
        "HOME": home,
        "TMPDIR": home,
        "MY_MODE": "fast",
        "ANCHORAGE_GOAL": "count",
    }
    assert "a-secret" not in process.output()
    assert folder == home == str(process.folder)
    assert len(descriptors) == 4  # standard streams, and the folder that is listed
    assert (files, arguments, data, alone, name) == (1024, ["--flag"], 1024 * 2**20, True, "__main__")
    await asyncio.to_thread(until, lambda: not process.folder.exists())


@pytest.mark.parametrize(
    ("text", "code", "output"),
    [
        ("print('done')", 0, "done"),
        ("import sys; sys.exit(3)", 3, ""),
        ("import sys; sys.exit('no key')", 1, "no key"),
        ("raise ValueError('wrong')", 1, "ValueError: wrong"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", -11, ""),
        ("import atexit; atexit.register(print, 'bye')", 0, "bye"),
        ("import threading; threading.Thread(target=print, args=('late',)).start()", 0, "late"),
    ],
)
async def test_how_an_agent_ends_is_told_with_its_last_words(run: Run, text: str, code: int, output: str) -> None:
    process = await run(text)
    assert await code_of(process) == code
    assert output in process.last_words()


async def test_the_end_of_a_long_output_is_kept(run: Run) -> None:
    process = await run("for n in range(40_000): print('line', n)")
    assert await code_of(process) == 0
    assert len(process.output()) == OUTPUT_BYTES
    assert process.output().endswith("line 39999\n")


async def test_an_agent_that_ignores_sigterm_is_killed_with_what_it_started(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "GRACE_S", 0.5)
    text = (
        "import signal, subprocess, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    process = await run(text)
    await asyncio.to_thread(until, process.output)
    child = int(process.output())
    (launcher,) = run.launchers  # type: ignore[attr-defined]
    launcher.end(process)
    assert await code_of(process) == -signal.SIGKILL
    await asyncio.to_thread(until, lambda: gone(child))
    assert launcher.alive == 0


async def test_what_an_agent_leaves_running_ends_with_it(run: Run) -> None:
    process = await run("import subprocess; print(subprocess.Popen(['sleep', '600']).pid)")
    assert await code_of(process) == 0
    await asyncio.to_thread(until, lambda: gone(int(process.output())))


async def test_agents_end_with_the_process_that_forks_them_and_the_next_gets_another(run: Run) -> None:
    process = await run("import time; print('ready', flush=True); time.sleep(600)")
    await asyncio.to_thread(until, process.output)
    (launcher,) = run.launchers  # type: ignore[attr-defined]
    assert process.pid is not None
    psutil.Process(process.pid).parent().kill()
    assert await code_of(process) is None
    await asyncio.to_thread(until, lambda: gone(process.pid))
    again = await launcher.launch({})
    await asyncio.to_thread(until, again.output)


ACTOR = """
import asyncio, sys
from actors.harness.command import Launcher
from services.config.agent import AgentConfig

async def main():
    launcher = Launcher(AgentConfig(command=("python", sys.argv[1])))
    agents = [await launcher.launch({}) for _ in range(3)]
    while not all(agent.output().count("\\n") for agent in agents):
        await asyncio.sleep(0.01)
    print(*(agent.pid for agent in agents), *(agent.output().strip() for agent in agents), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def test_agents_and_what_they_started_end_with_a_killed_actor(tmp_path: Path) -> None:
    script = tmp_path / "agent.py"
    script.write_text(
        "import subprocess, time\nprint(subprocess.Popen(['sleep', '600']).pid, flush=True)\ntime.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", ACTOR, str(script)], stdout=subprocess.PIPE, text=True) as actor:
        assert actor.stdout is not None
        pids = [int(pid) for pid in actor.stdout.readline().split()]
        assert len(pids) == 6
        assert not any(map(gone, pids))
        actor.kill()
        until(lambda: all(map(gone, pids)), seconds=60)


async def test_modules_are_imported_once_for_all_agents(run: Run) -> None:
    process = await run("import sys; print('httpx' in sys.modules, 'actors' in sys.modules)", preload=["httpx"])
    await code_of(process)
    assert process.output().split() == ["True", "False"]


@pytest.mark.parametrize(
    ("agent", "reason"),
    [
        ({"preload": ["no_such_module"]}, "cannot import no_such_module: ModuleNotFoundError"),
        ({"command": ["/nowhere/python", "x.py"]}, "cannot execute /nowhere/python"),
    ],
)
async def test_an_interpreter_that_cannot_be_used_is_named(run: Run, agent: dict[str, object], reason: str) -> None:
    with pytest.raises(AgentUnavailable, match=reason):
        await run("", **agent)


async def test_a_program_that_is_not_python(run: Run) -> None:
    process = await run("", command=["sh", "-c", "echo $ANCHORAGE_GOAL; exit 4"])
    assert await code_of(process) == 4
    assert process.output() == "count\n"
    missing = await run("", command=["no-such-program"])
    assert await code_of(missing) == 127
    assert "cannot execute no-such-program" in missing.last_words()


async def test_many_agents_leave_nothing_behind(run: Run) -> None:
    first = await run("print('hello')")
    await code_of(first)
    (launcher,) = run.launchers  # type: ignore[attr-defined]
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        agents = await asyncio.gather(*(launcher.launch({}) for _ in range(10)))
        assert await asyncio.gather(*map(code_of, agents)) == [0] * 10
        assert all(agent.output() == "hello\n" for agent in agents)
    await asyncio.to_thread(until, lambda: not any(agent.folder.exists() for agent in agents))
    assert launcher.alive == 0
    assert len(os.listdir("/proc/self/fd")) <= before


def test_commands_and_what_is_wrong_with_them(tmp_path: Path) -> None:
    script = tmp_path / "agent.py"
    script.touch()
    assert split_command(["python", str(script)]) == (sys.executable, ["-python", str(script)])
    assert split_command(["/x/python3.12", "-m", "agents", "a"]) == ("/x/python3.12", ["-python", "-m", "agents", "a"])
    assert split_command(["python", "-c", "1"]) == (sys.executable, ["python", "-c", "1"])
    assert command_problem(["python", str(script)]) is None
    assert command_problem(["sh", "-c", "true"]) is None
    for wrong, said in [
        (["python", "missing.py"], "no such file: missing.py"),
        (["/nowhere/python3", str(script)], "no such interpreter"),
        (["no-such-program"], "no such program"),
        (["python", "-m"], "-m needs the name of a module"),
    ]:
        assert said in (command_problem(wrong) or "")


def gone(pid: int | None) -> bool:
    try:
        return pid is None or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
