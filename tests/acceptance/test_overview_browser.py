"""The overview page in a real browser: the example's data, a real standby, a strict policy.

Needs Chromium on the PATH; ``python3 run.py test`` installs it where it may. The screenshots in docs/images
come from here, and are written anew when SCALEDB_SCREENSHOTS is set::

    SCALEDB_SCREENSHOTS=1 python3 run.py test tests/acceptance/test_overview_browser.py
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest

from django_scaledb.testing import Cluster

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
PAGE = "/admin/django_scaledb/overview/"
PREPARE = """
import django
django.setup()
from django.core.management import call_command as call
call("migrate", verbosity=0)
call("createsuperuser", interactive=False, username="ann", email="")
call("create_partitions", "--from", "2005-01-01", "--to", "2026-12-31", verbosity=0)
call("load_uploads")
call("rebuild_counters", verbosity=0)
call("check_counters", verbosity=0)
call("rotate_partitions", verbosity=0)
"""
SERVE = """
import os, sys, threading
from django.core.management import execute_from_command_line
# However the tests end, their end of the pipe is closed.
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
execute_from_command_line(["manage.py", "runserver", "--noreload", sys.argv[1]])
"""
DESKTOP, PHONE = {"width": 1180, "height": 900}, {"width": 375, "height": 740}


def chromium() -> str | None:
    """The path of a Chromium that starts; a package may be no more than a pointer to a snap."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        path = shutil.which(name)
        if path and subprocess.run([path, "--version"], capture_output=True, check=False).returncode == 0:
            return path
    return None


@dataclass
class Site:
    """The example, served by a process of its own."""

    cluster: Cluster
    port: int
    environment: dict[str, str]
    server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def prepare(self) -> None:
        """Everything in one process: starting Django takes longer than most of these commands."""
        done = subprocess.run(
            [sys.executable, "-c", PREPARE],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self, log: Path) -> None:
        with log.open("wb") as file:
            self.server = subprocess.Popen(
                [sys.executable, "-c", SERVE, f"127.0.0.1:{self.port}"],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=file,
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                with urlopen(self.url + "/admin/login/", timeout=10):
                    return
            except OSError:
                assert self.server.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Sizes stay as they are while they are compared.
    with Cluster(standbys=1, settings={"autovacuum": "off"}) as cluster:
        environment = {
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.browser_settings",
            "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "src", ROOT / "example"))),
            "PYPI_MIRROR_PRIMARY": cluster.primary.dsn,
            "PYPI_MIRROR_REPLICA": cluster.standbys[0].dsn,
            "DJANGO_SUPERUSER_PASSWORD": "secret",
        }
        found = Site(cluster, port, environment)
        found.prepare()
        with cluster.primary.connect() as session:
            newest = session.execute(
                "SELECT max(inhrelid::regclass::text) FROM pg_inherits "
                "WHERE inhparent = 'pypi_upload'::regclass AND inhrelid::regclass::text ~ '_y'"
            ).fetchone()
            assert newest is not None
            session.execute(f"DROP TABLE {newest[0]}")  # the runway is short
            session.execute("COMMENT ON TABLE pypi_upload_y2023 IS NULL")  # made by hand, for all we know
        cluster.wait_for_catchup()
        try:
            found.start(tmp_path_factory.mktemp("site") / "log.txt")
            yield found
        finally:
            if found.server is not None:
                found.server.kill()
                found.server.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = chromium()
    if path is None:
        pytest.skip("there is no Chromium that starts; on Debian: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path,
            args=[
                *(["--no-sandbox"] if os.geteuid() == 0 else []),
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page, and all that the browser said and asked for meanwhile."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def session(browser: Any, site: Site) -> Any:
    """The cookies of somebody who has logged in."""
    page = browser.new_page()
    page.goto(site.url + "/admin/login/")
    page.fill("#id_username", "ann")
    page.fill("#id_password", "secret")
    page.click("input[type=submit]")
    state = page.context.storage_state()
    page.context.close()
    return state


@pytest.fixture
def visit(browser: Any, site: Site, session: Any) -> Iterator[Callable[..., Visit]]:
    """Goes to the overview by the link in the admin's index, in a window of its own."""
    contexts = []

    def go(**options: Any) -> Visit:
        context = browser.new_context(**{"viewport": DESKTOP, "storage_state": session, **options})
        contexts.append(context)
        context.set_default_timeout(30_000)
        context.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('policy', e.violatedDirective))"
        )
        found = Visit(context.new_page())
        page = found.page
        page.on("request", lambda request: found.requests.append(request.url))
        page.on("requestfailed", lambda request: found.complaints.append(f"failed: {request.url}"))
        page.on("pageerror", lambda error: found.complaints.append(str(error)))
        page.on(
            "console",
            lambda said: found.complaints.append(said.text) if said.type in ("error", "warning") else None,
        )
        page.goto(site.url + "/admin/")
        page.locator("#content").get_by_role("link", name="Overview", exact=True).click()
        page.wait_for_url(f"**{PAGE}")
        return found

    yield go
    for context in contexts:
        context.close()


@pytest.fixture
def light(visit: Callable[..., Visit]) -> Visit:
    return visit()


def require_quiet(found: Visit, site: Site) -> None:
    assert found.complaints == []
    assert {urlsplit(url).netloc for url in found.requests} == {f"127.0.0.1:{site.port}"}


# -- the drawing and the catalog

CATALOG = """
    SELECT c.relname, c.relispartition, obj_description(c.oid, 'pg_class'),
        pg_total_relation_size(c.oid), substring(c.relname from 'y(....)$')::int
    FROM pg_class c WHERE c.relname ~ '^pypi_upload_y....$' AND c.relkind = 'r' ORDER BY c.relname
"""
BOXES = """elements => elements.map(e => {
    const box = e.getBoundingClientRect();
    return {title: e.textContent, classes: e.getAttribute('class'), left: box.left, top: box.top,
            width: box.width, height: box.height, right: box.right, bottom: box.bottom};
})"""


def test_bars_are_what_the_catalog_says(light: Visit, site: Site) -> None:
    with site.cluster.primary.connect() as session:
        rows = session.execute(CATALOG).fetchall()
        this_year = session.execute("SELECT extract(year FROM now() AT TIME ZONE 'UTC')::int").fetchone()[0]
    bars = light.page.locator("svg .scaledb-bar").evaluate_all(BOXES)
    strips = light.page.locator("svg.scaledb-timeline .scaledb-strip").evaluate_all(BOXES)
    assert len(bars) == len(rows) > 20
    assert len(strips) == len(rows) + 1, "and the hole ahead"
    peak = max(size for *_, size, _ in rows)
    base = max(bar["bottom"] for bar in bars)
    years = [year for *_, year in rows]
    left, right = min(strip["left"] for strip in strips), max(strip["right"] for strip in strips)

    def place(year: int) -> float:
        share = _days(min(years), year) / _days(min(years), max(years) + 2)
        return left + share * (right - left)

    states = set()
    for bar, strip, (name, is_attached, mark, size, year) in zip(bars, strips, rows, strict=False):
        assert bar["title"].splitlines()[0] == strip["title"].splitlines()[0] == f"public.{name}"
        state = "detached"
        if is_attached:
            state = "hand-made" if mark is None else "premade" if year > this_year else "attached"
        states.add(state)
        assert bar["classes"] == f"scaledb-bar scaledb-{state}", name
        assert strip["classes"] == f"scaledb-strip scaledb-{state}", name
        assert abs(bar["height"] - 120 * size / peak) < 0.5, name
        assert abs(bar["bottom"] - base) < 0.5, name
        for box in (bar, strip):
            assert abs(box["left"] - place(year)) < 1, name
            assert abs(box["right"] - place(year + 1)) < 1, name
    assert states == {"detached", "attached", "hand-made", "premade"}
    assert strips[-1]["classes"] == "scaledb-strip scaledb-gap"
    require_quiet(light, site)


def _days(first: int, last: int) -> int:
    from datetime import date

    return (date(last, 1, 1) - date(first, 1, 1)).days


def test_the_tables_have_the_same_facts(light: Visit, site: Site) -> None:
    page = light.page
    with site.cluster.primary.connect() as session:
        rows = session.execute(CATALOG).fetchall()
    page.get_by_text("Table of the partitions").click()
    table = page.get_by_role("table", name="Partitions of pypi.Upload")
    cells = table.locator("tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
    )
    assert [row[:3] for row in cells[: len(rows)]] == [
        [f"public.{name}", f"{year}-01-01", f"{year + 1}-01-01"] for name, *_, year in rows
    ]
    assert cells[-1][3] == "gap: no partition takes its rows"
    page.get_by_text("SQL of the next rotation").click()
    sql = page.locator(".scaledb-set pre").inner_text()
    assert 'ATTACH PARTITION "public"."pypi_upload_y' in sql
    assert "-- locks: SHARE UPDATE EXCLUSIVE on public.pypi_upload" in sql
    require_quiet(light, site)


def test_for_keyboards_and_screen_readers(light: Visit) -> None:
    page = light.page
    assert page.get_by_role("img", name="Partitions of pypi.Upload").is_visible()
    for name in ("Servers", "Counters", "Partitions"):
        assert page.locator("caption", has_text=name).count() >= 1
    assert page.locator("main h2").all_inner_texts() == [
        "Partition sets",
        "Replicas",
        "Counters",
        "Conversions",
    ]
    reached = set()
    page.locator("h1").click()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(
            page.evaluate("document.activeElement.tagName + ' ' + (document.activeElement.ariaLabel || '')")
        )
        if page.evaluate("document.activeElement.textContent") == "Table of the partitions":
            page.keyboard.press("Enter")
            break
    assert "DIV Partitions of pypi.Upload over time" in reached
    assert page.get_by_role("table", name="Partitions of pypi.Upload").is_visible()


# -- light and dark, wide and narrow


def colours(page: Any) -> tuple[str, str]:
    return page.evaluate(
        "[getComputedStyle(document.body).backgroundColor,"
        " getComputedStyle(document.querySelector('.scaledb-ground-attached')).fill]"
    )


def luminance(colour: str) -> float:
    channels = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(colour: str, other: str) -> float:
    darker, lighter = sorted((luminance(colour), luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def test_dark_is_the_admins_dark(light: Visit, visit: Callable[..., Visit], site: Site) -> None:
    dark = visit(color_scheme="dark")
    by_day, by_night = colours(light.page), colours(dark.page)
    assert luminance(by_day[0]) > 0.8
    assert luminance(by_night[0]) < 0.05
    assert contrast(*by_day) > 3
    assert contrast(*by_night) > 3
    light.page.locator(
        "button.theme-toggle"
    ).first.click()  # from auto, which is light here, to the other one
    light.page.wait_for_function("document.documentElement.dataset.theme === 'dark'")
    assert colours(light.page) == by_night
    require_quiet(dark, site)
    require_quiet(light, site)


def test_a_phone_needs_no_scrolling_sideways(visit: Callable[..., Visit], site: Site) -> None:
    found = visit(viewport=PHONE, is_mobile=True, has_touch=True)
    page = found.page
    for summary in page.locator("details summary").all():
        if summary.is_visible():
            summary.click()
    wide = page.evaluate("[document.documentElement.scrollWidth, document.documentElement.clientWidth]")
    assert wide == [PHONE["width"], PHONE["width"]]
    drawing = page.locator("svg.scaledb-timeline").bounding_box()
    assert drawing["width"] >= 300
    require_quiet(found, site)


# -- pictures for the documentation


def test_the_screenshots_of_the_documentation(
    light: Visit, visit: Callable[..., Visit], site: Site, tmp_path: Path
) -> None:
    folder = IMAGES if os.environ.get("SCALEDB_SCREENSHOTS") else tmp_path
    folder.mkdir(exist_ok=True)
    dark = visit(color_scheme="dark")
    for name, found in (("light", light), ("dark", dark)):
        path = folder / f"overview-{name}.png"
        found.page.locator("#content").screenshot(path=path, animations="disabled", caret="hide")
        assert 10_000 < path.stat().st_size < 200_000
        assert (IMAGES / path.name).exists(), "write it with SCALEDB_SCREENSHOTS=1"


# -- a replica that lags, then is gone


def cells_of(page: Any, alias: str) -> list[str]:
    row = page.get_by_role("row").filter(has=page.get_by_role("rowheader", name=alias, exact=True))
    return [" ".join(text.split()) for text in row.locator("th, td").all_inner_texts()]


def test_a_replica_that_lags_and_one_that_is_gone(light: Visit, site: Site) -> None:
    page, standby = light.page, site.cluster.standbys[0]
    assert cells_of(page, "default")[1:3] == ["primary", "ok"]
    assert cells_of(page, "replica1")[1:4] == ["replica", "ok", "0.0 s"]
    standby.pause_replay()
    try:
        site.cluster.primary.execute("CREATE TABLE touched ()")
        deadline = time.monotonic() + 30
        while True:
            page.reload()
            _, _, _, now, minute, *_ = cells_of(page, "replica1")
            if now != "0.0 s" and minute not in ("?", "0.0 s"):
                break
            assert time.monotonic() < deadline, (now, minute)
            time.sleep(0.5)
    finally:
        standby.resume_replay()
    site.cluster.wait_for_catchup()
    page.reload()
    _, _, state, now, minute, *_ = cells_of(page, "replica1")
    assert (state, now) == ("ok", "0.0 s")
    assert minute not in ("?", "0.0 s"), "it is remembered"
    assert page.locator(".scaledb-spark rect").count() > 0
    standby.stop()
    page.reload()
    assert cells_of(page, "replica1")[2].startswith("out")
    assert page.locator(".scaledb-bar").count() > 20
    require_quiet(light, site)
