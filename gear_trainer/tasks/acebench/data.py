"""ACEBench's files: `data_<category>.json` and `possible_answer/data_<category>.json`, JSON lines both."""

from __future__ import annotations

import logging
import random
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gear_trainer.tasks.base import TaskError
from gear_trainer.tasks.files import json_lines

ATOM = tuple(f"normal_atom_{kind}" for kind in ("bool", "enum", "number", "list", "object_deep", "object_short"))
SINGLE_TURN = ("normal_single_turn_single_function", "normal_single_turn_parallel_function")
DIALOGUES = ("normal_multi_turn_user_adjust", "normal_multi_turn_user_switch")
NORMAL = (*SINGLE_TURN, *DIALOGUES, "normal_similar_api", "normal_preference", *ATOM)
SPECIAL = ("special_incomplete", "special_error_param", "special_irrelevant")
AGENT = ("agent_multi_step", "agent_multi_turn")
GROUPS = {"atom": ATOM, "single_turn": SINGLE_TURN, "multi_turn": DIALOGUES, "normal": NORMAL, "special": SPECIAL, "agent": AGENT}

# Answers that upstream corrected on 2025-10-29: rows that still have the old one are left out.
_OUTDATED: dict[str, Any] = {
    "normal_atom_enum_9": {"RealEstateTrendAnalyzer_identifyHotspots": {"city": "Shanghai", "trendType": "Emerging"}},
    "normal_atom_number_17": {"ThermostatServiceInquiry": {"location": "Seattle"}},
    "normal_atom_list_34": {
        "HealthStatistics_getFluIncidence": {"incidenceDates": ["2021-05-03", "2021-05-09"], "cityDistrict": "Beijing"}
    },
}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One row with its answer. dialogue: the rows of a multi-turn dialogue have one in common; others have their id."""

    id: str
    category: str
    dialogue: str
    row: dict[str, Any]
    truth: Any
    milestones: list[Any]


def categories_of(names: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The categories behind groups and categories, parted by commas. Raises TaskError for others than the known ones."""
    found: dict[str, None] = {}
    for name in (part.strip() for part in names.split(",")):
        for category in GROUPS.get(name, (name,)):
            if category not in known:
                groups = [group for group, members in GROUPS.items() if set(members) <= set(known)]
                raise TaskError(f"categories: unknown {name!r}: use some of {', '.join((*groups, *known))}")
            found[category] = None
    return tuple(found)


def read_items(folder: str, categories: tuple[str, ...]) -> list[Item]:
    """All rows of the categories, those with outdated answers too. Raises TaskError that names file and line."""
    return [item for category in categories for item in _read_category(Path(folder).expanduser(), category)]


def without_outdated(items: list[Item]) -> list[Item]:
    """The items whose answers upstream has not corrected since; a warning names the others."""
    kept = [item for item in items if _OUTDATED.get(item.id) != item.truth]
    left = [item.id for item in items if _OUTDATED.get(item.id) == item.truth]
    if left:
        _log.warning(
            "ACEBench: %s left out: their answers are of August 2025, and wrong; a newer copy has others", ", ".join(left)
        )
    return kept


def split_items(items: list[Item], train_share: float) -> tuple[list[Item], list[Item]]:
    """Training and held-out items: a dialogue is in one of them as a whole, the same one for every seed, in a mixed order."""
    if not 0 <= train_share < 1:
        raise TaskError(f"train_share: {train_share} is not in [0, 1)")
    dialogues = sorted({item.dialogue for item in items})
    order = {name: i for i, name in enumerate(random.Random("ACEBench").sample(dialogues, len(dialogues)))}
    mixed = sorted(items, key=lambda item: (order[item.dialogue], item.id))
    train = [item for item in mixed if zlib.crc32(item.dialogue.encode()) % 1000 < 1000 * train_share]
    trained = {item.id for item in train}
    return train, [item for item in mixed if item.id not in trained]


def _read_category(folder: Path, category: str) -> list[Item]:
    name = f"data_{category}.json"
    answers = {str(row.get("id")): (where, row) for where, row in json_lines(folder / "possible_answer" / name)}
    items = []
    for where, row in json_lines(folder / name):
        id = str(row.get("id"))
        if missing := [field for field in ("id", "question", "function") if field not in row]:
            raise TaskError(f"{where}: no field {missing[0]!r} (the row has {', '.join(row)})")
        if id not in answers:
            raise TaskError(f"{where}: {folder / 'possible_answer' / name} has no answer for {id!r}")
        answered, answer = answers[id]
        if "ground_truth" not in answer:
            raise TaskError(f"{answered}: no field 'ground_truth'")
        dialogue = id.rsplit("_", 1)[0] if category in DIALOGUES else id
        items.append(Item(id, category, dialogue, row, answer["ground_truth"], answer.get("mile_stone", [])))
    return items
