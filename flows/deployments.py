"""The deployments of prefect.yaml: put on a Prefect server, served by one process, or checked."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import get_client, serve
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.deployments.runner import RunnerDeployment
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.schedules import Cron
from prefect.types.entrypoint import EntrypointType
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from tlpipeline.errors import WorkspaceError
from tlpipeline.flows.retrain import reach, retrain
from tlpipeline.workspace.doctor import OK, PROBLEM, WARNING, Check, checked

FILE = "prefect.yaml"


@dataclass(frozen=True)
class Deployed:
    """What `deploy` did.

    Attributes:
        names: of the deployments.
        api: of the server.
        pool: the work pool that their runs wait in; new: whether it was made now.
        workers: that listen to it now.
    """

    names: tuple[str, ...]
    api: str
    pool: str
    new: bool
    workers: int

    def __str__(self) -> str:
        listening = f"{self.workers} worker{'s listen' if self.workers != 1 else ' listens'}" if self.workers else "no worker listens"
        way_on = "" if self.workers else f"; start one: prefect worker start --pool {self.pool}"
        made = " (new)" if self.new else ""
        return f"deployed to {self.api}: {', '.join(self.names)}. Work pool {self.pool}{made}: {listening}{way_on}"


def deploy(root: Path, take_over: bool = False) -> Deployed:
    """Put the deployments of prefect.yaml on the Prefect server at PREFECT_API_URL, and make their work pool if it is missing.

    Args:
        take_over: also replace deployments of the same name that run in another folder.

    Raises:
        WorkspaceError: prefect.yaml cannot be read, the server does not answer, refuses, or has these deployments for another folder.
    """
    entries, root = _entries(root), root.resolve()
    if not os.environ.get("PREFECT_API_URL"):
        raise WorkspaceError(
            "expected the address of a Prefect server in PREFECT_API_URL, found none. Start one (`prefect server start --background`), then "
            "`export PREFECT_API_URL=http://127.0.0.1:4200/api`. Or let one process do everything: `tlpipeline serve`."
        )
    reach()
    names, pool = tuple(entry["name"] for entry in entries), str((entries[0].get("work_pool") or {}).get("name", "tlpipeline"))
    with get_client(sync_client=True) as client:
        for name in names:
            place = _place(client, name)
            if place not in (None, str(root)) and not take_over:
                raise WorkspaceError(
                    f"expected that {name} runs in {root}, found that it runs in {place}: another clone deployed it. Give this workspace another "
                    "name (data.name, and prefect.yaml), or move the deployments here: `tlpipeline deploy --take-over`."
                )
        try:
            client.read_work_pool(pool)
            is_new = False
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
            is_new = True
        done = subprocess.run(
            [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"],
            cwd=root,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        if done.returncode:
            raise WorkspaceError(f"`prefect deploy --all` failed in {root}: {(done.stderr or done.stdout).strip()[-1500:]}")
        return Deployed(names, str(client.api_url), pool, is_new, _listening(client, pool))


def serve_all(root: Path) -> None:
    """Serve the deployments of prefect.yaml from this process until it is interrupted: their schedules and events start runs here.

    Raises:
        WorkspaceError: prefect.yaml cannot be read, or the server does not answer.
    """
    reach()
    serve(*(_served(root.resolve(), entry) for entry in _entries(root)), limit=1, print_starting_message=False)


def _served(root: Path, entry: dict[str, Any]) -> RunnerDeployment:
    """Return a deployment of prefect.yaml as one that a process serves."""
    limit = entry.get("concurrency_limit")
    triggers = [{k: v for k, v in trigger.items() if k != "type"} for trigger in entry.get("triggers") or []]
    return retrain.to_deployment(
        name=entry["name"],
        description=entry.get("description"),
        parameters={**entry.get("parameters", {}), "workspace": str(root)},
        schedules=[Cron(s["cron"], timezone=s.get("timezone"), active=s.get("active", True)) for s in entry.get("schedules") or []],
        triggers=[DeploymentEventTrigger(**trigger) for trigger in triggers],
        concurrency_limit=ConcurrencyLimitConfig(**limit) if isinstance(limit, dict) else limit,
        entrypoint_type=EntrypointType.MODULE_PATH,
    )  # type: ignore[return-value]


def checks(root: Path) -> Iterator[Check]:
    """Yield whether the server answers, has the deployments of this workspace and their triggers, and whether a worker listens."""
    if not os.environ.get("PREFECT_API_URL"):
        yield Check("Prefect server", WARNING, "PREFECT_API_URL is not set: nothing runs by itself. Start `tlpipeline serve`")
        return

    def answers() -> tuple[str, str]:
        reach()
        return OK, f"{os.environ['PREFECT_API_URL']} answers"

    yield (server := checked("Prefect server", answers))
    if server.status == PROBLEM:
        return
    yield checked("deployments", lambda: _deployed(root.resolve()))


def _deployed(root: Path) -> tuple[str, str]:
    missing, elsewhere, untriggered, pools = [], [], [], set()
    with get_client(sync_client=True) as client:
        for entry in _entries(root):
            name, place = entry["name"], _place(client, entry["name"])
            if place is None:
                missing.append(name)
            elif place != str(root):
                elsewhere.append(f"{name} runs in {place}")
            elif any(not client.read_automations_by_name(trigger.get("name", "")) for trigger in entry.get("triggers") or []):
                untriggered.append(name)
            pools.add(str((entry.get("work_pool") or {}).get("name", "tlpipeline")))
        if elsewhere:
            return WARNING, f"{', '.join(elsewhere)}, not here. To move it here: tlpipeline deploy --take-over"
        if missing or untriggered:
            what = [f"{', '.join(missing)} missing"] * bool(missing) + [f"{', '.join(untriggered)} without its trigger"] * bool(untriggered)
            return WARNING, f"{'; '.join(what)}. Run `tlpipeline deploy` or `tlpipeline serve`"
        if not any(_listening(client, pool) for pool in pools) and not any(_is_served(client, entry["name"]) for entry in _entries(root)):
            return WARNING, f"deployed, but no worker listens. Start one: prefect worker start --pool {sorted(pools)[0]}"
    return OK, "deployed, and somebody listens"


def _entries(root: Path) -> list[dict[str, Any]]:
    """Return the deployments of prefect.yaml.

    Raises:
        WorkspaceError: it cannot be read, or has none.
    """
    path = root / FILE
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
        entries = [dict(entry) for entry in content["deployments"] if entry["name"]]
    except (OSError, UnicodeDecodeError, YAMLError, KeyError, TypeError, ValueError) as error:
        raise WorkspaceError(f"expected deployments in {path}, but: {error!r}. Restore it with `git checkout {FILE}`.") from error
    if not entries:
        raise WorkspaceError(f"expected deployments in {path}, found none. Restore it with `git checkout {FILE}`.")
    return entries


def _place(client: SyncPrefectClient, name: str) -> str | None:
    """Return the folder that a deployment on the server runs in, None if there is no such deployment."""
    try:
        deployment = client.read_deployment_by_name(f"{retrain.name}/{name}")
    except ObjectNotFound:
        return None
    place = str((deployment.parameters or {}).get("workspace", "."))
    for step in deployment.pull_steps or []:
        for kind, inputs in step.items():
            if kind.endswith("set_working_directory"):
                place = str(Path(inputs["directory"], place))
    return str(Path(deployment.path or "", place).resolve())


def _listening(client: SyncPrefectClient, pool: str) -> int:
    """Return how many workers of a pool are online."""
    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        return 0
    workers = client.read_workers_for_work_pool(pool)
    return sum(str(getattr(worker.status, "value", worker.status)).upper() == "ONLINE" for worker in workers)


def _is_served(client: SyncPrefectClient, name: str) -> bool:
    """Return whether a process that serves a deployment has asked for its runs lately."""
    deployment = client.read_deployment_by_name(f"{retrain.name}/{name}")
    return str(getattr(deployment.status, "value", deployment.status)).upper() == "READY"
