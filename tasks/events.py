"""Events for Prefect: others start runs by them, or send messages."""

from typing import Any

import httpx
from prefect import get_client
from prefect.events import Event, Resource

from tlpipeline.errors import WorkspaceError


def send(name: str, resource: str, payload: dict[str, Any], way_out: str) -> None:
    """Send an event to the Prefect server as a request with an answer: Prefect's queued events are lost silently if the server is down.

    Args:
        name: such as tlpipeline.data.updated.
        resource: what it is about.
        payload: plain values.
        way_out: sentences for the error.

    Raises:
        WorkspaceError: the server cannot be reached, or refuses the event.
    """
    event = Event(event=name, resource=Resource({"prefect.resource.id": resource}), payload=payload)
    with get_client(sync_client=True) as client:
        try:
            client.request("POST", "/events", json=[event.model_dump(mode="json")]).raise_for_status()
        except httpx.HTTPError as error:
            raise WorkspaceError(f"Cannot report {name} to the Prefect server at {client.api_url}: {error}. {way_out}") from error
