"""Scripted experts for ALFWorld: one that plans over the true state, one that must search like an agent.

`Planner` knows where everything is and wins every solvable game. `Searcher` plans the same way but only over what the
session has seen; until the object has been seen it visits and opens places that could
hold it, open ones first.
Both choose from the present state alone, so they go on from wherever other actions left the game.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from env_servers.alfworld.native import NativeGame

_TOOL = {"clean": "", "heat": "microwavetype", "cool": "fridgetype"}


class Expert(ABC):
    """Chooses commands for one play. `observe` is called after every change of the state."""

    def __init__(self, play: NativeGame) -> None:
        self._play = play

    @abstractmethod
    def _known(self, receptacle: int) -> bool:
        """Whether the contents of the receptacle are known to the expert."""

    @abstractmethod
    def _explore(self) -> str | None:
        """The command to take while no object that the goal needs is known."""

    def observe(self) -> None:
        """Take note of what can be seen now."""
        return

    def next_command(self) -> str | None:
        """The command to take now; None when there is nothing left to do."""
        play, goal = self._play, self._play.game.goal
        objects = play.game.objects
        held = play.held
        if play.won:
            return None
        if held is not None:
            if objects[held].type != goal.object_type:
                return self._put_away(held)
            if goal.kind == "light":
                return self._use_lamp()
            if goal.kind in _TOOL and held not in self._treated:
                return self._treat(held)
            return self._deliver(held)
        found = self._find_object()
        if found is None:
            return self._explore()
        thing, receptacle = found
        return self._reach(receptacle) or f"take {objects[thing].name} from {self._name(receptacle)}"

    @property
    def _treated(self) -> set[int]:
        play = self._play
        return {"clean": play.clean, "heat": play.hot, "cool": play.cool}[play.game.goal.kind]

    def _name(self, receptacle: int) -> str:
        return self._play.game.receptacles[receptacle].name

    def _reach(self, receptacle: int) -> str | None:
        """Go there, open it; None when its inside is at hand."""
        play = self._play
        there = play.game.receptacles[receptacle]
        if there.location != play.location:
            return f"go to {there.name}"
        if there.openable and receptacle not in play.opened:
            return f"open {there.name}"
        return None

    def _find_object(self) -> tuple[int, int] | None:
        """A known object of the wanted type that is not where it belongs, with its receptacle."""
        play = self._play
        game, goal = play.game, play.game.goal
        treated = self._treated if goal.kind in _TOOL else None
        for number, receptacle in enumerate(game.receptacles):
            if not self._known(number):
                continue
            if receptacle.type == goal.target_type and goal.kind == "two" and number == self._chosen_target():
                continue
            for thing in play.contents[number]:
                there = game.objects[thing]
                if there.type == goal.object_type and there.pickupable:
                    done = receptacle.type == goal.target_type and (treated is None or thing in treated)
                    if goal.kind in ("two", "light") or not done:
                        return thing, number
        return None

    def _chosen_target(self) -> int:
        """The target receptacle to fill: the one that already holds most of what it should, the first if none does."""
        play, goal = self._play, self._play.game.goal
        targets = [n for n, r in enumerate(play.game.receptacles) if r.type == goal.target_type]
        return max(targets, key=lambda n: (self._fitting(n), -n)) if targets else -1

    def _fitting(self, receptacle: int) -> int:
        play, goal = self._play, self._play.game.goal
        if not self._known(receptacle):
            return 0
        return sum(play.game.objects[thing].type == goal.object_type for thing in play.contents[receptacle])

    def _deliver(self, held: int) -> str | None:
        target = self._chosen_target()
        if target < 0:
            return None
        return self._reach(target) or f"move {self._play.game.objects[held].name} to {self._name(target)}"

    def _treat(self, held: int) -> str | None:
        game, verb = self._play.game, self._play.game.goal.kind
        for receptacle in game.receptacles:
            fits = receptacle.type in game.cleaner_types if verb == "clean" else receptacle.type == _TOOL[verb]
            if fits:
                there = receptacle.location == self._play.location
                name = receptacle.name
                return f"{verb} {game.objects[held].name} with {name}" if there else f"go to {name}"
        return None

    def _use_lamp(self) -> str | None:
        play, goal = self._play, self._play.game.goal
        for number, receptacle in enumerate(play.game.receptacles):
            if not self._known(number):
                continue
            for thing in play.contents[number]:
                lamp = play.game.objects[thing]
                if lamp.type == goal.target_type and lamp.toggleable:
                    if receptacle.location != play.location:
                        return f"go to {receptacle.name}"
                    return f"use {lamp.name}"
        return self._explore()

    def _put_away(self, held: int) -> str | None:
        """Free the hand: put the held object into the nearest receptacle that takes it and is not the target."""
        play = self._play
        game, thing = play.game, play.game.objects[held]
        numbers = sorted(range(len(game.receptacles)), key=lambda n: game.receptacles[n].location != play.location)
        for number in numbers:
            receptacle = game.receptacles[number]
            if (receptacle.type, thing.type) in game.can_contain and receptacle.type != game.goal.target_type:
                return self._reach(number) or f"move {thing.name} to {receptacle.name}"
        return self._deliver(held)


class Planner(Expert):
    """Plans over the true state."""

    def _known(self, receptacle: int) -> bool:
        return True

    def _explore(self) -> str | None:
        return None


class Searcher(Expert):
    """Plans over what has been seen and searches for the rest, open places before those that must be opened."""

    def __init__(self, play: NativeGame) -> None:
        super().__init__(play)
        self._seen: set[int] = set()
        places = play.game.receptacles
        self._order = sorted(range(len(places)), key=lambda n: places[n].openable)
        self.observe()

    def observe(self) -> None:
        play = self._play
        for number in play.game.receptacles_at[play.location]:
            if not play.game.receptacles[number].openable or number in play.opened:
                self._seen.add(number)

    def _known(self, receptacle: int) -> bool:
        return receptacle in self._seen

    def _explore(self) -> str | None:
        game = self._play.game
        wanted = game.goal.object_type if self._play.held is None else game.goal.target_type
        unseen = [number for number in self._order if number not in self._seen]
        likely = [n for n in unseen if (game.receptacles[n].type, wanted) in game.can_contain]
        for number in (likely or unseen)[:1]:
            return self._reach(number)
        return None
