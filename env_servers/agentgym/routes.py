"""AgentGym's routes under `/agentgym`, in the dialect of its client for the environment.

Its WebShop client calls an environment `env_idx`, its ALFWorld client `id`; other environments get ALFWorld's dialect.
Errors are problem documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from fastapi import FastAPI, Query
from pydantic import BaseModel, ConfigDict, Field

from env_servers.agentgym.shim import Shim
from env_servers.protocol import MAX_ACTION_CHARS, Index, StepResult

PREFIX = "/agentgym"
ROUTES = tuple(f"{PREFIX}/{name}" for name in ("create", "reset", "step", "observation", "available_actions", "close"))

QueryNumber = Annotated[int, Field(ge=0)]
Action = Annotated[str, Field(max_length=MAX_ACTION_CHARS)]


class Lenient(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Created(BaseModel):
    id: int


class Named(Lenient):
    id: Index


class NamedQuery(Lenient):
    id: QueryNumber


class Reset(Named):
    game: Index
    world_type: Literal["Text", "Embody", "Hybrid"] = "Text"


class Step(Named):
    action: Action


class ResetAnswer(BaseModel):
    id: int
    observation: str
    available_actions: list[str]
    task_type: str


class StepAnswer(BaseModel):
    observation: str
    reward: float
    available_actions: list[str]
    done: bool


class Closed(BaseModel):
    closed: bool = True


@runtime_checkable
class Shop(Protocol):
    """An environment that gives what AgentGym's shop says of its page. Admissible actions lack the page's order."""

    @property
    def has_search_bar(self) -> bool: ...
    @property
    def clickables(self) -> Sequence[str]: ...


class ShopNamed(Lenient):
    env_idx: Index


class ShopQuery(Lenient):
    env_idx: QueryNumber


class ShopReset(ShopNamed):
    session_id: Index | None = None


class ShopStep(ShopNamed):
    action: Action


class ShopStepAnswer(BaseModel):
    state: str
    reward: float
    done: bool
    info: None = None


class ShopActions(BaseModel):
    has_search_bar: bool
    clickables: list[str]


def add_agentgym_routes(app: FastAPI, environment: str, shim: Shim, documented: dict[str, Any]) -> None:
    """Add the routes in the dialect of `environment`. `documented`: route options for the OpenAPI document."""
    if environment.startswith("webshop"):
        _add_webshop_dialect(app, shim, documented)
    else:
        _add_alfworld_dialect(app, shim, documented)


def _add_alfworld_dialect(app: FastAPI, shim: Shim, documented: dict[str, Any]) -> None:
    @app.post(f"{PREFIX}/create", **documented)
    async def create() -> Created:
        """AgentGym: create an environment."""
        return Created(id=shim.create())

    @app.post(f"{PREFIX}/reset", **documented)
    async def reset(body: Reset) -> ResetAnswer:
        """AgentGym: start the task with index `game`, counted through all splits."""
        result = await shim.reset(body.id, body.game)
        return ResetAnswer(
            id=body.id,
            observation=_without_banner(result.observation),
            available_actions=result.admissible or [],
            task_type=str(result.facts.get("task_type", "")),
        )

    @app.post(f"{PREFIX}/step", **documented)
    async def step(body: Step) -> StepAnswer:
        """AgentGym: take an action."""
        result = await shim.step(body.id, body.action)
        return StepAnswer(
            observation=result.observation,
            reward=result.reward,
            available_actions=result.admissible or [],
            done=result.done,
        )

    @app.get(f"{PREFIX}/observation", **documented)
    async def observation(query: Annotated[NamedQuery, Query()]) -> str:
        """AgentGym: the last observation."""
        return _without_banner(shim.last(query.id).observation)

    @app.get(f"{PREFIX}/available_actions", **documented)
    async def available_actions(query: Annotated[NamedQuery, Query()]) -> list[str]:
        """AgentGym: the actions accepted now."""
        return shim.last(query.id).admissible or []

    @app.post(f"{PREFIX}/close", **documented)
    async def close(body: Named) -> Closed:
        """AgentGym: close an environment."""
        shim.close(body.id)
        return Closed()


def _add_webshop_dialect(app: FastAPI, shim: Shim, documented: dict[str, Any]) -> None:
    @app.post(f"{PREFIX}/create", **documented)
    async def create() -> int:
        """AgentGym: create an environment."""
        return shim.create()

    @app.post(f"{PREFIX}/reset", **documented)
    async def reset(body: ShopReset) -> tuple[str, None]:
        """AgentGym: start the task with index `session_id`, counted through all splits; none: a random one."""
        return (await shim.reset(body.env_idx, body.session_id)).observation, None

    @app.post(f"{PREFIX}/step", **documented)
    async def step(body: ShopStep) -> ShopStepAnswer:
        """AgentGym: take an action."""
        result = await shim.step(body.env_idx, body.action)
        return ShopStepAnswer(state=result.observation, reward=result.reward, done=result.done)

    @app.get(f"{PREFIX}/observation", **documented)
    async def observation(query: Annotated[ShopQuery, Query()]) -> str:
        """AgentGym: the last observation."""
        return shim.last(query.env_idx).observation

    @app.get(f"{PREFIX}/available_actions", **documented)
    async def available_actions(query: Annotated[ShopQuery, Query()]) -> ShopActions:
        """AgentGym: whether the page has a search bar, and what can be clicked, in the page's order."""
        shop = shim.environment(query.env_idx)
        if isinstance(shop, Shop):
            return ShopActions(has_search_bar=shop.has_search_bar, clickables=list(shop.clickables))
        return _shop_actions(shim.last(query.env_idx))

    @app.post(f"{PREFIX}/close", **documented)
    async def close(body: ShopNamed) -> Closed:
        """AgentGym: close an environment."""
        shim.close(body.env_idx)
        return Closed()


def _shop_actions(result: StepResult) -> ShopActions:
    actions = result.admissible or []
    clicks = [action.removeprefix("click[").removesuffix("]") for action in actions if action.startswith("click[")]
    return ShopActions(has_search_bar=any(action.startswith("search[") for action in actions), clickables=clicks)


def _without_banner(text: str) -> str:
    """Remove the engine's banner, which AgentGym's ALFWorld does not show."""
    return text.partition("\n\n")[2] if text.startswith("-= ") else text
