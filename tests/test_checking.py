"""The stage check: what is wrong with the data."""

from pathlib import Path

from PIL import Image

from tests.helpers.datasets import listed, put
from tests.helpers.images import encoded, paint
from tlpipeline.alarms import BLOCK, WARN, Alarm, by_severity, from_remark
from tlpipeline.checking import quality
from tlpipeline.data.facts import FactStore


def test_flat_images_are_listed_and_counted(tmp_path: Path) -> None:
    contents = {f"{label}/{i}.png": encoded(paint(k, i)) for k, label in enumerate("ab") for i in range(4)}
    images = put(tmp_path / "images", contents | {"a/black.png": encoded(Image.new("L", (40, 40)))})
    checked = quality.check(images, listed(images), FactStore(), lambda done, total: None)
    assert [(finding.path, finding.kind) for finding in checked.findings] == [("a/black.png", "flat")]
    assert [alarm.text for alarm in checked.alarms] == ["1 images are one flat color (quality.csv)"]
    files = tmp_path / "quality.csv", tmp_path / "alarms.json"
    quality.write_quality(checked, *files)
    assert quality.read_quality(*files) == checked


def test_alarms_are_ordered_by_severity() -> None:
    alarms = (from_remark("not evaluated: no test image of a"), from_remark("leak: 3 images"))
    assert by_severity(alarms) == (Alarm("leak", BLOCK, "3 images"), Alarm("not evaluated", WARN, "no test image of a"))
