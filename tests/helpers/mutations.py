"""Damage for files of ours: a mutant of a text is cut off, has other bytes, or one value of its JSON is gone, added or another."""

import json
import random
from collections.abc import Iterator
from typing import Any

OTHERS: tuple[Any, ...] = (
    None, True, 0, -1, 1, 3, 1e9, 10**30, 0.5, float("nan"), float("inf"), "", "x", "0" * 10, [], {}, [1], {"a": 1}, "conv1", "../x",
)  # fmt: skip


def damaged(content: bytes, seed: int) -> bytes:
    """Return the content cut off somewhere, or with a few other bytes."""
    rng = random.Random(seed)
    if rng.random() < 0.4:
        return content[: rng.randrange(len(content))]
    others = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        others[rng.randrange(len(others))] = rng.randrange(256)
    return bytes(others)


def edited(text: str, seed: int) -> bytes:
    """Return JSON in which one value is gone, added, doubled or replaced by one of another kind."""
    rng = random.Random(seed)
    content = json.loads(text)
    *way, last = rng.choice(list(_places(content)))
    inside = content
    for key in way:
        inside = inside[key]
    how = rng.random()
    if how < 0.2:
        del inside[last]
    elif how < 0.3:
        inside.append(inside[last]) if isinstance(inside, list) else inside.update(extra=1)
    else:
        inside[last] = rng.choice(OTHERS)
    return json.dumps(content).encode()


def _places(content: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*way, key)
        yield from _places(value, (*way, key))
