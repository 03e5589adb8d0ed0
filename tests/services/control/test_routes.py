"""What the API tells of runs, live and finished, held against what was put there."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import yaml

from learner.record import WarningLog
from services.archive import files, numbers_of, read_index
from services.buffer.keys import KINDS, NAMES, Keys
from services.config.load import dump_config
from services.control import exporter
from services.control.json_lines import JsonLines
from services.run_folder import WARNINGS_NAME
from services.schemas import Task, Ticket, Trajectory
from tests.control_runs import GROUP_SIZE, HOSTILE, UPDATES, beat, make_agents, make_config, make_finished


def get(api, path, status=200, **query):
    response = api.get(f"/api/v1{path}", params=query)
    assert response.status_code == status, response.text
    return response.json()


def test_a_finished_run_says_that_it_is_one(api):
    (run,) = get(api, "/runs")["runs"]
    assert run["name"] == "finished"
    assert (run["live"], run["state"], run["update"], run["updates"]) == (False, "ended", UPDATES, 20)
    assert run["note"] == "data from the run's folder; its Redis stopped with it"
    assert run["evaluation"] == pytest.approx(0.3 + 0.04 * UPDATES)
    actors = get(api, "/runs/finished/actors")
    assert (actors["live"], actors["total"], actors["actors"]) == (False, 0, [])
    assert get(api, "/runs/finished/buffer")["live"] is False
    assert get(api, "/runs/finished/environments") == {"environments": []}
    assert get(api, "/runs/finished/commands") == {"commands": []}


def test_warnings_of_the_training_signal_come_newest_first(api, runs):
    assert get(api, "/runs/finished/warnings") == {"warnings": []}
    log = WarningLog(runs / "finished")
    log.append(3, "equal_rewards", "update 3: no group had different rewards")
    log.append(5, "no_valid_action", f"update 5: {HOSTILE}")
    with (runs / "finished" / WARNINGS_NAME).open("a") as file:
        file.write('{"update": "many"}\n[]\nnot JSON\n{"update": 7, "name": "half')
    found = get(api, "/runs/finished/warnings")["warnings"]
    assert [(one["update"], one["name"]) for one in found] == [(5, "no_valid_action"), (3, "equal_rewards")]
    assert found[0]["text"] == f"update 5: {HOSTILE}"


def test_a_live_run_is_told_from_its_redis(api, live, run_name):
    assert get(api, f"/runs/{run_name}")["state"] == "running"
    buffer = get(api, f"/runs/{run_name}/buffer")
    assert (buffer["queued"], buffer["leased"]) == (1, 3)
    assert buffer["complete_groups"] == [100]
    assert buffer["cancelled_groups"] == {"102": HOSTILE}
    (actor,) = get(api, f"/runs/{run_name}/actors")["actors"]
    assert (actor["version"], actor["tokens_per_s"], actor["kv_use"]) == (5, 812.5, 0.25)


def test_an_actor_says_when_it_was_heard_by_the_clock_of_redis(api, live, run_name):
    live._call("hset", "actor_heard", f"{run_name}-rollout-0", 0)
    (actor,) = get(api, f"/runs/{run_name}/actors")["actors"]
    assert actor["heard_s"] > 10**9
    beat(live, run_name)
    live.heartbeat("silent", {}, 0.0)
    live.heartbeat("other", {"kv_use": "much"}, 600.0)
    found = live.heartbeats()
    assert set(found) == {f"{run_name}-rollout-0", "other"}
    assert all(0 <= one.heard_s < 60 for one in found.values())
    # The heartbeat that cleared the silent one away has forgotten its time too.
    assert live._call("hlen", "actor_heard") == 2


def test_leases_are_told_by_holder_with_the_seconds_left(api, live, run_name):
    (more,) = live.lease("another", 1, 30.0)
    leases = get(api, f"/runs/{run_name}/leases")["leases"]
    assert [one["holder"] for one in leases] == ["another", *[f"{run_name}-rollout-0"] * 3]
    assert (leases[0]["stream"], leases[0]["group"], leases[0]["member"]) == ("train", more.group, more.member)
    assert 0 < leases[0]["left_s"] <= 30 < leases[1]["left_s"] <= 600
    assert get(api, "/runs/finished/leases") == {"total": 0, "leases": []}


def test_a_page_lists_a_part_of_many(api, live, run_name):
    for number in range(150):
        live.heartbeat(f"z{number:03d}", {"episodes": 2, "tokens_per_s": 1.5}, 600.0)
    found = get(api, f"/runs/{run_name}/actors")
    names = [actor["name"] for actor in found["actors"]]
    assert (found["total"], len(names)) == (151, 100)
    rest = get(api, f"/runs/{run_name}/actors", offset=100)["actors"]
    assert [*names, *(actor["name"] for actor in rest)] == sorted(live.actors())
    one = next(actor for actor in found["actors"] if actor["name"] == f"{run_name}-rollout-0")
    assert found["tokens_per_s"] == one["tokens_per_s"] + 150 * 1.5
    assert found["episodes"] == one["episodes"] + 150 * 2
    assert f'anchorage_actors_episodes{{run="{run_name}"}} {found["episodes"]:.1f}' in api.get("/metrics").text
    assert f'actor="z149",run="{run_name}"' in api.get("/metrics").text
    live.lease("another", 1, 30.0)
    found = get(api, f"/runs/{run_name}/leases", limit=2)
    assert (found["total"], [lease["holder"] for lease in found["leases"]]) == (
        4,
        ["another", f"{run_name}-rollout-0"],
    )


def test_of_very_many_actors_only_sums_are_exported(api, live, run_name):
    for number in range(exporter.MOST_ACTORS):
        live.heartbeat(f"z{number:03d}", {"episodes": 2}, 600.0)
    text = api.get("/metrics").text
    assert f'anchorage_actors{{run="{run_name}"}} {exporter.MOST_ACTORS + 1}.0' in text
    assert "anchorage_actors_episodes" in text
    assert 'actor="' not in text


def test_very_many_groups_are_counted_and_a_part_is_listed(api, live, run_name):
    task = Task(env="e", split="s", index=0)
    tickets = [Ticket(group=group, member=0, group_size=1, task=task, seed=0) for group in range(200, 450)]
    live.issue(tickets)
    for ticket in tickets[:120]:
        live.store(Trajectory(ticket, ()))
    for ticket in tickets[120:]:
        live.cancel("train", ticket.group, "why")
    buffer = get(api, f"/runs/{run_name}/buffer")
    train = next(stream for stream in buffer["streams"] if stream["stream"] == "train")
    assert (train["complete"], train["cancelled"]) == (121, 131)
    assert buffer["complete_groups"] == [100, *range(200, 299)]
    assert len(buffer["cancelled_groups"]) == 100
    assert buffer["cancelled_groups"].keys() <= {str(group) for group in live.cancelled("train")}


def test_environment_servers_are_asked_side_by_side(api, live, run_name, runs):
    both = threading.Barrier(2, timeout=30)

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/info":
                both.wait()  # nobody is answered before both were asked
            body = b'{"name": "alfworld", "splits": {"train": 3}}' if self.path == "/info" else b""
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Answers) for _ in range(2)]
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    urls = [f"http://me:hidden-word@127.0.0.1:{server.server_port}" for server in servers]
    tree = yaml.safe_load((runs / run_name / "config.yaml").read_text())
    tree["env"] |= {"urls": urls}
    (runs / run_name / "config.yaml").write_text(yaml.safe_dump(tree))
    for thread in threads:
        thread.start()
    try:
        found = get(api, f"/runs/{run_name}/environments")["environments"]
    finally:
        both.abort()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()
    assert [one["detail"] for one in found] == ["reachable", "reachable"]
    assert [one["url"] for one in found] == [url.replace("me:hidden-word@", "") for url in urls]


def test_a_renamed_folder_is_not_the_run_in_redis(api, live, run_name, runs):
    (runs / run_name).rename(runs / f"{run_name}.previous")
    assert get(api, f"/runs/{run_name}.previous")["live"] is False
    get(api, f"/runs/{run_name}", status=404)


def test_metrics_come_in_parts_and_by_name(api):
    whole = get(api, "/runs/finished/metrics")
    assert len(whole["records"]) == UPDATES + 2 == whole["next"]
    assert whole["records"][1]["loss/grad_norm"] is None
    some = get(api, "/runs/finished/metrics", after=1, limit=2, name="loss/kl")
    assert [set(record) for record in some["records"]] == [{"step", "time", "loss/kl"}] * 2
    assert some["next"] == 3
    assert get(api, "/runs/finished/metrics", after=99)["records"] == []


def test_metrics_of_a_run_that_went_back_are_read_anew(api, runs):
    before = get(api, "/runs/finished/metrics")
    path = runs / "finished" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    other = path.with_suffix(".tmp")
    other.write_text("".join(lines[:3]) + '{"step": 3, "half')
    other.replace(path)
    after = get(api, "/runs/finished/metrics")
    assert len(after["records"]) == 3
    assert after["generation"] > before["generation"]
    with path.open("a") as file:
        file.write(' written": 1}\n')
    assert get(api, "/runs/finished/metrics", after=3)["records"] == [{"step": 3, "half written": 1}]


def test_a_rewritten_file_is_told_whatever_its_inode_and_size(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    lines = JsonLines(path)
    records, first = lines.reading()
    with path.open("r+") as file:  # as if the number of the inode had been used again
        file.write('{"step": 1}\n{"step": 7}\n{"step": 8}\n')
    again, second = lines.reading()
    assert ([one["step"] for one in records], [one["step"] for one in again]) == ([1, 2], [1, 7, 8])
    assert second > first
    assert JsonLines(path).generation > second  # another process of the control plane


def test_staleness_and_step_groups_are_counted(api, runs):
    ages = get(api, "/runs/finished/staleness")["updates"]
    assert ages[0] == {"update": 1, "counts": {"0": 2}}
    assert ages[-1] == {"update": UPDATES, "counts": {"1": 2}}
    sizes = get(api, "/runs/finished/step-groups", last=1)["updates"]
    assert [one["update"] for one in sizes] == [UPDATES]
    index = read_index(files(runs / "finished")[-1])
    steps = sum(member.steps for entry in index.groups for member in entry.members)
    assert sum(int(size) * count for size, count in sizes[0]["counts"].items()) == steps


def test_groups_and_episodes_are_found_by_what_they_are(api):
    groups = get(api, "/runs/finished/groups")
    assert groups["total"] == 2 * UPDATES
    assert groups["groups"][0]["update"] == UPDATES
    assert (groups["first_update"], groups["last_update"]) == (1, UPDATES)
    assert get(api, "/runs/finished/groups", success="none")["total"] == 0
    assert get(api, "/runs/finished/groups", success="some", update=2)["total"] == 2
    kind = groups["task_types"][0]
    assert {one["task_type"] for one in get(api, "/runs/finished/groups", task_type=kind)["groups"]} == {kind}
    episodes = get(api, "/runs/finished/trajectories", won=True, version=3)
    assert episodes["total"] == 4
    assert all(one["won"] and one["oldest_version"] == 3 for one in episodes["trajectories"])
    assert get(api, "/runs/finished/trajectories", group=1)["total"] == GROUP_SIZE
    assert len(get(api, "/runs/finished/trajectories", limit=3, offset=46)["trajectories"]) == 2


def test_an_episode_bears_the_numbers_it_was_trained_with(api, runs):
    view = get(api, "/runs/finished/trajectories/3/1")
    entry = next(entry for entry in read_index(files(runs / "finished")[1]).groups if entry.group == 3)
    numbers = numbers_of(entry.members[1])
    assert [step["advantage"] for step in view["steps"]] == numbers.total.tolist()
    assert [step["return"] for step in view["steps"]] == numbers.returns.tolist()
    assert view["steps"][-1]["thought"] == HOSTILE
    assert view["steps"][0]["versions"] == [{"version": 1, "tokens": 4}]
    assert view["facts"]["goal"] == "find a pen"
    get(api, "/runs/finished/trajectories/3/99", status=404)
    get(api, "/runs/finished/trajectories/999/0", status=404)


def test_a_group_taken_apart_adds_up(api):
    view = get(api, "/runs/finished/groups/2")
    steps = [step for state in view["states"] for step in state["steps"]]
    assert len(steps) == view["summary"]["steps"] == sum(edge["count"] for edge in view["edges"])
    assert len(view["states"]) == view["summary"]["step_groups"]
    assert view["formula"]["gamma"] == 0.95
    assert (view["algorithm"]["title"], view["algorithm"]["step_level"]) == ("GiGPO", True)
    assert {"term": "ω", "meaning": "1, weight of the step level"} in view["algorithm"]["terms"]
    for state in view["states"]:
        returns = np.array([step["return"] for step in state["steps"]])
        assert state["mean_return"] == pytest.approx(returns.mean())
        if len(returns) == 1:
            assert state["steps"][0]["step_advantage"] == 0
        else:
            expected = (returns - returns.mean()) / (returns.std(ddof=1) + 1e-6)
            assert [step["step_advantage"] for step in state["steps"]] == pytest.approx(expected, abs=1e-9)
    ends = [edge for edge in view["edges"] if edge["target"] is None]
    assert sum(edge["count"] for edge in ends) == GROUP_SIZE
    assert sum(edge["count"] for edge in ends if edge["outcome"] == "won") == view["summary"]["won"]


def test_a_damaged_archive_is_left_out_and_said(api, runs):
    first, *_, last = files(runs / "finished")
    last.write_bytes(b"not an archive")
    first.write_bytes(first.read_bytes()[:-40])
    assert get(api, "/runs/finished/groups")["total"] == 2 * UPDATES - 2
    problem = get(api, "/runs/finished/groups/1", status=410)
    assert problem["status"] == 410
    assert "damaged" in problem["detail"]


def test_checkpoints_and_configuration(api, runs):
    (checkpoint,) = get(api, "/runs/finished/checkpoints")["checkpoints"]
    assert (checkpoint["version"], checkpoint["training_seconds"]) == (UPDATES, 61.5)
    secret = make_config(
        runs,
        "finished",
        buffer={"redis_url": "redis://:hidden-word@example:6379/0"},
        env={"urls": ["http://me:hidden-word@a:1", "http://b:2"]},
    )
    (runs / "finished" / "config.yaml").write_text(dump_config(secret))
    config = get(api, "/runs/finished/config")["config"]
    assert config["buffer"]["redis_url"] == "redis://example:6379/0"
    assert config["env"]["urls"] == ["http://a:1", "http://b:2"]
    assert "hidden-word" not in json.dumps(config)


def test_a_configuration_of_another_version_is_still_shown(api, runs):
    (runs / "finished" / "config.yaml").write_text("algorithm: gigpo\nunheard: {of: 1}\n")
    run = get(api, "/runs/finished")
    assert "cannot read the run's configuration" in run["note"]
    assert get(api, "/runs/finished/groups/2")["formula"] is None


def test_a_run_without_a_readable_description_is_still_shown(api, runs):
    for text in (None, "{", '{"title": 3}'):
        file = runs / "finished" / "algorithm.json"
        file.unlink(missing_ok=True)
        if text is not None:
            file.write_text(text)
        assert get(api, "/runs/finished/groups/2")["algorithm"] is None


@pytest.mark.parametrize("name", ["..", "../outside", "..%2foutside", "no such", "nothing"])
def test_nothing_outside_of_the_runs_is_found(api, runs, name):
    make_finished(runs.parent, "outside")
    assert api.get(f"/api/v1/runs/{name}").status_code in (404, 422)


def test_every_error_is_a_problem_document(api):
    for path in ("/api/v1/runs/nope", "/api/v1/nope", "/nope", "/api/v1/runs/finished/metrics?limit=0"):
        response = api.get(path)
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["status"] == response.status_code


@pytest.mark.parametrize("name", NAMES)
def test_foreign_keys_of_a_run_are_no_error_of_the_server(api, live, run_name, name):
    """Every route that looks at Redis answers, and the run says which key is wrong where its data cannot be read."""
    routes = ("", "/actors", "/buffer", "/leases", "/commands", "/environments", "/metrics")
    key = Keys(run_name)[name]
    for value in (b"\xff", b"-1"):
        live._client.delete(key)
        live._client.rpush(key, value) if KINDS[name] == "string" else live._client.set(key, value)
        statuses = {route: api.get(f"/api/v1/runs/{run_name}{route}").status_code for route in routes}
        assert set(statuses.values()) <= {200, 409}, statuses
    assert api.get("/metrics").status_code == 200


def test_a_run_whose_data_cannot_be_read_says_why(api, live, run_name):
    live._client.delete(Keys(run_name)["leases"])
    live._client.set(Keys(run_name)["leases"], "foreign")
    found = get(api, f"/runs/{run_name}")
    assert found["live"] is False
    assert f"Redis key anchorage:{{{run_name}}}:leases is a string" in found["note"]
    assert "leases is a string" in get(api, f"/runs/{run_name}/leases", 409)["detail"]


def test_an_agents_turns_are_told_from_its_calls(api, runs):
    make_agents(runs)
    group, episode = get(api, "/runs/agents/groups/0"), get(api, "/runs/agents/trajectories/0/0")
    told = episode["summary"]
    assert told["steps"] == told["turns"] + 2 == len(episode["steps"])
    assert [step["turn"] for step in episode["steps"][:4]] == [None, 0, 0, 1]
    assert [step["extends"] for step in episode["steps"][:3]] == [None, 0, None]
    assert [len(step["tool_calls"]) for step in episode["steps"][:3]] == [0, 2, 0]
    assert episode["steps"][1]["tool_calls"][0] == {"name": "find", "arguments": '{"what": "pen"}'}
    assert group["summary"]["turns"] == sum(len(state["steps"]) for state in group["states"])
    first = next(step for step in group["states"][0]["steps"] if step["member"] == 0)
    assert (first["number"], first["calls"]) == (0, [1, 2])
    assert "think" not in {edge["action"] for edge in group["edges"]}
