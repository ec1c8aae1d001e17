"""Archive, drop, restore: what comes back is what was there, and nothing is dropped that is not safe."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tests import archives
from tests.archives import Everything, Rows, bring_back, done, rotate, utc
from tests.lab import Lab

NOW = utc(2026, 5, 17, 13, 7, 11)
MARCH = "lab_everything_y2025m03"


@pytest.fixture(params=["file system", "memory"])
def storage(request: pytest.FixtureRequest, settings: Any, tmp_path: Path) -> None:
    archives.use_storage(settings, tmp_path / "archive" if request.param == "file system" else None)


def test_every_column_type_survives_the_round_trip(lab: Lab, storage: None) -> None:
    count = archives.make_everything(lab, NOW)
    before = Rows(lab, "lab_everything")
    assert before.count == count
    assert done(rotate(Everything, now=NOW)) == [f"detach {MARCH}", f"archive {MARCH}"]
    assert rotate(Everything, now=NOW).is_empty
    assert done(rotate(Everything, now=NOW + timedelta(days=2))) == [f"drop {MARCH}"]
    assert MARCH not in lab.tables()
    assert lab.value("SELECT count(*) FROM lab_everything") == 0

    assert done(bring_back(Everything, MARCH, now=NOW)) == [f"restore {MARCH}"]
    assert before.differences() == []
    assert MARCH in lab.bounds("lab_everything")
    assert rotate(Everything, now=NOW).is_empty
