"""The progress of a training job: the first worker writes messages, and whoever started the job reads them as they come."""

import json
from pathlib import Path

from tests.helpers.training import Clock
from tlpipeline.progress import Event
from tlpipeline.training.progress import ProgressReader, ProgressWriter, clock


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def test_unimportant_messages_come_five_times_a_second_at_most(tmp_path: Path) -> None:
    now = Clock()
    now.now = 100.0
    on_progress = ProgressWriter(tmp_path / "new" / "progress.jsonl", rank=0, clock=now)
    for number in range(10):
        on_progress(number, 10, f"{number}", important=number == 5)
        now.now += 0.125
    assert texts(tmp_path / "new" / "progress.jsonl") == ["0", "2", "4", "5", "7", "9"]


def test_only_the_first_worker_writes(tmp_path: Path) -> None:
    on_progress = ProgressWriter(tmp_path / "progress.jsonl", rank=1)
    on_progress(1, 1, "nothing", important=True)
    assert not on_progress.due()
    assert not (tmp_path / "progress.jsonl").exists()


def test_messages_are_passed_on_once_and_whole_and_none_from_an_earlier_attempt(tmp_path: Path) -> None:
    path, events = tmp_path / "progress.jsonl", list[Event]()
    ProgressReader(path, "train", events.append)()  # nothing was written yet
    ProgressWriter(path, 0)(1, 3, "before", important=True)
    read = ProgressReader(path, "train", events.append)
    read()
    assert events == []
    ProgressWriter(path, 0)(2, 3, "one", important=True)
    half = json.dumps({"done": 3, "total": 3, "text": "two"}) + "\n"
    with path.open("a") as file:
        file.write(half[:10])
        file.flush()
        read()
        file.write(half[10:])
    assert events == [Event("train", 2, 3, "one")]
    read()
    read()
    assert events == [Event("train", 2, 3, "one"), Event("train", 3, 3, "two")]


def test_seconds_are_shown_as_minutes_and_seconds() -> None:
    assert [clock(seconds) for seconds in (0, 59.9, 61, 3661)] == ["0:00", "0:59", "1:01", "61:01"]
