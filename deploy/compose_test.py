"""Test the compose cluster on a real engine: build, start, train, scale, crash, stop and resume.

    python3 -m deploy.compose_test [--out runs/compose] [--keep]      (make compose-test)

Writes `summary.json` (for each check: name, passed, seconds, note; image sizes; time to the first update) and prints a
table. Exit code 1 if a check failed; 0, with the reason, if there is no engine. Checks after a failed one are recorded
as not run, which does not count as passed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import urllib.error
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from deploy.compose_cluster import ROOT, SECRETS, Cluster, Failed, engine_missing, inspect, wait_for
from tests.chaos.history import given_up, judge, read_ledger

RUN = "compose"
PER_UPDATE, STALENESS = 4, 1
OVERRIDES = (
    "learner.updates=100000",
    f"learner.groups_per_update={PER_UPDATE}",
    "learner.group_size=4",
    f"learner.max_staleness={STALENESS}",
    "learner.group_timeout_s=600",
    "rollout.episodes_in_flight=16",
    "rollout.kv_cache_mib=128",
    "rollout.lease_s=10",
    "checkpoint.every=3",
    "buffer.reconnect_s=180",
)
STANDING = ("redis", "alfworld", "webshop", "head", "control", "actor", "learner")
IMAGES = {"anchorage-env:0.1.0": "env", "anchorage:0.1.0-cpu": "node", "anchorage-redis:0.1.0": "redis"}
BASE = "python:3.11-slim-bookworm"
START_S, RECOVER_S = 600.0, 300.0
ENV_LIMIT_MB = 400.0


@dataclass(slots=True)
class Check:
    name: str
    passed: bool = False
    seconds: float = 0.0
    note: str = ""


@dataclass(slots=True)
class Summary:
    """Content of `summary.json`. Sizes in MB (10⁶ bytes), times in seconds."""

    checks: list[Check] = field(default_factory=list)
    images_mb: dict[str, float] = field(default_factory=dict)
    first_update_s: float | None = None
    skipped: str | None = None
    broken: bool = False

    def check(self, name: str, act: Callable[[], str]) -> None:
        """Run a check, which passes unless `act` raises; `act` returns a note. After a failure, no check runs."""
        one = Check(name)
        self.checks.append(one)
        began = time.monotonic()
        if self.broken:
            one.note = "not run: an earlier check failed"
        else:
            try:
                one.note = act()
                one.passed = True
            except (Failed, OSError, KeyError, ValueError, subprocess.SubprocessError) as error:
                one.note = " ".join(str(error).split())[:400] or type(error).__name__
                self.broken = True
        one.seconds = round(time.monotonic() - began, 1)
        print(f"{'passed' if one.passed else 'FAILED':7} {one.seconds:7.1f} s  {name}  {one.note}", flush=True)


def build(cluster: Cluster, summary: Summary) -> str:
    cluster.compose("build", timeout_s=5400)
    sizes = {name: inspect(image)["Size"] / 1e6 for image, name in IMAGES.items()}
    sizes["base"] = inspect(BASE)["Size"] / 1e6
    summary.images_mb = {name: round(size, 1) for name, size in sizes.items()}
    beyond = sizes["env"] - sizes["base"]
    if beyond >= ENV_LIMIT_MB:
        raise Failed(
            f"environment image must be at most {ENV_LIMIT_MB:.0f} MB larger than its base, got {beyond:.0f} MB"
        )
    return f"environment image {beyond:.0f} MB larger than its base"


def refuses_without_secrets() -> str:
    for image, command in (("anchorage-env:0.1.0", "environment alfworld"), ("anchorage:0.1.0-cpu", "actor")):
        done = subprocess.run(
            ["docker", "run", "--rm", "--network", "none", image, *command.split()],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if done.returncode == 0 or "make secrets" not in done.stderr or len(done.stderr.splitlines()) != 1:
            raise Failed(f"{image} {command}: exit code {done.returncode}, stderr {done.stderr.strip()[:200]!r}")
    return "exit code 2, one line"


def up(cluster: Cluster, *services: str) -> str:
    cluster.compose("up", "-d", "--no-build", *(services or STANDING))
    for service in services or STANDING:
        wait_for(f"{service} is healthy", lambda service=service: cluster.healthy(service), START_S)  # type: ignore[misc]
    return ""


def confined(cluster: Cluster) -> str:
    """Check the users of all containers, and which ports are published."""
    for service in STANDING:
        found = cluster.container(service)
        published = {
            (port["HostIp"], service) for ports in found["NetworkSettings"]["Ports"].values() for port in ports or ()
        }
        if published not in ({("127.0.0.1", "control")}, set()) or (service == "control") != bool(published):
            raise Failed(f"{service} is published: {published}")
        if found["Config"]["User"] in ("", "0", "root"):
            raise Failed(f"{service} runs as root")
    return "no root; only the control plane is published, on 127.0.0.1"


def tokens_are_required(cluster: Cluster) -> str:
    try:
        cluster.ask("/api/v1/runs")
    except urllib.error.HTTPError as error:
        if error.code != 401:
            raise Failed(f"the control plane returned {error.code} without a token, expected 401") from None
    else:
        raise Failed("the control plane accepted a request without a token")
    status = ("ray", "status", "--address", "head:6379")
    cluster.compose("exec", "-T", "actor", "env", "RAY_AUTH_MODE=token", *status)
    strangers = ("env", "-u", "RAY_AUTH_TOKEN", "RAY_AUTH_MODE=disabled")
    try:
        cluster.compose("exec", "-T", "actor", *strangers, *status, timeout_s=120)
    except (Failed, subprocess.TimeoutExpired):
        return "control plane returns 401, Ray rejects"
    raise Failed("Ray accepted a connection without a token")


def trains(cluster: Cluster, summary: Summary) -> str:
    began = time.monotonic()
    cluster.compose("up", "-d", "--no-build", "trainer")
    wait_for("the first update is done", lambda: cluster.update() >= 1, START_S)
    summary.first_update_s = round(time.monotonic() - began, 1)
    wait_for("three updates are done", lambda: cluster.update() >= 3, START_S)
    steps = {env["name"]: env["steps"] for env in cluster.look("/environments")["environments"]}
    if not (steps.get("alfworld") and steps.get("webshop")):
        raise Failed(f"not every environment was played, steps: {steps}")
    return f"first update after {summary.first_update_s} s; steps {steps}"


def continues(cluster: Cluster, updates: int = 2) -> None:
    """Wait for this many further updates: the first may consist of groups from before the change."""
    before = cluster.update()
    wait_for(f"update {before + updates} is done", lambda: cluster.update() >= before + updates, RECOVER_S)


def scale(cluster: Cluster, actors: int) -> str:
    cluster.compose("up", "-d", "--no-build", "--no-recreate", "--scale", f"actor={actors}", "actor")
    wait_for(f"{actors} rollout actors are playing", lambda: len(cluster.playing()) == actors, RECOVER_S)
    continues(cluster)
    return f"{actors} playing"


def survives(cluster: Cluster, service: str) -> str:
    before = cluster.container(service)["State"]["StartedAt"]
    cluster.crash(service)
    began = time.monotonic()
    wait_for(
        f"{service} has restarted",
        lambda: cluster.healthy(service) and cluster.container(service)["State"]["StartedAt"] != before,
        RECOVER_S,
    )
    back = time.monotonic() - began
    wait_for("a rollout actor is playing", lambda: bool(cluster.playing()), RECOVER_S)
    continues(cluster)
    if cluster.container("trainer")["RestartCount"]:
        raise Failed("the trainer restarted")
    return f"healthy again after {back:.0f} s, training continued"


def stops_cleanly(cluster: Cluster) -> str:
    """SIGTERM finishes the current update and leaves its checkpoint."""
    cluster.compose("stop", "trainer")
    [name] = cluster.compose("ps", "-a", "-q", "trainer").split() or cluster.containers("trainer")
    code = inspect(name)["State"]["ExitCode"]
    newest = max((c["version"] for c in cluster.look("/checkpoints")["checkpoints"]), default=0)
    done = cluster.update()
    if code != 130 or newest != done:
        raise Failed(f"exit code {code}, newest checkpoint {newest}, updates done {done}")
    return f"exit code 130, checkpoint of update {done}"


def resumes(cluster: Cluster) -> str:
    before = cluster.update()
    cluster.said.append(cluster.compose("logs", "--no-color", "trainer"))
    cluster.compose("down")
    up(cluster)
    cluster.compose("up", "-d", "--no-build", "trainer")
    wait_for(f"update {before + 2} is done", lambda: cluster.update() >= before + 2, START_S)
    return f"resumed from update {before}"


def judged(cluster: Cluster, folder: Path) -> str:
    """Check that the surviving history has each group once, and none that is too stale."""
    cluster.compose("stop", "trainer")
    ledger = folder / "ledger.jsonl"
    ledger.write_text(cluster.file("ledger.jsonl"))
    said = [*cluster.said, cluster.compose("logs", "--no-color", "trainer")]
    verdict = asdict(judge(read_ledger(ledger), given_up(said), per_update=PER_UPDATE, max_staleness=STALENESS))
    if any(verdict[name] for name in ("lost", "twice", "too_stale", "torn")):
        raise Failed(f"wrong ledger: {verdict}")
    return f"{verdict['groups_trained']} groups, each trained on once"


def play(cluster: Cluster, folder: Path, summary: Summary) -> None:
    scene: list[tuple[str, Callable[[], str]]] = [
        ("images are built", lambda: build(cluster, summary)),
        ("no start without secrets", refuses_without_secrets),
        ("up and healthy", lambda: up(cluster)),
        ("non-root, only the control plane published", lambda: confined(cluster)),
        ("tokens are required", lambda: tokens_are_required(cluster)),
        ("updates on ALFWorld and WebShop", lambda: trains(cluster, summary)),
        ("--scale actor=2 while training", lambda: scale(cluster, 2)),
        ("--scale actor=1 while training", lambda: scale(cluster, 1)),
        ("an actor container is killed", lambda: survives(cluster, "actor")),
        ("an environment container is killed", lambda: survives(cluster, "alfworld")),
        ("redis is killed", lambda: survives(cluster, "redis")),
        ("SIGTERM leaves a checkpoint", lambda: stops_cleanly(cluster)),
        ("down, up, resumed from the volumes", lambda: resumes(cluster)),
        ("each group is trained on once", lambda: judged(cluster, folder)),
    ]
    for name, act in scene:
        summary.check(name, act)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "compose")
    parser.add_argument("--keep", action="store_true", help="keep containers and volumes at the end")
    args = parser.parse_args()
    out: Path = args.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    summary = Summary(skipped=engine_missing())
    if summary.skipped:
        print(f"compose test skipped: {summary.skipped}")
    else:
        subprocess.run([str(ROOT / "deploy" / "secrets.sh"), str(SECRETS)], check=True)
        cluster = Cluster(out, RUN, OVERRIDES)
        cluster.compose("down", "-v")
        try:
            play(cluster, out, summary)
        finally:
            cluster.keep_logs()
            if not args.keep:
                cluster.compose("down", "-v")
    (out / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n")
    show(summary)
    return int(summary.broken)


def show(summary: Summary) -> None:
    for check in summary.checks:
        print(f"{check.name:44} {'passed' if check.passed else 'FAILED':7} {check.seconds:7.1f} s  {check.note}")
    for name, size in summary.images_mb.items():
        print(f"image {name:38} {size:8.1f} MB")
    if summary.first_update_s is not None:
        print(f"time to the first update {summary.first_update_s:27.1f} s")


if __name__ == "__main__":
    sys.exit(main())
