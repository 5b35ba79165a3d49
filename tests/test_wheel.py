"""What a user gets: the wheel, installed in a clean environment outside the checkout, runs the whole pipeline."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parent.parent
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
PACKAGES = [folder for folder in ("tlpipeline", "flows", "tasks") if (ROOT / folder).is_dir()]
Run = Callable[..., str]


def tracked() -> set[str]:
    """Return the files that git tracks below the three folders, by the names that they are installed under."""
    names = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    links = {"tlpipeline/flows", "tlpipeline/tasks"}
    return {name if name.startswith("tlpipeline/") else f"tlpipeline/{name}" for name in names if name not in links}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks, so that a build leaves nothing in the checkout and takes nothing untracked along."""
    target = tmp_path_factory.mktemp("checkout")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in names:
        if name and (ROOT / name).exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without network."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(target), "."]
    subprocess.run(command, cwd=checkout, check=True)
    (built,) = target.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == tracked()
    assert {PurePosixPath(name).parts[0] for name in names} == {"tlpipeline"}


@pytest.fixture(scope="module")
def run(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A function that runs a program of an environment that holds the wheel, with the tested versions, in a folder of the test's own."""
    assert UV, "expected uv beside the tests' Python, found none: `make test-all` installs it"
    environment = tmp_path_factory.mktemp("environment")
    subprocess.run([UV, "venv", "--quiet", "--clear", "--python", sys.executable, str(environment)], check=True)
    command = [UV, "pip", "install", "--quiet", "--python", str(environment / "bin" / "python")]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "PYTHON", "OMP_", "GOMP_", "VIRTUAL_ENV"))}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"

    def call(folder: Path, *command: str) -> str:
        done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    return call


def test_a_user_makes_a_workspace_runs_the_pipeline_and_predicts_beside_modules_of_the_same_names(run: Run, tmp_path: Path) -> None:
    # What a user's own project may hold: an Invoke file, and a package of flows.
    (tmp_path / "tasks.py").write_text("from pathlib import Path\n")
    (tmp_path / "flows").mkdir()
    (tmp_path / "flows" / "__init__.py").touch()
    assert str(ROOT) not in run(tmp_path, "python", "-c", "import tlpipeline; print(tlpipeline.__file__)")

    assert "is ready" in run(tmp_path, "tlpipeline", "init", "digits")
    params = tmp_path / "digits" / "params.yaml"
    params.write_text(params.read_text().replace("workers: 2", "workers: 0"))
    assert "digits@v0.1.0" in run(tmp_path, "python", "-m", "tlpipeline", "run", "--workspace", "digits")
    assert "digits@v0.1.0" in run(tmp_path, "tlpipeline", "registry", "list", "--workspace", "digits")
    assert "is in prod now" in run(tmp_path, "tlpipeline", "registry", "promote", "digits@latest", "--workspace", "digits")
    images = sorted(str(path) for path in (tmp_path / "digits" / "images" / "3").iterdir())[:5]
    lines = run(tmp_path, "tlpipeline", "predict", "digits#prod", *images, "--workspace", "digits").splitlines()
    assert [line.split()[1] for line in lines] == ["3"] * 5

    # How a Prefect worker loads the flow that prefect.yaml names.
    entrypoint = "tlpipeline.flows.retrain.retrain"
    assert entrypoint in (tmp_path / "digits" / "prefect.yaml").read_text()
    code = f"from prefect.flows import load_flow_from_entrypoint; print(load_flow_from_entrypoint({entrypoint!r}).name)"
    assert run(tmp_path, "python", "-c", code).strip() == "retrain"
