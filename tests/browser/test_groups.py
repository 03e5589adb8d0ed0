"""Trajectories and Anchor explorer in a real headless Chromium: finding, choosing, and the graph of anchor states."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from services.buffer import Buffer
from tests import needs
from tests.control_runs import HOSTILE, TASK_TYPES, make_agents, make_finished
from tests.control_server import ADMIN

expect = pytest.importorskip("playwright.sync_api", reason=needs.PLAYWRIGHT).expect

Open = Callable[..., Any]

MANY = 16
"""Updates of a run whose episodes are more than a list shows at first."""

DRAW = (Path(__file__).parent / "crowded_graph.js").read_text()
CROSSED = (Path(__file__).parent / "crossed_states.js").read_text()


@pytest.fixture(scope="module")
def many(folder: Path, buffer: Buffer) -> str:
    make_finished(folder, "many", updates=MANY)
    return "many"


def ask(url: str, path: str) -> Any:
    request = urllib.request.Request(f"{url}/api/v1{path}", headers={"Authorization": f"Bearer {ADMIN}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def test_episodes_are_found_by_filters(open_page: Open) -> None:
    page = open_page("finished/trajectories")
    count = page.locator(".list-side [role=status]")
    expect(count).to_contain_text("48 episodes")
    page.get_by_label("Task type").select_option(TASK_TYPES[0])
    expect(count).to_contain_text("24 episodes")
    expect(page.locator(".pick .row span").first).to_have_text(TASK_TYPES[0].replace("_", " "))
    page.get_by_label("Outcome").select_option("won")
    expect(count).to_contain_text("12 episodes")
    page.get_by_label("Policy version").fill("3")
    page.keyboard.press("Enter")
    expect(count).to_contain_text("2 episodes")
    page.locator(".pick").nth(1).click()
    expect(page.locator("article .badge.good").first).to_have_text("won")
    expect(page.locator("article .step").first).to_contain_text("You are at start.")


def test_groups_are_found_by_task_type(open_page: Open, url: str) -> None:
    page = open_page("finished/explorer")
    groups = page.get_by_role("combobox", name="Group", exact=True).locator("option")
    expect(groups).to_have_count(12)
    page.get_by_label("Task type").select_option(TASK_TYPES[1])
    expect(groups).to_have_count(6)
    expect(groups.first).to_contain_text(TASK_TYPES[1].replace("_", " "))
    page.get_by_role("combobox", name="Success", exact=True).select_option("none")
    expect(page.get_by_text("No kept group matches the filters.")).to_be_visible()


def test_choosing_an_episode_leaves_the_list_as_it_is(open_page: Open, many: str) -> None:
    page = open_page(f"{many}/trajectories")
    expect(page.locator(".pick")).to_have_count(60)
    page.get_by_role("button", name="Show more").click()
    expect(page.locator(".pick")).to_have_count(120)
    link = page.locator(".pick").nth(100)
    link.scroll_into_view_if_needed()
    scrolled = page.locator(".list-pane").evaluate("(one) => one.scrollTop")
    link.click()
    expect(link).to_have_attribute("aria-current", "true")
    expect(page.locator(".pick[aria-current]")).to_have_count(1)
    group, episode = link.get_attribute("href").split("/")[-2:]
    expect(page.locator("article")).to_contain_text(f"See group {group}")
    assert page.url.endswith(f"/trajectories/{group}/{episode}")
    expect(link).to_be_focused()
    expect(page.locator(".pick")).to_have_count(120)
    assert scrolled > 0
    assert page.locator(".list-pane").evaluate("(one) => one.scrollTop") == scrolled
    page.go_back()
    expect(page.locator(".pick[aria-current]")).to_have_count(0)
    expect(page.locator(".pick")).to_have_count(120)


def test_on_a_phone_the_episode_takes_the_lists_place_and_gives_it_back(open_page: Open, many: str) -> None:
    page = open_page(f"{many}/trajectories", width=390)
    link = page.locator(".pick").nth(30)
    link.click()
    expect(link).to_be_hidden()
    expect(page.locator("article")).to_be_focused()
    page.get_by_role("link", name="All episodes").click()
    expect(link).to_be_focused()


def test_filters_are_of_the_run_that_they_were_made_in(open_page: Open, many: str) -> None:
    page = open_page(f"{many}/trajectories")
    page.get_by_label("Outcome").select_option("won")
    expect(page.locator(".list-side [role=status]")).to_contain_text("64 episodes")
    page.get_by_role("link", name="Anchor explorer").click()
    page.get_by_role("combobox", name="Success", exact=True).select_option("none")
    page.get_by_role("link", name="Trajectories").click()
    expect(page.get_by_label("Outcome")).to_have_value("true")  # the same run: kept
    page.get_by_role("combobox", name="Run").select_option("finished")
    expect(page.locator(".list-side [role=status]")).to_contain_text("48 episodes")
    expect(page.get_by_label("Outcome")).to_have_value("")
    page.get_by_role("link", name="Anchor explorer").click()
    expect(page.get_by_role("combobox", name="Success", exact=True)).to_have_value("some")


def test_the_explorer_is_walked_by_keys(open_page: Open) -> None:
    page = open_page("finished/explorer/2")
    first = page.locator(".graph .node[data-state='0']")
    first.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#state-title")).to_contain_text("State 0: 4 steps of 4 episodes")
    expect(page.locator(".graph .node[data-state='0']")).to_be_focused()
    expect(page.locator(".worked")).to_contain_text("For example in state 0")
    expect(page.locator(".said")).to_have_text("You are at start.")
    page.get_by_role("button", name="○ 2").click()
    assert page.locator(".graph .node.faded").count() > 0
    page.get_by_role("combobox", name="Group", exact=True).focus()
    page.get_by_role("combobox", name="Group", exact=True).select_option("5")
    expect(page.get_by_text("Group 5:")).to_be_visible()
    expect(page.get_by_role("combobox", name="Group", exact=True)).to_be_focused()
    page.get_by_role("link", name="read").nth(1).click()
    expect(page.get_by_role("heading", level=1, name="Trajectories")).to_be_visible()


def test_edges_are_thick_by_count_and_coloured_by_advantage(open_page: Open, url: str) -> None:
    page = open_page("finished/explorer/2")
    expect(page.locator(".graph .edge").first).to_be_attached()
    edges = ask(url, "/runs/finished/groups/2")["edges"]
    drawn = page.locator(".graph .edge").evaluate_all(
        "(all) => all.map((one) => [Number(one.getAttribute('stroke-width')), getComputedStyle(one).stroke])"
    )
    assert [width for width, _ in drawn] == pytest.approx([1 + 1.5 * edge["count"] ** 0.5 for edge in edges])
    assert len({edge["count"] for edge in edges}) > 1
    most = max(abs(edge["step_advantage"]) for edge in edges)
    seen: dict[str, set[str]] = {"best": set(), "worst": set(), "level": set()}
    for edge, (_, stroke) in zip(edges, drawn, strict=True):
        kind = {most: "best", -most: "worst", 0.0: "level"}.get(edge["step_advantage"])
        if kind is not None:
            seen[kind].add(stroke)
    tints = page.evaluate(
        """async () => {
            const { colour } = await import('/static/js/graph.js');
            const probe = document.body.appendChild(document.createElement('span'));
            return [1, -1, 0].map((value) => {
                probe.style.color = colour(value, 1);
                return getComputedStyle(probe).color;
            });
        }"""
    )
    assert len(set(tints)) == 3
    assert seen["level"] <= {tints[2]}
    assert seen["best"] | seen["worst"]
    assert seen["best"] <= {tints[0]}
    assert seen["worst"] <= {tints[1]}


@pytest.mark.parametrize("group", [0, 2, 7])
def test_no_edge_passes_through_a_state_of_a_real_group(open_page: Open, group: int) -> None:
    page = open_page(f"finished/explorer/{group}")
    expect(page.locator(".graph .edge").first).to_be_attached()
    assert page.evaluate(CROSSED) == []


def test_no_edge_passes_through_a_state_of_a_crowded_graph(open_page: Open) -> None:
    page = open_page("")
    expect(page.get_by_role("heading", name="Runs")).to_be_visible()
    page.evaluate(DRAW)
    assert page.locator(".graph .edge").count() == 60
    assert page.evaluate(CROSSED) == []
    strokes = page.locator(".graph .edge").evaluate_all("(all) => all.map((one) => getComputedStyle(one).stroke)")
    assert len(set(strokes)) == 3  # better, worse, and neither
    # Steps at which nothing new was reached have no column, and the axis says so.
    columns = page.locator(".graph .column:not(.skipped)")
    assert columns.all_text_contents() == [f"step {step}" for step in (1, 2, 3, 7, 8, 10)]
    assert page.locator(".graph .skipped").all_text_contents() == ["4–6: none", "9: none"]


@pytest.mark.parametrize(
    ("algorithm", "said", "unsaid"),
    [
        ("gigpo", "A = AE + ω AS", "does not compare"),
        ("hgpo", "after the same k states", "A = AE"),
        ("graphgpo", "A = wE AE + ω AS", "does not compare"),
        ("g2po", "AS = Lt + Dt", "does not compare"),
        ("grpo", "GRPO, which does not compare the actions within a state", "ω"),
        ("rloo", "AE = score − mean of the others", "ω"),
        ("reinforce_pp", "over all groups of the update", "ω"),
    ],
)
def test_the_formula_is_that_of_the_algorithm(
    open_page: Open, folder: Path, buffer: Buffer, algorithm: str, said: str, unsaid: str
) -> None:
    name = f"by-{algorithm.replace('_', '-')}"
    make_finished(folder, name, updates=2, algorithm=algorithm)
    page = open_page(f"{name}/explorer/2")
    levels = page.locator(".levels")
    expect(levels).to_contain_text(said)
    expect(levels).not_to_contain_text(unsaid)
    assert page.locator(".worked").count() == (algorithm == "gigpo")
    strokes = page.locator(".graph .edge").evaluate_all("(all) => all.map((one) => getComputedStyle(one).stroke)")
    assert len(set(strokes)) > 1  # coloured by what the algorithm compares


def test_an_agents_episode_is_a_tree_of_turns_calls_and_tool_calls(
    open_page: Open, folder: Path, buffer: Buffer, url: str
) -> None:
    make_agents(folder)
    page = open_page("agents/trajectories/0/0")
    expect(page.locator("article dl")).to_contain_text("crash (exit code 3)")
    expect(page.locator("article dl")).to_contain_text("2 refused, 1 not received")
    turns = page.get_by_role("list", name="Turns").locator(".step")
    told = ask(url, "/runs/agents/trajectories/0/0")
    expect(turns).to_have_count(told["summary"]["turns"])
    expect(turns.first.get_by_role("group", name="Advantages of turn 1")).to_have_count(1)
    calls = turns.first.get_by_role("list", name="Calls of turn 1").locator("> li")
    expect(calls).to_have_count(3)
    expect(calls.nth(0)).to_contain_text("not trained on")
    expect(calls.nth(1)).to_contain_text("continues call 1")
    expect(calls.nth(1).locator(".thought")).to_contain_text("the pen may be there")
    tools = calls.nth(1).get_by_role("list", name="Tool calls of call 2").locator("li")
    expect(tools).to_have_text(['find {"what": "pen"}', f"{HOSTILE} {HOSTILE}"])
    expect(turns.first.locator(".action")).to_have_text(f"Action: {told['steps'][2]['action']}")
    assert page.title() != "pwned"
    expect(turns.nth(1).get_by_role("list", name="Calls of turn 2").locator("> li")).to_have_count(1)
    page = open_page("agents/explorer/0/0")
    taken = page.get_by_role("region", name="Steps taken in state 0")
    expect(taken.locator("thead")).to_contain_text("Calls")
    expect(taken.locator("tbody tr").first).to_contain_text("2, 3")


def test_all_algorithms_are_compared_side_by_side(open_page: Open) -> None:
    page = open_page("finished/explorer/3")
    section = page.get_by_role("region", name="Comparison of algorithms")
    section.get_by_role("button", name="Compare all algorithms").click()
    table = section.get_by_role("region", name="Advantages by algorithm")
    expect(table).to_be_visible()
    heads = [head.strip() for head in table.locator("thead th").all_text_contents()]
    assert heads[:5] == ["Episode", "Step", "State", "Action", "trained"]
    assert heads[5:] == ["gigpo", "grpo", "rloo", "reinforce_pp", "dr_grpo", "dapo", "gspo", "hgpo", "graphgpo", "g2po"]
    # The run's own column is what was trained; another's differences have a colour.
    for row in table.locator("tbody tr").all():
        cells = row.locator("td").all_text_contents()
        assert cells[4] == cells[5]
    backgrounds = table.locator(".compared").evaluate_all("(all) => all.map((one) => one.style.background)")
    assert len({one for one in backgrounds if one}) > 1
    agreement = section.get_by_role("region", name="Correlation of the algorithms")
    expect(agreement.locator("tbody tr").first).to_contain_text("gigpo")
    assert agreement.locator("tbody tr").first.locator("td").nth(1).text_content() == "1.00"


FOREIGN = """
from learner.advantages import ESTIMATORS, describe

@describe("Halved <b>", paper="nobody 2026", step={"A_S = α (R_t − best)": "over the state"}, terms={"α": "half"})
def halved(rows, config):
    return ESTIMATORS["gigpo"](rows, config)

def plain(rows, config):
    '''As GRPO, of my own.'''
    return ESTIMATORS["grpo"](rows, config)
"""


def test_an_estimator_of_ones_own_is_explained_by_itself_alone(
    open_page: Open, folder: Path, buffer: Buffer, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(FOREIGN)
    advantage = {"penalty": "unscaled", "invalid_action_penalty": 0.5}
    for name in ("halved", "plain"):
        make_finished(folder, f"of-{name}", updates=2, algorithm=f"{tmp_path}/mine.py:{name}", advantage=advantage)
    levels = open_page("of-halved/explorer/2").locator(".levels")
    expect(levels).to_contain_text("Halved <b>, nobody 2026")
    expect(levels).to_contain_text("AS = α (Rt − best)")
    expect(levels).to_contain_text("α: half")
    expect(levels).to_contain_text("0.5 less advantage of the invalid step, after normalisation")
    for unsaid in ("ω", "γ", "standard deviation", "does not compare"):
        expect(levels).not_to_contain_text(unsaid)
    assert levels.locator(".worked").count() == 0
    levels = open_page("of-plain/explorer/2").locator(".levels")
    expect(levels).to_contain_text("plain: As GRPO, of my own.")
    expect(levels).to_contain_text("trained with plain, which does not compare the actions within a state")
    assert levels.locator(".worked").count() == 0
