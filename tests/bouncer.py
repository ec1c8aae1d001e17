"""PgBouncer in front of a cluster's servers, as an ordinary user, on a socket."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from django_scaledb.testing import Node

PORT = "6432"
DEFAULTS = """
pool_mode = transaction
server_login_retry = 1
server_connect_timeout = 2
"""


@contextmanager
def pgbouncer(entries: Mapping[str, tuple[Node, str]], options: str = DEFAULTS) -> Iterator[Path]:
    """Run it with one entry for each server and database; the directory of its socket."""
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed; on Debian and Ubuntu: apt-get install pgbouncer")
    home = Path(tempfile.mkdtemp(prefix="scaledb-bouncer-"))
    lines = ["[databases]"]
    for name, (node, database) in entries.items():
        access = node.access
        lines.append(
            f"{name} = host={node.host} port={node.port} dbname={database} "
            f"user={access.user} password={access.password}"
        )
    own = ["listen_addr =", f"listen_port = {PORT}", f"unix_socket_dir = {home}", "auth_type = any"]
    (home / "pgbouncer.ini").write_text("\n".join([*lines, "[pgbouncer]", *own, options]))
    user = group = groups = None
    if os.geteuid() == 0:  # it refuses to run as root
        owner = os.stat(next(iter(entries.values()))[0].host)
        user, group, groups = owner.st_uid, owner.st_gid, []
        for path in (home, home / "pgbouncer.ini"):
            os.chown(path, owner.st_uid, owner.st_gid)
    log = home.with_suffix(".log")
    with log.open("wb") as file:
        process = subprocess.Popen(
            [program, str(home / "pgbouncer.ini")],
            user=user, group=group, extra_groups=groups, cwd="/", stdout=file, stderr=file,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 5
        while not (home / f".s.PGSQL.{PORT}").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.01)
        yield home
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(home)
        log.unlink()
