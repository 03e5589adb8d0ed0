"""Content of the generated rooms: receptacle types and object types, each with its range of counts.

Allowed placements, and which objects can be heated, cooled, cleaned or sliced, are ALFWorld's own (`domain.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Range = tuple[int, int]
"""(least, most), both inclusive."""


@dataclass(frozen=True, slots=True)
class RoomKind:
    """One kind of room.

    Attributes:
        receptacles: type → number per scene.
        objects: type → number per game.
        scenery: types of objects that no command acts on.
        tasks: task types that the room allows.
    """

    receptacles: Mapping[str, Range]
    objects: Mapping[str, Range]
    scenery: tuple[str, ...]
    tasks: tuple[str, ...]


OPENABLE = frozenset({"Fridge", "Cabinet", "Microwave", "Drawer", "Safe"})
SCENE_SIZES = (0.1, 0.2, 0.3, 0.5, 1.0)
"""Fractions of the range of receptacle counts; 1 gives rooms as large as the official ones."""
LAMPS = ("DeskLamp", "FloorLamp")
LAMP_PLACES = ("SideTable", "Desk", "Dresser", "Shelf", "CoffeeTable")

_PLACING = ("pick_and_place_simple", "pick_two_obj_and_place")

ROOMS: Mapping[str, RoomKind] = {
    "kitchen": RoomKind(
        receptacles={
            "Cabinet": (2, 22),
            "CoffeeMachine": (1, 1),
            "CounterTop": (1, 4),
            "DiningTable": (0, 2),
            "Drawer": (1, 11),
            "Fridge": (1, 1),
            "GarbageCan": (1, 1),
            "Microwave": (1, 1),
            "Shelf": (0, 3),
            "SideTable": (0, 1),
            "SinkBasin": (1, 1),
            "StoveBurner": (1, 5),
            "Toaster": (1, 1),
        },
        objects={
            "Apple": (1, 3),
            "Bowl": (1, 3),
            "Bread": (1, 2),
            "ButterKnife": (1, 2),
            "Cup": (1, 3),
            "DishSponge": (1, 3),
            "Egg": (1, 3),
            "Fork": (1, 3),
            "Glassbottle": (0, 2),
            "Kettle": (0, 2),
            "Knife": (1, 2),
            "Ladle": (0, 2),
            "Lettuce": (1, 2),
            "Mug": (1, 3),
            "Pan": (1, 2),
            "PepperShaker": (1, 3),
            "Plate": (1, 3),
            "Pot": (1, 2),
            "Potato": (1, 3),
            "SaltShaker": (1, 3),
            "SoapBottle": (1, 3),
            "Spatula": (1, 3),
            "Spoon": (1, 3),
            "Statue": (0, 1),
            "Tomato": (1, 3),
            "Vase": (0, 2),
            "WineBottle": (0, 2),
        },
        scenery=("Chair", "Window", "LightSwitch", "StoveKnob"),
        tasks=(
            *_PLACING,
            "pick_clean_then_place_in_recep",
            "pick_heat_then_place_in_recep",
            "pick_cool_then_place_in_recep",
        ),
    ),
    "living room": RoomKind(
        receptacles={
            "ArmChair": (0, 2),
            "Cabinet": (0, 3),
            "CoffeeTable": (0, 2),
            "DiningTable": (0, 1),
            "Drawer": (1, 9),
            "Dresser": (0, 1),
            "GarbageCan": (1, 1),
            "Ottoman": (0, 1),
            "Shelf": (0, 6),
            "SideTable": (1, 3),
            "Sofa": (1, 2),
            "TVStand": (0, 1),
        },
        objects={
            "Book": (0, 2),
            "Box": (1, 2),
            "Candle": (0, 1),
            "CellPhone": (0, 2),
            "CreditCard": (1, 3),
            "KeyChain": (1, 3),
            "Laptop": (1, 2),
            "Newspaper": (1, 2),
            "Pen": (0, 2),
            "Pencil": (0, 2),
            "Pillow": (1, 2),
            "Plate": (0, 2),
            "RemoteControl": (1, 3),
            "Statue": (1, 3),
            "TissueBox": (0, 2),
            "Vase": (1, 3),
            "Watch": (1, 3),
            "WateringCan": (0, 1),
        },
        scenery=("Chair", "Window", "LightSwitch", "HousePlant", "Painting", "Television"),
        tasks=(*_PLACING, "look_at_obj_in_light"),
    ),
    "bedroom": RoomKind(
        receptacles={
            "ArmChair": (0, 1),
            "Bed": (1, 1),
            "Cabinet": (0, 3),
            "Desk": (1, 2),
            "Drawer": (1, 11),
            "Dresser": (0, 1),
            "GarbageCan": (1, 1),
            "LaundryHamper": (0, 1),
            "Safe": (0, 1),
            "Shelf": (0, 8),
            "SideTable": (0, 2),
        },
        objects={
            "AlarmClock": (1, 3),
            "BaseballBat": (0, 1),
            "BasketBall": (0, 1),
            "Book": (1, 3),
            "Bowl": (0, 2),
            "Box": (0, 1),
            "CD": (1, 3),
            "CellPhone": (1, 3),
            "Cloth": (0, 1),
            "CreditCard": (1, 3),
            "KeyChain": (1, 3),
            "Laptop": (1, 2),
            "Mug": (0, 2),
            "Pen": (1, 3),
            "Pencil": (1, 3),
            "Pillow": (1, 2),
            "RemoteControl": (0, 1),
            "Statue": (0, 1),
            "TeddyBear": (0, 1),
            "TennisRacket": (0, 1),
            "TissueBox": (0, 1),
            "Vase": (0, 1),
            "Watch": (0, 1),
        },
        scenery=("Blinds", "Chair", "LightSwitch", "Mirror", "Painting", "Window"),
        tasks=(*_PLACING, "look_at_obj_in_light"),
    ),
    "bathroom": RoomKind(
        receptacles={
            "BathtubBasin": (0, 1),
            "Cabinet": (1, 5),
            "Cart": (0, 1),
            "CounterTop": (1, 2),
            "Drawer": (0, 5),
            "GarbageCan": (1, 1),
            "HandTowelHolder": (1, 2),
            "Shelf": (0, 3),
            "SinkBasin": (1, 2),
            "Toilet": (1, 1),
            "ToiletPaperHanger": (1, 1),
            "TowelHolder": (1, 1),
        },
        objects={
            "Candle": (1, 3),
            "Cloth": (1, 3),
            "DishSponge": (0, 2),
            "HandTowel": (1, 2),
            "ScrubBrush": (1, 1),
            "SoapBar": (1, 3),
            "SoapBottle": (1, 3),
            "SprayBottle": (1, 3),
            "TissueBox": (0, 2),
            "ToiletPaper": (1, 3),
            "Towel": (1, 1),
        },
        scenery=("LightSwitch", "Mirror", "ShowerDoor", "Window"),
        tasks=(*_PLACING, "pick_clean_then_place_in_recep"),
    ),
}
