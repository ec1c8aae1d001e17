"""A Django project in a temporary folder, whose code a test may change between two commands."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import psycopg

from django_scaledb.testing import Cluster

SETTINGS = """
SECRET_KEY = "x"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
DATABASES = {{"default": {database!r}}}
INSTALLED_APPS = ["django_scaledb", "shop"]
{extra}
"""
ROUTED = """
DATABASE_ROUTERS = ["django_scaledb.routing.ReplicaRouter"]
SCALEDB = {"REPLICAS": [alias for alias in DATABASES if alias != "default"], "MAX_LAG": 4}
"""
IMPORTS = """
from django.db import models
from django_scaledb.models import PartitionedModel, UUID7Field
"""


class Project:
    """One app, ``shop``, on a database of its own."""

    def __init__(
        self, folder: Path, cluster: Cluster, database: str, extra: str = "", *, routed: bool = False
    ) -> None:
        """With `routed`, reads go to the cluster's standbys by way of the router."""
        self.folder = folder
        folder.mkdir(exist_ok=True)
        cluster.create_database(database)
        self.node = cluster.primary
        self.database = database
        entry = {**cluster.primary.django_settings(), "NAME": database}
        if routed:
            for number, standby in enumerate(cluster.standbys, 1):
                other = {**standby.django_settings(), "NAME": database}
                extra += f"\nDATABASES['replica{number}'] = {other!r}"
            extra += ROUTED
        (folder / "project_settings.py").write_text(SETTINGS.format(database=entry, extra=extra))
        (folder / "shop" / "migrations").mkdir(parents=True)
        (folder / "shop" / "__init__.py").touch()
        (folder / "shop" / "migrations" / "__init__.py").touch()

    def models(self, source: str) -> None:
        (self.folder / "shop" / "models.py").write_text(IMPORTS + textwrap.dedent(source))

    def manage(self, *args: str, fails: bool = False, stdin: str = "") -> str:
        """Run a management command; its output, which must (not) be a failure."""
        source = Path(__file__).parent.parent / "src"
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "project_settings",
            "PYTHONPATH": f"{self.folder}{os.pathsep}{source}",
        }
        done = subprocess.run(
            [sys.executable, "-m", "django", *args],
            cwd=self.folder,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=120,
        )
        output = done.stdout + done.stderr
        assert bool(done.returncode) is fails, output
        return output

    def run(self, code: str, *, fails: bool = False) -> str:
        """Run Python code with the project's models at hand."""
        code = "from shop.models import *\n" + textwrap.dedent(code)
        return self.manage("shell", "-v", "0", "-c", code, fails=fails)

    def query(self, statement: str) -> list[tuple]:
        with psycopg.connect(self.node.conninfo(dbname=self.database)) as connection:
            return connection.execute(statement).fetchall()

    def execute(self, script: str) -> None:
        """Run statements that answer nothing, in one transaction."""
        with psycopg.connect(self.node.conninfo(dbname=self.database)) as connection:
            connection.execute(script)
