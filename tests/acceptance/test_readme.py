"""The README says what is so: its commands, its model, its SQL."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.project import Project

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def statements(text):
    """Comments and SQL without what differs from run to run: days, names made of them, line breaks."""
    text = re.sub(r"\n--   ", " ", text)
    text = re.sub(r"\d{4}-\d\d-\d\d(?=[T .)]|$)", "DAY", text)
    text = re.sub(r"_y\d{4}(m\d\d)?", "_PERIOD", text)
    return re.sub(r"\s+", "", text).split(";")


def test_the_first_two_commands_are_the_demo_and_the_tests():
    assert blocks("console")[:2] == ["$ python3 run.py demo\n", "$ python3 run.py test\n"]


def test_local_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.fixture(scope="module")
def shop(server, tmp_path_factory):
    """A project with the README's model, migrated."""
    project = Project(tmp_path_factory.mktemp("readme"), server, "readme")
    project.models(next(block for block in blocks("python") if "PartitionedModel" in block))
    assert "Create partitioned model Order" in project.manage("makemigrations", "shop")
    project.manage("migrate")
    return project


def test_the_model_takes_rows_at_once_and_has_no_drift(shop):
    assert "No changes detected" in shop.manage("makemigrations", "--check")
    shop.run(
        """
        from django.utils import timezone
        customer = Customer.objects.create(email="a@example.com")
        order = Order.objects.create(customer=customer, total=1, placed_at=timezone.now())
        order.refresh_from_db()
        """
    )
    assert shop.query("SELECT count(*) FROM shop_order") == [(1,)]


def test_the_cron_line_has_nothing_to_do_and_nothing_to_say(shop):
    command = re.search(r"manage\.py (rotate_partitions.*)", blocks("crontab")[0])[1]
    assert shop.manage(*command.split()) == ""


def test_the_sql_is_what_a_dry_run_prints(shop):
    today = datetime.now(UTC).date()
    create, detach, drop = (statements(block) for block in blocks("sql"))

    def rotate(days, *arguments):
        return shop.manage("rotate_partitions", "--now", str(today + timedelta(days=days)), *arguments)

    next_month = 32 - today.day
    assert statements(rotate(next_month, "--dry-run", "--no-retention")) == create

    long_ago = str(today - timedelta(days=8 * 366))
    shop.manage("create_partitions", "--from", long_ago, "--to", long_ago)
    assert statements(rotate(0, "--dry-run", "--no-create")) == detach

    assert "detached" in rotate(0, "--no-create")
    assert "nothing to do" in rotate(6, "--dry-run", "--no-create")
    assert statements(rotate(8, "--dry-run", "--no-create")) == drop
    assert "dropped" in rotate(8, "--no-create")


def test_what_is_said_of_defaults_and_checks(shop):
    shop.manage("check", "--database", "default")
    shop.manage("show_partitions", "--check")
    help_text = shop.manage("rotate_partitions", "--help")
    assert 'SCALEDB["DDL_DEADLINE"], else 30' in " ".join(help_text.split())
