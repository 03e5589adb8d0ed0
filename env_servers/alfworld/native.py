"""The native engine: plays an ALFWorld game by its grounded rules, exactly as TextWorld does.

Invariants
- Every feedback text, admissible set and `won` equals the output of TextWorld's PDDL engine for the same commands.
- The state is a few small containers on top of the shared, immutable `Game`; a step takes microseconds.

Surprising rules are TextWorld's own: `look` sees nothing unless a receptacle is at the location; only the held object
can be examined; heating, cooling, cleaning and lamps ignore whether the receptacle is open; a lamp stays "on" after its
first use.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from env_servers.alfworld.problem import Game, Thing

WELCOME = "-= Welcome to TextWorld, ALFRED! =-"
NOTHING_HAPPENS = "Nothing happens."

HELP = """Available commands:
  look:                             look around your current location
  inventory:                        check your current inventory
  go to (receptacle):               move to a receptacle
  open (receptacle):                open a receptacle
  close (receptacle):               close a receptacle
  take (object) from (receptacle):  take an object from a receptacle
  move (object) to (receptacle):  place an object in or on a receptacle
  examine (something):              examine a receptacle or an object
  use (object):                     use an object
  heat (object) with (receptacle):  heat an object using a receptacle
  clean (object) with (receptacle): clean an object using a receptacle
  cool (object) with (receptacle):  cool an object using a receptacle
  slice (object) with (object):     slice an object using a sharp object
"""

_KNIVES = frozenset({"knifetype", "butterknifetype"})


class NativeGame:
    """One play of a game. Receptacles, objects and locations are numbers that index the tuples of `game`.

    Attributes:
        game: the static part, shared by all plays.
        location: the agent's location.
        held: the object in the agent's hand, or None.
        opened: open receptacles.
        contents: per receptacle, the objects in or on it, ascending.
        lying: object → its location; a held object is missing.
        clean: cleaned objects.
        hot: heated objects.
        cool: cooled objects.
        sliced: sliced objects.
        toggled: lamps that were used.
        taken_from: (object, receptacle) pairs: taken from there and not put back since. `_look` depends on them.

    Example:
        play = NativeGame(parse_game(generate("valid_unseen", 2)))  # clean some cloth and put it in garbagecan.
        play.step("take cloth 2 from sinkbasin 1")    # "Nothing happens.": the agent is elsewhere
        play.step("go to sinkbasin 1")                # "You arrive at sinkbasin 1. On the sinkbasin 1, you see …"
        play.step("take cloth 2 from sinkbasin 1")    # "You pick up the cloth 2 from the sinkbasin 1."
        play.held, play.contents[6], play.taken_from  # 4, [5, 6], {(4, 6)}
    """

    __slots__ = (
        "_actions",
        "clean",
        "contents",
        "cool",
        "game",
        "held",
        "hot",
        "location",
        "lying",
        "opened",
        "sliced",
        "taken_from",
        "toggled",
    )

    def __init__(self, game: Game) -> None:
        self.game = game
        self.location = game.start
        self.held: int | None = None
        self.opened = set(game.opened)
        self.contents: list[list[int]] = [[] for _ in game.receptacles]
        for thing, receptacle in game.placed:
            self.contents[receptacle].append(thing)
        self.lying: dict[int, int] = dict(game.lying)
        self.clean = set(game.clean)
        self.hot = set(game.hot)
        self.cool = set(game.cool)
        self.sliced: set[int] = set()
        self.toggled: set[int] = set()
        self.taken_from: set[tuple[int, int]] = set()
        self._actions: dict[str, tuple[str, int, int]] = self._ground()

    @property
    def introduction(self) -> str:
        """The observation of a reset: welcome line, surroundings, goal."""
        game = self.game
        if game.receptacles_at[self.location]:
            surroundings = self._look()
        else:
            surroundings = _surrounded_by(receptacle.name for receptacle in game.receptacles)
        return f"{WELCOME}\n\n{surroundings}\n\nYour task is to: {game.goal_text}"

    @property
    def admissible(self) -> list[str]:
        """The admissible commands, sorted, without duplicates."""
        return sorted(self._actions)

    def step(self, command: str) -> str:
        """Execute one command and return the engine's feedback."""
        action = self._actions.get(command.strip())
        if action is None:
            return NOTHING_HAPPENS
        feedback = self._apply(*action)
        self._actions = self._ground()
        return feedback

    @property
    def won(self) -> bool:
        """Whether the current state satisfies the goal."""
        game, goal = self.game, self.game.goal
        if goal.kind == "light":
            return self._lit(goal.object_type, goal.target_type)
        wanted = 2 if goal.kind == "two" else 1
        done = {"clean": self.clean, "heat": self.hot, "cool": self.cool}.get(goal.kind)
        able = {"clean": "cleanable", "heat": "heatable", "cool": "coolable"}.get(goal.kind)
        for number, receptacle in enumerate(game.receptacles):
            if receptacle.type != goal.target_type:
                continue
            fit = 0
            for thing in self.contents[number]:
                if game.objects[thing].type == goal.object_type and (
                    done is None or (thing in done and getattr(game.objects[thing], str(able)))
                ):
                    fit += 1
            if fit >= wanted:
                return True
        return False

    @property
    def digest(self) -> str:
        """Digest of everything that later observations depend on: equal states have equal digests."""
        state = (
            self.location,
            self.held,
            sorted(self.opened),
            [sorted(things) for things in self.contents],
            sorted(self.lying.items()),
            *(sorted(s) for s in (self.clean, self.hot, self.cool, self.sliced, self.toggled)),
            sorted(self.taken_from),
        )
        return hashlib.blake2b(repr(state).encode(), digest_size=12).hexdigest()

    def _lit(self, object_type: str, lamp_type: str) -> bool:
        """Whether the agent holds the object at the location of a lamp that is on."""
        objects = self.game.objects
        if self.held is None or objects[self.held].type != object_type:
            return False
        return any(
            objects[thing].type == lamp_type and objects[thing].toggleable and thing in self.toggled
            for receptacle in self.game.receptacles_at[self.location]
            for thing in self.contents[receptacle]
        )

    def _ground(self) -> dict[str, tuple[str, int, int]]:
        """Return the admissible commands: command → (verb, first argument, second argument).

        Arguments are numbers of objects and receptacles; 0 stands for a missing argument.

        Example:
            # at sinkbasin 1 (receptacle 6) with cloth 2 (object 4) in the hand
            {"go to cabinet 2": ("go", 0, 0), …, "examine cloth 2": ("examine thing", 4, 0),
             "examine sinkbasin 1": ("examine", 6, 0), "move cloth 2 to sinkbasin 1": ("move", 4, 6),
             "clean cloth 2 with sinkbasin 1": ("clean", 4, 6)}
        """
        game, objects, held = self.game, self.game.objects, self.held
        actions: dict[str, tuple[str, int, int]] = {
            "help": ("help", 0, 0),
            "inventory": ("inventory", 0, 0),
            "look": ("look", 0, 0),
        }
        for command, target in game.ways[self.location]:
            actions[command] = ("go", target, 0)
        mine = None if held is None else objects[held]
        if mine is not None and held is not None:
            actions[f"examine {mine.name}"] = ("examine thing", held, 0)
            if mine.type in _KNIVES:
                # TextWorld's rule: every sliceable object at this location, even inside a closed receptacle.
                for thing, at in self.lying.items():
                    if at == self.location and objects[thing].sliceable:
                        actions[f"slice {objects[thing].name} with {mine.name}"] = ("slice", thing, held)
        for number in game.receptacles_at[self.location]:
            receptacle = game.receptacles[number]
            name = receptacle.name
            actions[f"examine {name}"] = ("examine", number, 0)
            is_open = number in self.opened
            if receptacle.openable:
                verb = "close" if is_open else "open"
                actions[f"{verb} {name}"] = (verb, number, 0)
            reachable = is_open or not receptacle.openable
            for thing in self.contents[number]:
                there = objects[thing]
                if reachable and mine is None and there.pickupable:
                    actions[f"take {there.name} from {name}"] = ("take", thing, number)
                if there.toggleable:
                    actions[f"use {there.name}"] = ("use", thing, number)
            if mine is None or held is None:
                continue
            if reachable and (receptacle.type, mine.type) in game.can_contain:
                actions[f"move {mine.name} to {name}"] = ("move", held, number)
            if mine.cleanable and receptacle.type in game.cleaner_types:
                actions[f"clean {mine.name} with {name}"] = ("clean", held, number)
            if mine.heatable and receptacle.type == "microwavetype":
                actions[f"heat {mine.name} with {name}"] = ("heat", held, number)
            if mine.coolable and receptacle.type == "fridgetype":
                actions[f"cool {mine.name} with {name}"] = ("cool", held, number)
        return actions

    def _apply(self, verb: str, first: int, second: int) -> str:
        """Change the state by an action of `_ground` and return its feedback."""
        game, objects, receptacles = self.game, self.game.objects, self.game.receptacles
        match verb:
            case "go":
                self.location = receptacles[first].location
                return f"You arrive at {receptacles[first].name}. {self._examine(first)}"
            case "open":
                self.opened.add(first)
                return f"You open the {receptacles[first].name}. {self._examine(first)}"
            case "close":
                self.opened.discard(first)
                return f"You close the {receptacles[first].name}."
            case "take":
                self.contents[second].remove(first)
                self.lying.pop(first, None)
                self.taken_from.add((first, second))
                self.held = first
                return f"You pick up the {objects[first].name} from the {receptacles[second].name}."
            case "move":
                self.contents[second] = sorted([*self.contents[second], first])
                self.lying[first] = receptacles[second].location
                self.taken_from.discard((first, second))
                self.held = None
                return f"You move the {objects[first].name} to the {receptacles[second].name}."
            case "clean":
                self.clean.add(first)
                return f"You clean the {objects[first].name} using the {receptacles[second].name}."
            case "heat":
                self.hot.add(first)
                self.cool.discard(first)
                return f"You heat the {objects[first].name} using the {receptacles[second].name}."
            case "cool":
                self.cool.add(first)
                self.hot.discard(first)
                return f"You cool the {objects[first].name} using the {receptacles[second].name}."
            case "use":
                self.toggled.add(first)
                return f"You turn on the {objects[first].name}."
            case "slice":
                self.sliced.add(first)
                return f"You sliced the {objects[first].name} with the {objects[second].name}."
            case "examine":
                return self._examine(first)
            case "examine thing":
                return self._examine_thing(first)
            case "inventory":
                return "You are not carrying anything." if self.held is None else f"You are carrying: {self._mine}."
            case "look":
                here = game.receptacles_at[self.location]
                return self._look() if here else _surrounded_by(())
            case _:
                return HELP

    @property
    def _mine(self) -> str:
        assert self.held is not None
        return f"a {self.game.objects[self.held].name}"

    def _examine(self, number: int) -> str:
        receptacle = self.game.receptacles[number]
        if receptacle.openable and number not in self.opened:
            return f"The {receptacle.name} is closed."
        things = _listing(f"a {self.game.objects[thing].name}" for thing in self.contents[number])
        if receptacle.openable:
            return f"The {receptacle.name} is open. In it, you see {things}."
        return f"On the {receptacle.name}, you see {things}."

    def _examine_thing(self, number: int) -> str:
        """Describe the held object. The odd cases follow the grammar: `cool` alone reads "cold"."""
        thing: Thing = self.game.objects[number]
        if thing.is_receptacle:
            inside = _listing(f"a {self.game.objects[inner].name}" for inner in thing.holds)
            return f"This is a normal {thing.name}. In it, you see {inside}."
        hot, clean, cool, sliced = (number in s for s in (self.hot, self.clean, self.cool, self.sliced))
        temperature = "hot" if hot else "cool" if cool else ""
        if sliced or (clean and temperature):
            words = " and ".join(word for word in (temperature, "clean" if clean else "") if word)
            kind = " ".join(word for word in (words, "sliced" if sliced else "") if word)
            if words or thing.sliceable:
                return f"This is a {kind} {thing.name}."
        if hot or clean or cool:
            return f"This is a {'hot' if hot else 'clean' if clean else 'cold'} {thing.name}."
        if thing.toggleable and number in self.toggled:
            return f"This {thing.name} is on."
        return f"There's nothing special about {thing.name}."

    def _look(self) -> str:
        """Describe the location. "Next to it" lists objects moved from one receptacle here to another one here."""
        game = self.game
        here = game.receptacles_at[self.location]
        facing = _listing(game.receptacles[number].name for number in here)
        near = [
            f"a {game.objects[thing].name}"
            for thing in sorted(thing for thing, at in self.lying.items() if at == self.location)
            for number in here
            if (thing, number) in self.taken_from
        ]
        return f"You are facing the {facing}. Next to it, you see {_listing(near)}."


def _surrounded_by(names: Iterable[str]) -> str:
    seen = _listing(f"a {name}" for name in names)
    return f"You are in the middle of a room. Looking quickly around you, you see {seen}."


def _listing(items: Iterable[str]) -> str:
    """Join names as the grammar does: `nothing`, `a`, `a, and b`, `a, b, and c`."""
    names: Sequence[str] = list(items)
    if not names:
        return "nothing"
    if len(names) == 1:
        return names[0]
    return ", ".join(names[:-1]) + ", and " + names[-1]
