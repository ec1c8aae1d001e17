"""The documentation's commands and code do what the pages say, and the reference is complete.

A page is run from top to bottom in an empty project. What counts is the kind of a fenced block:

``{code-block} python`` with a caption that is a path
    is written to that file (settings are appended to).
``console``
    the lines with ``$ `` are run, and what follows each is what it must print.
``pycon``
    is a doctest in the project's shell.
``sql``
    is sent to the database.
``python`` without a caption
    must compile.

``...`` in an expected output stands for anything. Dates are written as of `AS_OF` and moved by whole
months to the day of the test. ``python -m tests.acceptance.test_docs how-to/retention.md`` writes what the
commands print now into a page.
"""

from __future__ import annotations

import argparse
import ast
import doctest
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest

from django_scaledb.testing import Cluster
from tests.project import Project

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
AS_OF = (2026, 11)
NUMBERS = count(1)
NOT_RUN = ("python3 -m venv", ". venv/bin", "python -m pip", "mkdir ", "cd ")
LENIENT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

BLOCK = re.compile(r"^(?P<fence>```+)(?P<info>[^\n]+)\n(?P<body>.*?)^(?P=fence)[ ]*$", re.M | re.S)


# -- reading a page


@dataclass(frozen=True)
class Block:
    kind: str
    body: str
    caption: str = ""
    span: tuple[int, int] = (0, 0)


@dataclass
class Command:
    """A line with ``$ `` and what the page says that it prints."""

    text: str
    expected: str


def blocks(text: str) -> Iterator[Block]:
    for match in BLOCK.finditer(text):
        info, body = match["info"].strip(), match["body"]
        caption = ""
        if info.startswith("{code-block}"):
            info = info.removeprefix("{code-block}").strip()
            if found := re.match(r"((?::[\w-]+:[^\n]*\n)+)\n?", body):
                caption = (re.search(r":caption: *(.*)", found[1]) or ["", ""])[1]
                body = body[found.end() :]
        yield Block(info, body, caption, match.span("body"))


def commands(body: str) -> list[Command]:
    found: list[Command] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            found.append(Command(line[2:], ""))
        elif found and found[-1].text.endswith("\\"):
            found[-1].text = found[-1].text[:-1].rstrip() + " " + line.strip()
        else:
            assert found, f"no command before {line!r}"
            found[-1].expected += line + "\n"
    return found


def moved(text: str, months: int) -> str:
    """`text` with its dates some months later; years before 2020 stay."""

    def shift(match: re.Match[str]) -> str:
        year, month = divmod(int(match["year"]) * 12 + int(match["month"]) - 1 + months, 12)
        return f"{match['lead']}{year:04}{match['between']}{month + 1:02}"

    def shift_code(match: re.Match[str]) -> str:
        year, month = divmod(int(match[1]) * 12 + int(match[2]) - 1 + months, 12)
        return f"{year:04}, {month + 1}, "

    pattern = r"(?P<lead>\by|_y|\b)(?P<year>20[2-9]\d)(?P<between>-|m)(?P<month>[01]\d)(?=\D|$)"
    text = re.sub(r"\b(20[2-9]\d), (\d\d?), (?=\d)", shift_code, text)
    return re.sub(pattern, shift, text)


def months_since() -> int:
    now = datetime.now(UTC)
    return (now.year - AS_OF[0]) * 12 + now.month - AS_OF[1]


def plain(output: str) -> str:
    """What a machine, its PostgreSQL and the moment of autovacuum decide, taken out."""
    output = re.sub(r" (\?|~[\d,]+)(?=  +[\d.]+ [KM]?B)", " ?", output)
    output = re.sub(r"[\d.]+ ([KM]B|bytes)\b", "0 KB", output)
    output = re.sub(r"pid \d+|pg_terminate_backend\(\d+\)", "pid 0", output)
    output = re.sub(r"_[0-9a-f]{8}_", "_00000000_", output)
    output = re.sub(r"\b\d\d:\d\d:\d\d\.\d+", "00:00:00.0", output)
    return "\n".join(line.rstrip() for line in output.strip().splitlines())


def matches(expected: str, got: str) -> bool:
    if not expected.strip():
        return True
    checker = doctest.OutputChecker()
    return checker.check_output(plain(expected) + "\n", plain(got) + "\n", LENIENT)


# -- running a page

# Commands that follow one another without a change of the code run in one process, which saves
# most of the time. Reads [[kind, text], ..], prints [output, ..].
RUNNER = """
import contextlib, doctest, importlib, io, json, shlex, sys
import django
from django.apps import apps
from django.core.management import ManagementUtility
from django.db import connections, transaction

steps = json.load(sys.stdin)
django.setup()
names = {model.__name__: model for model in apps.get_models()}
names["transaction"] = transaction
status, outputs = 0, []

def manage(text):
    importlib.invalidate_caches()
    try:
        ManagementUtility(["manage.py", *shlex.split(text)]).execute()
    except SystemExit as end:
        return end.code or 0
    return 0

def console(text):
    import doctest
    test = doctest.DocTestParser().get_doctest(text, names, "page", "page", 0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False)
    failed = runner.run(test, clear_globs=False).failed
    names.update(test.globs)
    return failed

def sql(text):
    with connections["default"].cursor() as cursor:
        for statement in text.split(";\\n"):
            if statement.strip():
                cursor.execute(statement, None)

for kind, text in steps:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        if text == "echo $?":
            print(status)
        else:
            status = {"console": manage, "pycon": console, "sql": sql}[kind](text)
    outputs.append([status, out.getvalue()])
json.dump(outputs, sys.__stdout__)
"""


class Page:
    """Runs a how-to page in a project of its own, and compares."""

    settings = "project_settings"

    def __init__(self, name: str, folder: Path) -> None:
        self.path = DOCS / name
        self.folder = folder
        self.months = months_since()
        self.pending: list[tuple[str, str, str]] = []
        self.outputs: dict[str, str] = {}
        self.problems: list[str] = []

    def run(self) -> None:
        for block in blocks(self.path.read_text()):
            body = moved(block.body, self.months)
            if block.caption.endswith(".py"):
                self.flush()
                self.write(block.caption, body)
            elif block.kind == "python":
                ast.parse(textwrap.dedent(body))
            elif block.kind == "console":
                for command in commands(body):
                    text = command.text.removeprefix("python manage.py ")
                    if text.startswith("startapp") or command.text == text != "echo $?":
                        self.flush()
                        self.shell(command)
                    else:
                        self.pending.append(("console", text, command.expected))
            elif block.kind in ("pycon", "sql"):
                self.pending.append((block.kind, body, ""))
        self.flush()

    def write(self, name: str, body: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "settings.py":
            settings = self.folder / "project_settings.py"
            before = settings.read_text()
            if "INSTALLED_APPS +=" in body:
                before = before.replace('"django_scaledb", ', "")
            settings.write_text(before + body)
        else:
            path.write_text(body)

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "DJANGO_SETTINGS_MODULE": self.settings,
            "PYTHONPATH": f"{self.folder}{os.pathsep}{ROOT / 'src'}",
            "PYTHONDONTWRITEBYTECODE": "1",  # files change within one second
        }

    def flush(self) -> None:
        steps, self.pending = self.pending, []
        if not steps:
            return
        done = subprocess.run(
            [sys.executable, "-c", RUNNER],
            input=json.dumps([step[:2] for step in steps]),
            cwd=self.folder,
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, f"{self.path.name}: {steps}\n{done.stdout}{done.stderr}"
        for (kind, text, expected), (status, output) in zip(steps, json.loads(done.stdout), strict=True):
            if kind == "pycon" and status:
                self.problems.append(output)
            elif kind == "console":
                self.compare(text, expected, output)

    def shell(self, command: Command) -> None:
        done = subprocess.run(
            command.text,
            shell=True,
            cwd=self.folder,
            env=self.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
        )
        self.compare(command.text, command.expected, done.stdout)

    def compare(self, text: str, expected: str, output: str) -> None:
        self.outputs.setdefault(f"{len(self.outputs)} {text}", output)
        if "Traceback" in output:
            output = "Traceback " + "\n".join(output.splitlines()[-3:])
        if not matches(expected, output) or "Traceback" in output:
            self.problems.append(f"$ {text}\n--- the page says:\n{expected}--- it prints:\n{output}")


class Tutorial(Page):
    """As a reader would do it: from an empty folder, on the server that the page starts."""

    settings = "mysite.settings"

    def __init__(self, folder: Path) -> None:
        super().__init__("tutorial.md", folder)
        self.server: subprocess.Popen[bytes] | None = None
        self.databases = ""

    def run(self) -> None:
        try:
            super().run()
        finally:
            if self.server is not None:
                self.server.send_signal(signal.SIGINT)
                self.server.wait(20)

    def write(self, name: str, body: str) -> None:
        path = self.folder / name
        if name.endswith("settings.py"):
            body = re.sub(r"DATABASES = \{.*?\}\}", lambda _: self.databases, body, flags=re.S)
            body = path.read_text() + body
        path.write_text(body)

    def shell(self, command: Command) -> None:
        if "testing.cluster" in command.text:
            self.start_server(command)
        elif not command.text.startswith(NOT_RUN):
            super().shell(command)

    def start_server(self, command: Command) -> None:
        log = self.folder / "server.txt"
        with log.open("w") as file:
            self.server = subprocess.Popen(
                shlex.split(command.text), cwd=self.folder, env=self.environment(), stdout=file, stderr=file
            )
        deadline = time.monotonic() + 60
        while "Ctrl-C ends it." not in (said := log.read_text()):
            assert self.server.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.05)
        self.databases = "DATABASES = " + said.partition("DATABASES = ")[2].partition("\n\n")[0]
        self.compare(command.text, command.expected, said)


PSQLEXTRA = """
CREATE TABLE shop_customer (id bigint PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY,
    name varchar(50) NOT NULL);
CREATE TABLE shop_order (id bigint GENERATED BY DEFAULT AS IDENTITY, placed_at timestamptz NOT NULL,
    total integer NOT NULL, customer_id bigint NOT NULL,
    PRIMARY KEY (placed_at, id)) PARTITION BY RANGE (placed_at);
CREATE INDEX shop_order_customer_id_1 ON shop_order (customer_id);
ALTER TABLE shop_order ADD CONSTRAINT shop_order_customer_id_fk FOREIGN KEY (customer_id)
    REFERENCES shop_customer (id) DEFERRABLE INITIALLY DEFERRED;
CREATE TABLE shop_order_default PARTITION OF shop_order DEFAULT;
CREATE TABLE shop_order_2026_oct PARTITION OF shop_order FOR VALUES
    FROM ('2026-10-01 09:00+00') TO ('2026-11-01 09:00+00');
COMMENT ON TABLE shop_order_2026_oct IS 'psqlextra_auto_partitioned';
CREATE TABLE shop_order_2026_nov PARTITION OF shop_order FOR VALUES
    FROM ('2026-11-01 09:00+00') TO ('2026-12-01 09:00+00');
COMMENT ON TABLE shop_order_2026_nov IS 'psqlextra_auto_partitioned';
INSERT INTO shop_customer (name) VALUES ('first');
INSERT INTO shop_order (placed_at, total, customer_id) VALUES ('2026-11-03', 1, 1), ('2026-08-20', 2, 1);
CREATE TABLE django_migrations (id bigint PRIMARY KEY GENERATED BY DEFAULT AS IDENTITY,
    app varchar(255), name varchar(255), applied timestamptz);
INSERT INTO django_migrations (app, name, applied) VALUES ('shop', '0001_initial', now());
"""
"""What a project has when it comes from django-postgres-extra."""


def prepare_psqlextra(project: Project) -> None:
    import psycopg

    with psycopg.connect(project.node.conninfo(dbname=project.database)) as connection:
        connection.execute(moved(PSQLEXTRA, months_since()))


PREPARATIONS: dict[str, Callable[[Project], None]] = {"how-to/from-psqlextra.md": prepare_psqlextra}


def run_page(name: str, folder: Path, cluster: Cluster) -> Page:
    folder.mkdir(parents=True, exist_ok=True)
    if name == "tutorial.md":
        page: Page = Tutorial(folder)
    else:
        project = Project(folder, cluster, f"docs_{os.getpid()}_{next(NUMBERS)}")
        PREPARATIONS.get(name, lambda project: None)(project)
        page = Page(name, folder)
    page.run()
    return page


# -- the tests

PAGES = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md") if "_build" not in path.parts)
RUN = [
    "tutorial.md",
    "how-to/start-partitioning.md",
    "how-to/add-an-index.md",
    "how-to/rotate-from-cron.md",
    "how-to/choose-key-and-interval.md",
    "how-to/back-fill.md",
    "how-to/retention.md",
    "how-to/archive.md",
    "how-to/change-the-interval.md",
    "how-to/uuid7-keys.md",
    "how-to/default-partition.md",
    "how-to/from-psqlextra.md",
    "how-to/test-with-a-cluster.md",
    "how-to/overview-page.md",
    "how-to/find-unpruned-queries.md",
    "how-to/paginate.md",
    "how-to/drf.md",
]
"""Those that can be run as they stand."""


@pytest.mark.parametrize("name", RUN)
def test_a_page_does_what_it_says(name: str, tmp_path: Path, server: Cluster) -> None:
    page = run_page(name, tmp_path / "project", server)
    assert not page.problems, "\n".join(page.problems)


def test_every_check_is_documented() -> None:
    package = ROOT / "src" / "django_scaledb"
    source = "".join(path.read_text() for path in package.rglob("*.py"))
    ids = set(re.findall(r'id="django_scaledb\.([EW]\d+)"', source))
    page = (DOCS / "reference" / "checks.md").read_text()
    assert set(re.findall(r"^## django_scaledb\.([EW]\d+)", page, re.M)) == ids
    assert set(re.findall(r"^\(django_scaledb\.([EW]\d+)\)=$", page, re.M)) == ids


def test_every_setting_is_documented() -> None:
    from django_scaledb import conf

    page = "".join((DOCS / "reference" / name).read_text() for name in ("settings.md", "routing.md"))
    for key, entry in conf._KEYS.items():
        assert f"`{key}`" in page, key
        if isinstance(entry.default, int | float):
            assert re.search(rf"`{key}`[^\n]*`{entry.default}`", page), f"{key}: the default {entry.default}"


def test_every_attribute_and_error_is_documented() -> None:
    from django_scaledb import exceptions
    from django_scaledb.partitions import config

    page = (DOCS / "reference" / "models.md").read_text()
    for attribute in ("key", *config._KNOWN):
        assert f"`{attribute}`" in page, attribute
    for name, value in vars(exceptions).items():
        if isinstance(value, type) and issubclass(value, exceptions.ScaleDBError):
            assert f"`{name}`" in page, name


@pytest.mark.parametrize(
    "command", ["create_partitions", "rotate_partitions", "show_partitions", "restore_partition"]
)
def test_every_option_is_documented(command: str) -> None:
    from django.core.management import load_command_class

    page = (DOCS / "reference" / "commands.md").read_text()
    parser = load_command_class("django_scaledb", command).create_parser("manage.py", command)
    section = page.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    common = page.partition("\n## Options of all three\n")[2].partition("\n## ")[0]
    assert section, command
    django = {"--help", "--version", "--verbosity", "--settings", "--pythonpath", "--traceback"}
    django |= {"--no-color", "--force-color", "--skip-checks"}
    options = {o for action in parser._actions for o in action.option_strings if o.startswith("--")}
    for option in options - django:
        assert f"`{option}" in section + common, f"{command} {option}"
    for option in re.findall(r"^\| `(--[\w-]+)", section + common, re.M):
        assert option in options or option not in section, f"{command} has no {option}"


def keys_of(value: object) -> set[str]:
    if isinstance(value, dict):
        return set(value).union(*map(keys_of, value.values()))
    if isinstance(value, list):
        return set().union(*map(keys_of, value))
    return set()


def test_the_json_is_documented(tmp_path: Path, server: Cluster) -> None:
    folder = tmp_path / "project"
    Project(folder, server, f"docs_{os.getpid()}_{next(NUMBERS)}").models(
        """
        class Order(PartitionedModel):
            at = models.DateTimeField()

            class PartitioningMeta:
                key = ["at"]
        """
    )
    run = Page("reference/commands.md", folder)
    later = "--format json --now 2099-01-01"
    for text in ("makemigrations shop", "migrate -v 0", f"rotate_partitions {later} --dry-run"):
        run.pending.append(("console", text, ""))
    run.pending.append(("console", f"show_partitions {later}", ""))
    run.flush()
    rotated, shown = list(run.outputs.values())[-2:]
    page = (DOCS / "reference" / "commands.md").read_text()
    example = {
        heading: json.loads(next(b.body for b in blocks(section) if b.kind == "json"))
        for heading in ("JSON of create_partitions and rotate_partitions", "JSON of show_partitions")
        if (section := page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0])
    }
    for heading, output in zip(example, (rotated, shown), strict=True):
        assert keys_of(json.loads(output)) == keys_of(example[heading]), heading


def test_links_between_pages() -> None:
    """Every page is reachable: an index or a glob names it."""
    index = (DOCS / "index.md").read_text()
    for name in PAGES:
        folder = name.rpartition("/")[0]
        assert name == "index.md" or name.removesuffix(".md") in index or f"{folder}/*" in index, name


# -- writing outputs into a page


def update(name: str, folder: Path, cluster: Cluster) -> str:
    """The page's text with what its commands print now; outputs with ``...`` are left alone."""
    page = run_page(name, folder, cluster)
    assert not any("Traceback" in problem for problem in page.problems), "\n".join(page.problems)
    outputs = iter(page.outputs.items())
    text = page.path.read_text()
    replaced, position = [], 0
    for block in blocks(text):
        if block.kind != "console":
            continue
        lines = []
        for command in commands(block.body):
            lines.append(f"$ {command.text}")
            if command.text.startswith(NOT_RUN):
                continue
            _, output = next(outputs)
            keep = "..." in command.expected
            lines += (command.expected if keep else moved(output, -page.months)).rstrip().splitlines()
        begin, end = block.span
        if "\\\n" not in block.body:
            replaced += [text[position:begin], "\n".join(line.rstrip() for line in lines) + "\n"]
            position = end
    return "".join(replaced) + text[position:]


def main() -> None:
    import tempfile

    parser = argparse.ArgumentParser(description="Write what commands print now into pages below docs/.")
    parser.add_argument("pages", nargs="+")
    with Cluster(standbys=0) as cluster, tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(parser.parse_args().pages):
            text = update(name, Path(folder) / str(number), cluster)
            (DOCS / name).write_text(text)
            page = run_page(name, Path(folder) / f"{number}_again", cluster)
            sys.stdout.write(f"{name}: {len(page.problems)} problems\n" + "\n".join(page.problems) + "\n")


if __name__ == "__main__":
    main()
