"""Scripted experts for ALFWorld: one plans over the true state, one must search like an agent.

`Planner` knows the location of every object and wins every solvable game. `Searcher` follows the same plan with only
what the session has seen: until it sees the object, it visits and opens receptacles that may hold it, open ones first.
Both choose from the current state alone, so they can take over after any other actions.

Example:
    "clean some cloth and put it in garbagecan." in a bathroom, with a cloth in the sink basin:

    Planner    go to sinkbasin 1, take cloth 2 from sinkbasin 1, clean cloth 2 with sinkbasin 1, go to garbagecan 1,
               move cloth 2 to garbagecan 1
    Searcher   go to countertop 1, go to garbagecan 1, then the same
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from env_servers.alfworld.native import NativeGame

_TOOL = {"clean": "", "heat": "microwavetype", "cool": "fridgetype"}
"""Goal kind → receptacle type that treats the object; what cleans depends on the game: `Game.cleaner_types`."""


class Expert(ABC):
    """Chooses commands for one play. The caller calls `observe` after every change of the state."""

    def __init__(self, play: NativeGame) -> None:
        self._play = play

    @abstractmethod
    def _known(self, receptacle: int) -> bool:
        """Whether the expert knows the contents of the receptacle."""

    @abstractmethod
    def _explore(self) -> str | None:
        """Return the next command while no known object serves the goal; None if nothing is left to explore."""

    def observe(self) -> None:
        """Record what is visible in the current state."""
        return

    def next_command(self) -> str | None:
        """Return the next command, or None if nothing is left to do."""
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
        """Return the command that goes there or opens it; None if its contents are within reach."""
        play = self._play
        there = play.game.receptacles[receptacle]
        if there.location != play.location:
            return f"go to {there.name}"
        if there.openable and receptacle not in play.opened:
            return f"open {there.name}"
        return None

    def _find_object(self) -> tuple[int, int] | None:
        """Return (object, receptacle) for a known object of the goal's type that still has to be taken, or None."""
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
        """Return the target receptacle with most objects of the goal's type, the first on a tie; -1 if none exists."""
        play, goal = self._play, self._play.game.goal
        targets = [n for n, r in enumerate(play.game.receptacles) if r.type == goal.target_type]
        return max(targets, key=lambda n: (self._fitting(n), -n)) if targets else -1

    def _fitting(self, receptacle: int) -> int:
        """Number of objects of the goal's type that the receptacle is known to hold."""
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
        """Free the hand: move the held object to a receptacle that accepts it and is no target, preferably here."""
        play = self._play
        game, thing = play.game, play.game.objects[held]
        numbers = sorted(range(len(game.receptacles)), key=lambda n: game.receptacles[n].location != play.location)
        for number in numbers:
            receptacle = game.receptacles[number]
            if (receptacle.type, thing.type) in game.can_contain and receptacle.type != game.goal.target_type:
                return self._reach(number) or f"move {thing.name} to {receptacle.name}"
        return self._deliver(held)


class Planner(Expert):
    """An expert that plans over the true state."""

    def _known(self, receptacle: int) -> bool:
        return True

    def _explore(self) -> str | None:
        return None


class Searcher(Expert):
    """An expert that plans over what it has seen and searches for the rest, open receptacles before closed ones."""

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
