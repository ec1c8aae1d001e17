"""gunicorn and uvicorn under load, with a standby that lags and dies: what docs/how-to/serve.md says.

The loads take their time: `python3 run.py test-slow tests/proofs` runs the rest of them.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.proofs.load import application, put_under_load, workers
from tests.proofs.site import Client, Program, Site, free_port
from tests.routing import eventually

pytestmark = pytest.mark.cluster

PAGE = "how-to/serve.md"


@pytest.fixture(scope="module")
def project(site: Site) -> Site:
    application(site)
    return site


@pytest.fixture
def shop(project: Site) -> Iterator[Site]:
    yield project
    project.stop_programs()


def serve(site: Site, command: str, **environment: str) -> tuple[Program, int]:
    port = free_port()
    bind = f"--port {port}" if command.startswith("uvicorn") else f"--bind 127.0.0.1:{port}"
    program = site.start(f"{command} {bind}", **environment)

    def answers() -> bool:
        try:
            return bool(Client(port).get("/where"))
        except OSError:
            return False

    program.wait_for(answers)
    return program, port


@pytest.mark.parametrize(
    ("server", "prefix"),
    [
        pytest.param("gunicorn.conf.py", "", id="gthread"),
        pytest.param("--worker-class sync", "", id="sync", marks=pytest.mark.slow),
        pytest.param("uvicorn", "a", id="asgi"),
    ],
)
def test_nothing_stale_and_nothing_failed_under_load(shop: Site, server: str, prefix: str) -> None:
    (command,) = [command for command in shop.take(PAGE) if server in command]
    program, port = serve(shop, command, CONN_MAX_AGE="0" if prefix else "600")
    assert {said["monitors"] for said in workers(port, 2).values()} == {1}, "one in each process"

    with shop.lag(2):
        load = put_under_load(port, prefix=prefix)
    assert (load.errors, load.stale) == ([], [])
    assert load.requests == 6 * 8 * 5
    assert load.read_from["default"] > 0
    assert load.strangers[False] > 0, "who has no cookie sees the lag"

    # Replicas serve half of the reads when it happens.
    load = put_under_load(port, prefix=prefix, at_half=shop.standby.kill)
    try:
        assert (load.errors, load.stale) == ([], [])
        assert load.slowest < 10
    finally:
        shop.standby.restart()
    eventually(lambda: '"replica1"' in Client(port).get("/where"), 20)
    assert "Traceback" not in program.output, program.output
