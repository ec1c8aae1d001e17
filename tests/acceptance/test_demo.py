"""The example and its demo, as a stranger runs them."""

import gzip
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "example"
DEMO = EXAMPLE / "demo.py"
ROWS = 152_580


def environment(**more):
    """No variable that would lead Django to the settings of these tests."""
    return {name: value for name, value in os.environ.items() if name != "DJANGO_SETTINGS_MODULE"} | more


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the demo prints; it needs no terminal, no input and no certain working directory."""
    done = subprocess.run(
        [sys.executable, DEMO],
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def section(printed, title):
    """The text below a heading, on one line per paragraph or program line."""
    _, _, after = printed.partition(f". {title}\n")
    assert after, f"no section {title!r} in:\n{printed}"
    return re.split(r"\n\n\d+\. ", after)[0]


def number(pattern, text):
    found = re.search(pattern, " ".join(text.split()))
    assert found, f"no {pattern!r} in:\n{text}"
    return int(found[1].replace(",", ""))


def test_the_sections_are_numbered_from_one(printed):
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", printed, re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) > 8


def test_each_year_has_its_partition_and_its_rows(printed):
    text = section(printed, "The partition set")
    partitions = re.findall(r"public\.pypi_upload_y(\d+) +(\d+)-01-01 +(\d+)-01-01 +~?([\d,?]+)", text)
    years = [int(year) for year, *_ in partitions]
    assert years[:22] == list(range(2005, 2027))
    assert all(int(lower) == int(year) == int(upper) - 1 for year, lower, upper, _ in partitions)
    assert sum(int(rows.replace(",", "")) for *_, rows in partitions if rows != "?") == ROWS


def test_the_pruned_question_reads_one_partition_and_the_other_all(printed):
    text = section(printed, "The same question, asked twice")
    pruned, unpruned = text.split(".filter(uploaded_at__date__range")
    assert re.findall(r"on (pypi_upload_y\d+)", pruned) == ["pypi_upload_y2019"]
    assert number(r"first way reads (\d+) partition ", unpruned) == 1
    assert number(r"the second (\d+) in", unpruned) >= 22
    assert number(r": (\d+) times as long", unpruned) >= 2


def test_the_standby_has_every_row(printed):
    text = section(printed, "The standby has it all")
    assert number(r'"default"\)\.count\(\) -> ([\d,]+)', text) == ROWS
    assert number(r'"replica1"\)\.count\(\) -> ([\d,]+)', text) == ROWS


def test_rotation_makes_a_year_ahead_and_nobody_waits_for_it(printed):
    text = section(printed, "A year later: rotation")
    dry_run, run = text.split("$ manage.py rotate_partitions")[1:]
    assert "--dry-run" in dry_run
    assert "-- locks: SHARE UPDATE EXCLUSIVE on public.pypi_upload\n" in dry_run
    assert "ACCESS EXCLUSIVE" not in dry_run.replace("SHARE UPDATE EXCLUSIVE", "")
    assert "pypi.Upload: created public.pypi_upload_y" in run
    assert number(r"slowest after (\d+) ms", run) < 1000


def test_retention_detaches_and_keeps_the_rows(printed):
    text = section(printed, "A year later: retention")
    detached = re.findall(r"pypi.Upload: detached public\.pypi_upload_y(\d+)", text)
    assert detached[0] == "2005"
    assert number(r"(\d+) partitions are detached", text) == len(detached)
    kept = number(r"still with their ([\d,]+) rows", text)
    assert number(rf"from {ROWS:,} to ([\d,]+) rows", text) == ROWS - kept


def test_a_row_without_a_partition_says_what_to_do(printed):
    text = " ".join(section(printed, "When a partition is missing").split())
    assert "no partition of pypi.Upload takes uploaded_at = 1999-12-31" in text
    assert "manage.py create_partitions pypi.Upload --from 1999-12-31 --to 1999-12-31" in text


def read_until(stream, text, seconds):
    """What `stream` brings up to `text`, without waiting longer than that."""
    printed, deadline = "", time.monotonic() + seconds
    while text not in printed:
        assert select.select([stream], [], [], max(0, deadline - time.monotonic()))[0], printed
        line = os.read(stream.fileno(), 65536).decode()
        assert line, printed
        printed += line
    return printed


def test_keep_says_how_to_connect_and_a_signal_cleans_up():
    with subprocess.Popen(
        [sys.executable, DEMO, "--keep"], env=environment(), stdout=subprocess.PIPE
    ) as demo:
        try:
            printed = read_until(demo.stdout, 'psql "$PYPI_MIRROR_PRIMARY"', 300)
            lines = [line.strip() for line in printed.splitlines()]
            script = [line for line in lines if line.startswith("export ") or "manage.py show_part" in line][
                -3:
            ]
            done = subprocess.run(
                ["sh", "-c", "\n".join(script)],
                env=environment(),
                capture_output=True,
                text=True,
                check=False,
            )
            assert "public.pypi_upload_y2026" in done.stdout, done.stderr
            sockets = re.search(r"PYPI_MIRROR_PRIMARY='host=(\S+)", printed)[1]
            assert Path(sockets).is_dir()
        finally:
            demo.send_signal(signal.SIGINT)
            demo.wait(30)
    assert demo.returncode == 130
    assert not Path(sockets).exists()


def test_loading_twice_does_not_double_a_row(scaledb_cluster, tmp_path):
    with gzip.open(EXAMPLE / "data" / "pypi_uploads.csv.gz", "rt") as file:
        lines = file.readlines()
    sample = tmp_path / "sample.csv.gz"
    with gzip.open(sample, "wt") as file:
        file.writelines([lines[0], *lines[1::100]])
    rows = len(lines[1::100])
    scaledb_cluster.create_database("example")
    settings = environment(PYPI_MIRROR_PRIMARY=scaledb_cluster.primary.conninfo(dbname="example"))

    def manage(*arguments):
        done = subprocess.run(
            [sys.executable, EXAMPLE / "manage.py", *arguments],
            env=settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "No changes detected" in manage("makemigrations", "--check")
    manage("migrate")
    manage("create_partitions", "--from", "2005-01-01", "--to", "2026-12-31")
    assert f"{rows:,} rows" in manage("load_uploads", str(sample))
    assert f"{rows:,} rows" in manage("load_uploads", str(sample))
    # The admin lists and opens what is there.
    opened = manage(
        "shell",
        "-c",
        "from django.test import Client; from django.contrib.auth.models import User\n"
        "from pypi.models import Upload\n"
        "client = Client(); client.force_login(User.objects.create_superuser('admin'))\n"
        "upload = Upload.objects.select_related('project').latest('uploaded_at')\n"
        "for page in ('', '?uploaded_at__year=2019', f'{upload.pk}/change/'):\n"
        "    print(client.get(f'/admin/pypi/upload/{page}', headers={'host': 'localhost'}).status_code)\n",
    )
    assert opened.split()[-3:] == ["200", "200", "200"]


def test_a_writer_reads_its_own_write_and_later_from_the_replica(printed):
    text = section(printed, "Read your own writes")
    assert "read at once from default" in text
    assert "later, read from replica1" in text


def test_no_read_fails_when_the_replica_dies(printed):
    text = section(printed, "The replica dies while a loop reads")
    assert number(r"the replica was killed: (\d+) from default", text) > 0
    assert "; 0 failed" in text
    assert "it is back, and was used again" in text


def test_the_counter_is_exact_and_follows_the_retention(printed):
    text = section(printed, "Counts that are read, not counted")
    assert "equals the GROUP BY of the table" in " ".join(text.split())
    assert "pypi_counters.ProjectUploads: exact" in section(printed, "A year later: retention")
