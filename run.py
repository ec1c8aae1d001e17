#!/usr/bin/env python3
"""Sets up what is needed and runs it: python3 run.py VERB [ARGUMENTS].

Needs Python 3.11 or newer and nothing else: no server, no container engine, no environment
variable. The first run of a verb installs the project and what that verb needs into a virtual
environment of its own; later runs start at once. ARGUMENTS go to the program that the verb
runs: python3 run.py test -k rotate
"""

# The syntax of this file is that of Python 3.6, so that an old Python gets as far as this check.
import sys

if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        "run.py: needs Python 3.11 or newer; {} is Python {}.{}".format(sys.executable, *sys.version_info[:2])
    )

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent
# The last would have every process compile all that it imports again: twice the time of the tests.
MISLEADING = ("PYTHONHOME", "PYTHONPATH", "DJANGO_SETTINGS_MODULE", "PYTHONDONTWRITEBYTECODE")
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
LINTED = ("src", "tests", "example", "benchmarks", "docs", "run.py")


class SetupError(Exception):
    """The environment cannot be made; the text says what to do."""


# Where things are kept ------------------------------------------------------------------------


def state_candidates() -> Iterator[Path]:
    """Directories for environments and caches, best first."""
    if ROOT.stat().st_uid == os.geteuid():  # never leave files in somebody else's checkout
        yield ROOT / ".venv"
    name = "django_scaledb-" + hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    if os.environ.get("XDG_CACHE_HOME"):
        yield Path(os.environ["XDG_CACHE_HOME"]) / name
    with contextlib.suppress(RuntimeError):  # no HOME and no entry in the user database
        yield Path.home() / ".cache" / name
    yield Path(tempfile.gettempdir()) / f"{name}-{os.geteuid()}"


def state_directory() -> Path:
    """The first candidate that is, or can be made, a directory of ours."""
    tried = []
    for path in state_candidates():
        tried.append(str(path))
        with contextlib.suppress(OSError):
            path.mkdir(parents=True, exist_ok=True)
            # lstat: in a shared temporary directory a link may lead anywhere
            if path.lstat().st_uid == os.geteuid() and os.access(path, os.W_OK | os.X_OK):
                return path
    raise SetupError("no directory to install into can be written; tried " + ", ".join(tried))


# The environment ------------------------------------------------------------------------------


class Environment:
    """A virtual environment with the project, editable, and some of its extras.

    One directory per Python version: runs under several Pythons, also at once, never take an
    environment away from one another. `overrides` are requirements installed last and without
    their dependencies, against what the project's own dependencies allow.
    """

    def __init__(
        self, state: Path, python: str, *, variant: str = "", overrides: tuple[str, ...] = ()
    ) -> None:
        self.python = python
        self.version = python_version(python)
        self.overrides = overrides
        self.cache = state / "cache"
        self.path = state / f"py{self.version}-{sysconfig.get_platform()}{variant}"
        self.stamp = self.path / "run.json"
        self.executable = self.path / "bin" / "python"

    def variables(self) -> dict[str, str]:
        """The caller's environment variables, less those that lead elsewhere."""
        variables = {
            name: value
            for name, value in os.environ.items()
            # PG*: libpq's defaults, which would send the tests to somebody's server
            if not name.startswith("PG") and name not in MISLEADING
        }
        variables.update(
            VIRTUAL_ENV=str(self.path),
            PATH=f"{self.path / 'bin'}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            # Everything that tools write by themselves goes beside the environment: the checkout
            # may be read-only, or somebody else's.
            PYTHONPYCACHEPREFIX=str(self.cache / "bytecode"),
            RUFF_CACHE_DIR=str(self.cache / "ruff"),
            MYPY_CACHE_DIR=str(self.cache / "mypy"),
            HYPOTHESIS_STORAGE_DIRECTORY=str(self.cache / "hypothesis"),
        )
        return variables

    def installed(self) -> dict[str, object]:
        """What the stamp says was installed; empty when it does not hold for this place."""
        try:
            stamp: dict[str, object] = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}
        moved = stamp.get("root") != str(ROOT) or stamp.get("path") != str(self.path)
        return stamp if not moved and os.access(self.executable, os.X_OK) else {}

    def lacks(self, extras: set[str]) -> bool:
        stamp = self.installed()
        return stamp.get("project") != self.fingerprint() or not extras <= extras_of(stamp)

    def fingerprint(self) -> str:
        """Changes when what is to be installed may have changed."""
        content = (ROOT / "pyproject.toml").read_bytes() + repr(self.overrides).encode()
        return hashlib.sha256(content).hexdigest()

    def provide(self, *extras: str) -> None:
        """Install the project with `extras` unless that is done; of several runs at once one does it."""
        wanted = set(extras)
        if not self.lacks(wanted):
            return
        with locked(self.path.with_name(self.path.name + ".lock")):
            if self.lacks(wanted):
                self.install(wanted | extras_of(self.installed()))

    def install(self, extras: set[str]) -> None:
        began = time.monotonic()
        target = f".[{','.join(sorted(extras))}]"
        say(f"installing {target} for Python {self.version} into {self.path} (once)")
        if not self.installed():
            self.create()
        self.stamp.unlink(missing_ok=True)  # from here to the end the environment is nothing to rely on
        self.pip("install", "--editable", target)
        for requirement in self.overrides:
            self.pip("install", "--no-deps", requirement)
        stamp = {
            "root": str(ROOT),
            "path": str(self.path),
            "project": self.fingerprint(),
            "extras": sorted(extras),
        }
        draft = self.stamp.with_suffix(".new")
        draft.write_text(json.dumps(stamp, indent=1))
        draft.replace(self.stamp)
        say(f"installed in {time.monotonic() - began:.0f} s")

    def create(self) -> None:
        """A new, empty environment with pip in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        venv = [self.python, "-m", "venv", str(self.path)]
        if succeeds([self.python, "-c", "import ensurepip"]):
            must_succeed(venv, "cannot create a virtual environment")
            return
        # Debian and its descendants keep ensurepip in a package of its own; another pip will do.
        if not succeeds([self.python, "-m", "pip", "--version"]):
            raise SetupError(
                f"{self.python} has neither venv's ensurepip nor pip; install one of them first, "
                "on Debian and Ubuntu: apt-get install python3-venv"
            )
        must_succeed([*venv, "--without-pip"], "cannot create a virtual environment")
        seed = [self.python, "-m", "pip", "--python", str(self.executable), "install", "--quiet", "pip"]
        must_succeed(seed, "cannot install pip into the virtual environment")

    def pip(self, *arguments: str) -> None:
        """Run pip quietly; when it fails, all it said is shown."""
        options = ("--quiet", "--disable-pip-version-check", "--no-input", "--no-compile")
        command = [str(self.executable), "-m", "pip", arguments[0], *options, *arguments[1:]]
        must_succeed(command, "installing failed", self.variables())

    def run(self, *arguments: str) -> int:
        """Run a program of this environment at the root of the checkout; its exit code."""
        return run([str(self.path / "bin" / arguments[0]), *arguments[1:]], self.variables())


def extras_of(stamp: dict[str, object]) -> set[str]:
    extras = stamp.get("extras", [])
    return set(extras) if isinstance(extras, list) else set()


def python_version(python: str) -> str:
    """Such as "3.11.7"; raises SetupError when `python` does not run."""
    question = [python, "-c", "import sys; print('.'.join(map(str, sys.version_info[:3])))"]
    with contextlib.suppress(OSError):
        answer = subprocess.run(question, capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            return answer.stdout.strip()
    raise SetupError(f"{python} does not run")


def find_python(minor: str) -> str | None:
    """A Python of this version: on the PATH, or made by pyenv and not chosen."""
    candidates = [shutil.which(f"python{minor}")]
    with contextlib.suppress(RuntimeError):  # no home directory
        made = Path("~/.pyenv/versions").expanduser().glob(f"{minor}.*/bin/python")
        candidates += sorted(map(str, made))
    # pyenv also puts a placeholder on the PATH, which does not run
    return next((path for path in candidates if path and succeeds([path, "--version"])), None)


# Running things -------------------------------------------------------------------------------


def say(text: str) -> None:
    print(f"run.py: {text}", file=sys.stderr, flush=True)


def succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def must_succeed(command: list[str], complaint: str, variables: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, cwd=ROOT, env=variables, text=True, check=False, capture_output=True)
    if done.returncode:
        raise SetupError(f"{complaint}:\n{done.stdout}{done.stderr}".rstrip())


def run(command: list[str], variables: dict[str, str]) -> int:
    """Run to the end in the foreground; a request to stop reaches the child, which cleans up."""
    child: subprocess.Popen[bytes] | None = None

    def stop(number: int, _frame: object) -> None:
        # The terminal sends Ctrl-C to the child as well; SIGTERM comes to us alone.
        if child is not None and number == signal.SIGTERM:
            child.send_signal(number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        child = subprocess.Popen(command, cwd=ROOT, env=variables)
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return code if code >= 0 else 128 - code


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` as a lock file; the system lets go of it when this process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another run is installing; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# The verbs ------------------------------------------------------------------------------------

Verb = Callable[[list[str]], int]
VERBS: dict[str, Verb] = {}


def verb(function: Verb) -> Verb:
    VERBS[function.__name__.replace("_", "-")] = function
    return function


def environment(*extras: str) -> Environment:
    env = Environment(state_directory(), sys.executable)
    env.provide(*extras)
    return env


def provide_chromium() -> None:
    provide_program("chromium", CHROMIUMS, "the tests in a browser")


def provide_pgbouncer() -> None:
    provide_program("pgbouncer", ("pgbouncer", "/usr/sbin/pgbouncer"), "the tests behind a pooler")


def provide_program(package: str, names: tuple[str, ...], wanted_by: str) -> None:
    """For tests; where it cannot be installed they are skipped, and say so."""
    if any(map(shutil.which, names)) or os.geteuid() != 0 or not shutil.which("apt-get"):
        return
    say(f"installing {package} for {wanted_by} (once)")
    # RUNLEVEL: a package that brings a server is not to start it.
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "-qq"]
    quiet += ["-o", "DPkg::Lock::Timeout=120"]
    install = [*quiet, "install", "--yes", "--no-install-recommends", package]
    # The second try is for an image that comes without lists of packages.
    if not succeeds(install) and not (succeeds([*quiet, "update"]) and succeeds(install)):
        say(f"{package} could not be installed; {wanted_by} will be skipped")


def pytest(env: Environment, *arguments: str) -> int:
    provide_chromium()
    provide_pgbouncer()
    return env.run("python", "-m", "pytest", "-o", f"cache_dir={env.cache / 'pytest'}", *arguments)


@verb
def demo(arguments: list[str]) -> int:
    """partition a real table on a primary with a standby, and say what happens"""
    return environment("demo").run("python", "example/demo.py", *arguments)


@verb
def test(arguments: list[str]) -> int:
    """the tests (less the slow ones), against PostgreSQL servers of their own"""
    return pytest(environment("test"), "-m", "not slow", *arguments)


@verb
def test_slow(arguments: list[str]) -> int:
    """the tests that take minutes"""
    return pytest(environment("test"), "-m", "slow", *arguments)


@verb
def test_django61(arguments: list[str]) -> int:
    """the tests on Django 6.1, against django-postgres-extra's pin; on Python 3.13 if there is one"""
    python = find_python("3.13") or sys.executable
    env = Environment(state_directory(), python, variant="-django61", overrides=("Django>=6.1,<6.2",))
    env.provide("test")
    return pytest(env, "-m", "not slow", *arguments)


@verb
def lint(_arguments: list[str]) -> int:
    """ruff, mypy and the import contracts"""
    env = environment("lint", "test")
    paths = [path for path in LINTED if (ROOT / path).exists()]
    codes = [
        env.run("ruff", "check", *paths),
        env.run("ruff", "format", "--check", *paths),
        env.run("mypy", "src", "run.py"),
        env.run("lint-imports", "--cache-dir", str(env.cache / "import-linter")),
    ]
    return max(codes)


@verb
def docs(arguments: list[str]) -> int:
    """the documentation, as HTML; a warning is an error"""
    if not (ROOT / "docs" / "conf.py").exists():
        say("docs: skipped, there is no docs/conf.py")
        return 0
    env = environment("docs", "demo")  # autodoc imports the package, and that a driver
    output = env.cache.parent / "docs-html"
    code = env.run("python", "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(output), *arguments)
    if code == 0:
        say(f"docs: {output / 'index.html'}")
    return code


@verb
def bench(arguments: list[str]) -> int:
    """the benchmarks: all of them, or benchmarks/NAME.py with its arguments"""
    env = environment("test")
    if arguments:
        return env.run("python", f"benchmarks/{arguments[0].removesuffix('.py')}.py", *arguments[1:])
    scripts = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if not path.name.startswith("_"))
    return max((env.run("python", str(script)) for script in scripts), default=0)


@verb
def ci(_arguments: list[str]) -> int:
    """lint, docs and test: all three, whatever the others said"""
    codes = {}
    for name in ("lint", "docs", "test"):
        say(f"--- {name}")
        codes[name] = VERBS[name]([])
    say(", ".join(f"{name} {'ok' if code == 0 else f'FAILED ({code})'}" for name, code in codes.items()))
    return max(codes.values())


def usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {function.__doc__}" for name, function in VERBS.items()]
    return "\n".join([__doc__.rstrip() if __doc__ else "", "", "Verbs:", *lines])


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if not arguments or arguments[0] not in VERBS:
        say(f"unknown verb {arguments[0]!r}" if arguments else "which verb?")
        print(usage(), file=sys.stderr)
        return 2
    os.umask(0o022)  # PostgreSQL refuses to run as root, and its other user must be able to read
    try:
        return VERBS[arguments[0]](arguments[1:])
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
