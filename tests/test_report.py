"""The report in a real browser: on a phone and on a desktop, light and dark, on paper, and with the worst names and numbers."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.images import paint
from tests.helpers.workspaces import set_param
from tlpipeline.progress import silent
from tlpipeline.workspace import create, release, stages

pytestmark = pytest.mark.slow

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LONG = "a_very_long_class_name_without_a_single_space_in_it_as_people_call_their_folders"
CLASSES = ("short", "Ünïcödé ✓", "<script>alert(1)</script>", LONG, *(f"class {i:02d}" for i in range(12)))


@pytest.fixture(scope="module")
def page_of_many_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a model with sixteen classes, some of them with names that break pages."""
    folder = tmp_path_factory.mktemp("many")
    for number, label in enumerate(CLASSES):
        place = folder / "pictures" / label.replace("/", "∕")
        place.mkdir(parents=True)
        for index in range(12):
            paint(number % 3, 100 * number + index).save(place / f"{'long_name_' * 8 if index == 0 else ''}{index}.png")
    workspace = folder / "workspace"
    create.init(workspace, folder / "pictures", "demonstration", "DEFAULT", None)
    set_param(workspace, "cluster.gpu", "false")
    set_param(workspace, "choose.case", "small_similar")
    for name in stages.STAGES:
        stages.bring_up_to_date(workspace, name, silent)
    return release.write_report(workspace, release.register(workspace, release.evaluate_gate(workspace, silent)))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    if BROWSER is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_the_report_fits_its_window_shows_all_pictures_and_can_be_read_by_everyone(
    browser: Any, page_of_many_classes: Path, width: int, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = browser.new_page(viewport={"width": width, "height": 844}, color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: problems.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    page.goto(page_of_many_classes.as_uri())
    for opened in (False, True):
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"wider than the window, all sections open: {opened}"
        violations = [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in Axe().run(page).response["violations"]]
        assert violations == [], "WCAG AA, as axe-core checks it"
        page.evaluate("document.querySelectorAll('details').forEach(section => { section.open = true })")
    assert page.evaluate("[...document.images].filter(image => !image.naturalWidth).length") == 0
    assert page.evaluate("document.images.length") > 0
    assert problems == []
    page.close()


def test_every_figure_of_a_class_fits_a_phone(browser: Any, page_of_many_classes: Path) -> None:
    page = browser.new_page(viewport={"width": 390, "height": 844})
    page.goto(page_of_many_classes.as_uri())
    right = page.evaluate("Math.max(...[...document.querySelectorAll('.per-class td')].map(cell => cell.getBoundingClientRect().right))")
    assert right <= 390
    page.close()


def test_the_report_prints_its_folded_sections(browser: Any, page_of_many_classes: Path, tmp_path: Path) -> None:
    page = browser.new_page()
    page.goto(page_of_many_classes.as_uri())
    page.emulate_media(media="print")
    assert page.get_by_text("dvc pull").is_visible(), "the last section is folded on a screen"
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    page.close()


def test_the_report_is_below_five_megabytes_and_is_kept_under_its_version(page_of_many_classes: Path) -> None:
    assert page_of_many_classes.stat().st_size < 5_000_000
    (kept,) = (page_of_many_classes.parent / "reports").glob("*.html")
    assert kept.name.endswith("_workspace@v0.1.0.html")
    assert kept.read_bytes() == page_of_many_classes.read_bytes()
