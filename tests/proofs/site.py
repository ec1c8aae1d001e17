"""A Django project with a standby, made from a page of the documentation, and programs that serve it."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.cookiejar import CookieJar
from itertools import count
from pathlib import Path

from django_scaledb.testing import Cluster
from tests.acceptance.test_docs import DOCS, ROOT, Block, Page, blocks, commands
from tests.project import Project

_NUMBERS = count(1)
EXTRA = """
import os
DATABASES["default"]["CONN_MAX_AGE"] = int(os.environ.get("CONN_MAX_AGE", "600"))
DATABASES["replica1"] = {{**{replica!r}, "CONN_MAX_AGE": DATABASES["default"]["CONN_MAX_AGE"]}}
if "SERVER_SIDE_BINDING" in os.environ:
    for entry in DATABASES.values():
        entry["OPTIONS"] = {{"server_side_binding": True}}
DATABASE_ROUTERS = ["django_scaledb.routing.ReplicaRouter"]
MIDDLEWARE = ["django_scaledb.routing.ReadYourWritesMiddleware"]
SCALEDB = {{"REPLICAS": ["replica1"], "MAX_LAG": 60}}
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "shop.urls"
"""
ORDER = """
    class Order(models.Model):
        status = models.CharField(max_length=50)
"""


class Site(Project):
    """`tests.project.Project` whose ``replica1`` is the cluster's standby; a context manager."""

    def __init__(self, folder: Path, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.standby = cluster.standbys[0]
        database = re.sub(r"\W+", "_", name)[:40].lower() + f"_{next(_NUMBERS)}"
        replica = {**self.standby.django_settings(), "NAME": database}
        super().__init__(folder, cluster, database, EXTRA.format(replica=replica))
        self.write("shop/urls.py", "urlpatterns = []\n")
        self.programs: list[Program] = []

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop_programs()

    def stop_programs(self) -> None:
        while self.programs:
            self.programs.pop().stop()

    def settings(self, text: str) -> None:
        """Append to the settings."""
        path = self.folder / "project_settings.py"
        path.write_text(path.read_text() + text)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_text(text)

    def migrate(self) -> None:
        self.run(
            "from django.core.management import call_command\n"
            "call_command('makemigrations', 'shop', verbosity=0)\n"
            "import importlib; importlib.invalidate_caches()\n"
            "call_command('migrate', verbosity=0)"
        )
        self.cluster.wait_for_catchup()

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "DJANGO_SETTINGS_MODULE": "project_settings",
            "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT / 'src'}",
            "PYTHONUNBUFFERED": "1",
        }

    # -- pages

    def take(self, page: str) -> list[str]:
        """Write the files of a page of the documentation into the project; the page's commands, unrun."""
        text = (DOCS / page).read_text()
        found: list[str] = []
        for block in blocks(text):
            if block.caption.endswith(".py"):
                Page(page, self.folder).write(block.caption, block.body)
            elif block.kind == "console":
                found += [command.text for command in commands(block.body)]
        return found

    def start(self, command: str, **environment: str) -> Program:
        program = Program(self, command, environment)
        self.programs.append(program)
        return program

    @contextmanager
    def lag(self, seconds: float) -> Iterator[None]:
        self.cluster.wait_for_catchup()
        self.standby.set_lag(seconds)
        try:
            yield
        finally:
            if self.standby.is_running:
                self.standby.set_lag(0)


class Program:
    """A program in the background, with all that it prints in a file; ended by SIGTERM."""

    def __init__(self, site: Site, command: str, environment: dict[str, str]) -> None:
        self.command = command
        self.log = site.folder / f"program{next(_NUMBERS)}.log"
        with self.log.open("w") as file:
            self.process = subprocess.Popen(
                shlex.split(command),
                cwd=site.folder,
                env=site.environment() | environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object], within: float = 30) -> None:
        deadline = time.monotonic() + within
        while not condition():
            assert self.process.poll() is None, f"{self.command} has ended:\n{self.output}"
            assert time.monotonic() < deadline, f"{self.command}: not so after {within} s:\n{self.output}"
            time.sleep(0.05)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait(15)


class Client:
    """An HTTP client that keeps its cookies, as a browser does."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        jar = urllib.request.HTTPCookieProcessor(CookieJar())
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), jar)

    def get(self, path: str) -> str:
        """The body of a successful answer; raises `OSError` for any other."""
        with self._opener.open(self.base + path, timeout=20) as response:
            body: str = response.read().decode()
            return body


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def python_blocks(page: str) -> list[Block]:
    """The blocks of Python without a caption."""
    return [b for b in blocks((DOCS / page).read_text()) if b.kind == "python" and not b.caption]
