"""What a training job tells: the first worker writes it down, and whoever started it reads it as it comes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from tlpipeline.progress import Event
from tlpipeline.training import config
from tlpipeline.training.config import ProgressReader, ProgressWriter, clock


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_what_is_not_important_is_told_five_times_a_second_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(config, "time", SimpleNamespace(monotonic=lambda: now[0]))
    tell = ProgressWriter(tmp_path / "new" / "told.jsonl", rank=0)
    for number in range(10):
        tell(number, 10, f"{number}", important=number == 5)
        now[0] += 0.125
    assert texts(tmp_path / "new" / "told.jsonl") == ["0", "2", "4", "5", "7", "9"]


def test_only_the_first_worker_speaks(tmp_path: Path) -> None:
    tell = ProgressWriter(tmp_path / "told.jsonl", rank=1)
    tell(1, 1, "nothing", important=True)
    assert not tell.due()
    assert not (tmp_path / "told.jsonl").exists()


def test_what_was_told_is_passed_on_once_and_whole_and_nothing_from_an_earlier_attempt(tmp_path: Path) -> None:
    path, heard = tmp_path / "told.jsonl", list[Event]()
    ProgressReader(path, "train", heard.append)()  # nobody has spoken yet
    ProgressWriter(path, 0)(1, 3, "before", important=True)
    tail = ProgressReader(path, "train", heard.append)
    tail()
    assert heard == []
    ProgressWriter(path, 0)(2, 3, "one", important=True)
    half = json.dumps({"done": 3, "total": 3, "text": "two"}) + "\n"
    with path.open("a") as file:
        file.write(half[:10])
        file.flush()
        tail()
        file.write(half[10:])
    assert heard == [Event("train", 2, 3, "one")]
    tail()
    tail()
    assert heard == [Event("train", 2, 3, "one"), Event("train", 3, 3, "two")]


def test_minutes_and_seconds_are_told() -> None:
    assert [clock(seconds) for seconds in (0, 59.9, 61, 3661)] == ["0:00", "0:59", "1:01", "61:01"]
