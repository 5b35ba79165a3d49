"""The code of your own network is part of the model: a change trains anew, and every version predicts for ever what it predicted."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tlpipeline as tl
from tests.helpers.images import paint
from tests.helpers.workspaces import set_param
from tlpipeline.backbones import catalogue, classifier, code
from tlpipeline.errors import BackboneError
from tlpipeline.progress import silent
from tlpipeline.registry.predict import Prediction
from tlpipeline.workspace import create, stages

NET = """
from torch import nn
from {helpers} import flipped

class Net(nn.Module):
    taps = ("early", "late")
    transforms = {{"size": 32, "mean": ({mean},) * 3}}

    def __init__(self, num_classes=10):
        super().__init__()
        self.early = nn.Sequential(nn.Conv2d(3, {width}, 3, 2), nn.ReLU())
        self.late = nn.Sequential(nn.Conv2d({width}, 16, 3, 2), nn.ReLU())
        self.head = nn.Linear(16, num_classes)

    def forward(self, images):
        return self.head(self.late(flipped(self.early(images))).mean((2, 3)))
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Write a network and a helper of it into a folder on the path; give its name, which differs between tests."""
    own = f"own_{abs(hash(request.node.name)) % 10**8}"
    monkeypatch.syspath_prepend(str(tmp_path / "code"))

    def write(sign: str = "", mean: float = 0.5, width: int = 8, package: bool = False) -> str:
        folder = tmp_path / "code" / own if package else tmp_path / "code"
        folder.mkdir(parents=True, exist_ok=True)
        if package:
            (folder / "__init__.py").write_text("")
        helpers = ".blocks" if package else f"{own}_blocks"
        (folder / ("nets.py" if package else f"{own}.py")).write_text(NET.format(helpers=helpers, mean=mean, width=width))
        (folder / f"{helpers.lstrip('.')}.py").write_text(f"def flipped(x):\n    return {sign}x\n")
        return f"{own}.nets:Net" if package else f"{own}:Net"

    return write


def saved(name: str, folder: Path) -> None:
    """Save a classifier with this network as training does."""
    net = catalogue.load(name, "none")
    readings = [classifier.TapPooling("late", 16, (1,))]
    model = classifier.Classifier(net, readings, 3, frozen=True)
    model.head.weight.data.normal_(generator=None)
    description = classifier.Description(name, "late", tuple(readings), ("a", "b", "c"), net.transforms, frozen=True)
    classifier.save(model, description, folder, net.code)


def answers(folder: Path, root: Path | None = None) -> list[Prediction]:
    """Return what a model folder says of three images."""
    return tl.load_model(folder, workspace=root or folder, trust=classifier.describe(folder).architecture).predict(
        [paint(label, 0) for label in range(3)]
    )


@pytest.mark.parametrize("package", [False, True])
def test_a_model_predicts_what_it_predicted_after_its_code_and_what_that_imports_were_changed_or_deleted(
    write: Callable[..., str], tmp_path: Path, package: bool
) -> None:
    name = write(package=package)
    saved(name, tmp_path / "model")
    before = answers(tmp_path / "model")
    write(sign="-", mean=0.1, package=package)
    assert answers(tmp_path / "model") == before
    for path in (tmp_path / "code").rglob("*.py"):
        path.unlink()
    assert answers(tmp_path / "model") == before
    assert not list((tmp_path / "model").rglob("__pycache__")), "a compiled file would change the md5 that DVC records of the folder"


def test_a_change_of_what_the_module_imports_is_a_change_of_the_code(write: Callable[..., str], tmp_path: Path) -> None:
    first = catalogue.code_md5(write(), tmp_path)
    assert catalogue.code_md5(write(), tmp_path) == first
    assert catalogue.code_md5(write(sign="-"), tmp_path) != first
    assert catalogue.code_md5("resnet18", tmp_path) == "none"
    assert catalogue.code_md5("torchvision.models:resnet18", tmp_path) == "none", "an installed package has a version"


def test_in_one_process_changed_code_is_what_runs(write: Callable[..., str]) -> None:
    assert catalogue.load(write(width=8), "none").module.early[0].out_channels == 8  # type: ignore[index, union-attr]
    assert catalogue.load(write(width=12), "none").module.early[0].out_channels == 12  # type: ignore[index, union-attr]


def test_other_code_than_the_settings_record_is_refused_with_the_way_out(write: Callable[..., str], tmp_path: Path) -> None:
    name = write()
    recorded = catalogue.code_md5(name, tmp_path)
    write(sign="-")
    with pytest.raises(BackboneError, match=rf"code of {name} to have the md5 in backbone\.code_md5 \({recorded}\).*`tlpipeline run`"):
        catalogue.load(name, "none", code_md5=recorded)


def test_kept_code_that_was_altered_is_not_run(write: Callable[..., str], tmp_path: Path) -> None:
    saved(write(), tmp_path / "model")
    [kept] = (tmp_path / "model" / code.FOLDER).glob("*_blocks.py")
    kept.write_text(f"{kept.read_text()}open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(BackboneError, match="Fetch the model again"):
        answers(tmp_path / "model")
    assert not (tmp_path / "ran").exists()


def test_a_workspace_that_names_a_network_trusts_no_other_code_of_that_name(
    write: Callable[..., str], workspace: Path, tmp_path: Path
) -> None:
    name = write()
    set_param(workspace, "backbone.name", name)
    assert create.record_code(workspace) == ""
    saved(name, tmp_path / "own")
    tl.load_model(tmp_path / "own", workspace=workspace)
    write(sign="-")
    saved(name, tmp_path / "foreign")
    write()
    with pytest.raises(BackboneError, match="if you trust the folder: --trust"):
        tl.load_model(tmp_path / "foreign", workspace=workspace)


def test_imports_of_kept_code_lead_to_kept_code_however_they_are_written(tmp_path: Path) -> None:
    files = {
        "pack/__init__.py": "from . import deep\n",
        "pack/deep/__init__.py": "",
        "pack/deep/one.py": "VALUE = 'kept'\n",
        "helper.py": "import pack.deep.one\nimport pack.deep.one as named\nfrom pack.deep import one\nimport os.path\n"
        "def late():\n    import pack.deep.one as inner\n    return inner.VALUE\n"
        "VALUES = [pack.deep.one.VALUE, named.VALUE, one.VALUE, late(), os.path.basename('x')]\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert code.load(code.of_folder(tmp_path), "helper", tmp_path).VALUES == ["kept"] * 4 + ["x"]
    assert "pack" not in sys.modules


def test_kept_code_that_needs_a_package_that_is_gone_says_so(tmp_path: Path) -> None:
    (tmp_path / "needy.py").write_text("import a_package_that_nobody_has\n")
    with pytest.raises(
        BackboneError, match=r"(?s)Cannot import needy from the code that is kept.*a_package_that_nobody_has.*not installed here"
    ):
        code.load(code.of_folder(tmp_path), "needy", tmp_path)


BROKEN = """
class Fails(nn.ReLU):
    def forward(self, x):
        if self.training:
            raise RuntimeError("not yet")
        return super().forward(x)


class Net(Net):
    def __init__(self, num_classes=10):
        super().__init__(num_classes)
        self.late.append(Fails())
"""


@pytest.mark.slow
def test_a_change_trains_anew_and_what_failed_with_other_shapes_is_not_resumed(
    write: Callable[..., str], workspace: Path, tmp_path: Path
) -> None:
    name = write()
    set_param(workspace, "backbone.name", name)
    set_param(workspace, "backbone.weights", "none")
    set_param(workspace, "choose.case", "large_similar")
    set_param(workspace, "train.epochs", "1")
    module = tmp_path / "code" / f"{name.partition(':')[0]}.py"
    module.write_text(module.read_text() + BROKEN)

    def run() -> None:
        create.record_code(workspace)
        for stage in stages.STAGES:
            stages.bring_up_to_date(workspace, stage, silent)

    with pytest.raises(RuntimeError, match="not yet"):
        run()
    write(width=12)
    run()
    before = (workspace / "model" / "model.json").read_text()
    assert not stages.bring_up_to_date(workspace, "train", silent)
    write(width=12, sign="-")
    assert "trained anew" in create.record_code(workspace)
    assert stages.bring_up_to_date(workspace, "profile", silent)
    stages.bring_up_to_date(workspace, "choose", silent)
    assert stages.bring_up_to_date(workspace, "train", silent)
    assert (workspace / "model" / "model.json").read_text() != before
