"""run.py: the one command that needs nothing but Python."""

import ast
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "run.py"
NOBODY = 65534


@pytest.fixture
def run(monkeypatch):
    """run.py as a module of its own."""
    spec = importlib.util.spec_from_file_location("run", RUN)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "run", module)
    spec.loader.exec_module(module)
    return module


def call(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, **options
    )


# The command line


def test_help_lists_every_verb_and_what_it_does(run, tmp_path):
    done = call(RUN, "--help", cwd=tmp_path)
    assert done.returncode == 0
    for name, function in run.VERBS.items():
        assert f"  {name} " in done.stdout
        assert function.__doc__ in done.stdout
    assert {"demo", "test", "test-slow", "test-django61", "lint", "docs", "bench", "ci"} == set(run.VERBS)


@pytest.mark.parametrize("arguments", [["tset"], []])
def test_an_unknown_verb_is_a_usage_error(arguments):
    done = call(RUN, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(f"run.py: unknown verb {arguments[0]!r}" if arguments else "run.py: which")
    assert "Verbs:" in done.stderr


def test_an_old_python_gets_one_clear_line():
    ast.parse(RUN.read_text(), feature_version=(3, 7))  # else it would get a SyntaxError
    done = call("-c", f"import sys, runpy; sys.version_info = (3, 10, 4); runpy.run_path({str(RUN)!r})")
    assert done.returncode == 1
    assert done.stderr == f"run.py: needs Python 3.11 or newer; {sys.executable} is Python 3.10\n"


def test_it_needs_no_home_and_no_variables(tmp_path):
    done = subprocess.run(
        [sys.executable, RUN, "--help"], cwd=tmp_path, env={}, capture_output=True, check=False
    )
    assert done.returncode == 0


# Where it installs


def test_an_own_checkout_keeps_its_environments_in_itself(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    assert run.state_directory() == tmp_path / ".venv"


def test_no_directory_to_write_to_is_said_with_all_that_were_tried(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "state_candidates", lambda: iter([Path("/dev/null/a"), Path("/dev/null/b")]))
    with pytest.raises(run.SetupError, match="/dev/null/a, /dev/null/b"):
        run.state_directory()


def test_a_directory_that_somebody_else_laid_out_is_not_used(run, tmp_path, monkeypatch):
    theirs, own = tmp_path / "theirs", tmp_path / "own"
    theirs.mkdir()
    (tmp_path / "link").symlink_to(theirs)
    monkeypatch.setattr(run, "state_candidates", lambda: iter([tmp_path / "link", own]))
    lstat = Path.lstat

    def foreign_link(path):
        values = list(lstat(path))
        if os.path.islink(path):
            values[4] = os.geteuid() + 1
        return os.stat_result(values)

    monkeypatch.setattr(Path, "lstat", foreign_link)
    assert run.state_directory() == own


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_somebody_elses_checkout_stays_untouched():
    place = Path(tempfile.mkdtemp(prefix="checkout-", dir="/tmp"))
    try:
        place.chmod(0o755)
        shutil.copy(RUN, place)
        become = f"import os; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"
        done = call("-B", "-c", f"import run; {become}; print(run.state_directory())", cwd=place)
        chosen = Path(done.stdout.strip())
        assert chosen.is_dir(), done.stderr
        assert place not in chosen.parents
        assert chosen.stat().st_uid == NOBODY
        chosen.rmdir()
        assert [path.name for path in place.iterdir()] == ["run.py"]
    finally:
        shutil.rmtree(place)


# When it installs


@pytest.fixture
def checkout(run, tmp_path, monkeypatch):
    """An empty project; what pip would have been asked for is recorded instead."""
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("[project]\n")
    asked = []

    def create(self):
        shutil.rmtree(self.path, ignore_errors=True)
        self.executable.parent.mkdir(parents=True)
        self.executable.symlink_to(sys.executable)
        asked.append("create")

    monkeypatch.setattr(run.Environment, "create", create)
    monkeypatch.setattr(run.Environment, "pip", lambda self, *arguments: asked.append(arguments[-1]))
    return asked


@pytest.fixture
def environment(run, tmp_path):
    (tmp_path / "state").mkdir()
    return lambda **options: run.Environment(tmp_path / "state", sys.executable, **options)


def test_it_installs_once(checkout, environment):
    environment().provide("test")
    environment().provide("test")
    assert checkout == ["create", ".[test]"]


def test_another_extra_is_added_to_the_ones_there(checkout, environment):
    environment().provide("test")
    environment().provide("lint", "test")
    environment().provide("lint")
    assert checkout == ["create", ".[test]", ".[lint,test]"]


def test_changed_dependencies_are_installed(checkout, environment, tmp_path):
    environment().provide("test")
    (tmp_path / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    environment().provide("demo")
    assert checkout == ["create", ".[test]", ".[demo,test]"]


def test_overrides_come_last(checkout, environment):
    environment(variant="-next", overrides=("Django>=6.1",)).provide("test")
    assert checkout == ["create", ".[test]", "Django>=6.1"]


def test_an_installation_that_was_cut_short_is_begun_anew(run, checkout, environment, monkeypatch):
    environment().provide("demo")
    pip = run.Environment.pip

    def interrupted(self, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.Environment, "pip", interrupted)
    with pytest.raises(KeyboardInterrupt):
        environment().provide("test")
    monkeypatch.setattr(run.Environment, "pip", pip)
    environment().provide("test")
    assert checkout == ["create", ".[demo]", "create", ".[test]"]


def test_a_checkout_that_was_moved_is_installed_anew(checkout, environment):
    first = environment()
    first.provide("test")
    stamp = json.loads(first.stamp.read_text())
    first.stamp.write_text(json.dumps(stamp | {"root": "/elsewhere"}))
    environment().provide("test")
    assert checkout == ["create", ".[test]", "create", ".[test]"]


def test_a_python_that_is_gone_is_replaced(checkout, environment):
    first = environment()
    first.provide("test")
    first.executable.unlink()
    first.executable.symlink_to("/nonexistent/python")
    environment().provide("test")
    assert checkout == ["create", ".[test]", "create", ".[test]"]


def test_of_two_runs_at_once_one_installs_and_the_other_waits(run, checkout, environment, monkeypatch, capfd):
    pip = run.Environment.pip

    def slow(self, *arguments):
        time.sleep(0.3)
        pip(self, *arguments)

    monkeypatch.setattr(run.Environment, "pip", slow)
    threads = [threading.Thread(target=environment().provide, args=("test",)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert checkout == ["create", ".[test]"]
    assert "another run is installing" in capfd.readouterr().err


def test_what_pip_says_is_shown_when_it_fails(run, monkeypatch, capfd):
    def fail(arguments):
        run.must_succeed([sys.executable, "-c", "print('no such package'); exit(3)"], "installing failed")

    monkeypatch.setitem(run.VERBS, "test", fail)
    assert run.main(["test"]) == 1
    assert capfd.readouterr().err == "run.py: installing failed:\nno such package\n"


@pytest.mark.parametrize(
    ("there", "user", "installs"),
    [
        (["apt-get"], 0, True),
        (["apt-get", "chromium"], 0, False),
        (["apt-get", "google-chrome"], 0, False),
        (["apt-get"], 1000, False),  # who may not install is not asked for a password
        ([], 0, False),
    ],
)
def test_chromium_is_installed_where_it_is_missing_and_may_be(run, monkeypatch, there, user, installs):
    asked = []
    monkeypatch.setattr(run.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(run.os, "geteuid", lambda: user)
    monkeypatch.setattr(run, "succeeds", lambda command: asked.append(command) or True)
    run.provide_chromium()
    assert [command[-1] for command in asked] == (["chromium"] if installs else [])


def test_without_chromium_the_tests_go_on(run, monkeypatch, capfd):
    asked = []
    monkeypatch.setattr(run.shutil, "which", lambda name: name if name == "apt-get" else None)
    monkeypatch.setattr(run.os, "geteuid", lambda: 0)
    monkeypatch.setattr(run, "succeeds", lambda command: asked.append(command[-1]) or command[-1] == "update")
    run.provide_chromium()
    assert asked == ["chromium", "update", "chromium"]
    assert "the tests in a browser will be skipped" in capfd.readouterr().err


def test_pgbouncer_is_installed_likewise(run, monkeypatch):
    asked, there = [], ["apt-get"]
    monkeypatch.setattr(run.shutil, "which", lambda name: name if name in there else None)
    monkeypatch.setattr(run.os, "geteuid", lambda: 0)
    monkeypatch.setattr(run, "succeeds", lambda command: asked.append(command[-1]) or True)
    run.provide_pgbouncer()
    there.append("/usr/sbin/pgbouncer")  # where Debian puts it, which is not on every PATH
    run.provide_pgbouncer()
    assert asked == ["pgbouncer"]


# How it runs


def test_the_callers_variables_lead_nowhere_else(run, environment, monkeypatch):
    monkeypatch.setenv("PGHOST", "production.example.com")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "other.settings")
    monkeypatch.setenv("SCALEDB_POSTGRES", "system")
    variables = environment().variables()
    assert {"PGHOST", "PYTHONPATH", "DJANGO_SETTINGS_MODULE"}.isdisjoint(variables)
    assert variables["SCALEDB_POSTGRES"] == "system"


def test_the_exit_code_is_the_programs(run):
    assert run.run([sys.executable, "-c", "exit(7)"], dict(os.environ)) == 7


def test_a_request_to_stop_reaches_the_program(tmp_path):
    program = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('cleaned up'), sys.exit(9)))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)"
    )
    code = f"import os, sys, run; sys.exit(run.run([sys.executable, '-c', {program!r}], dict(os.environ)))"
    with subprocess.Popen(
        [sys.executable, "-B", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=10)[0] == "cleaned up\n"
        assert process.returncode == 9
