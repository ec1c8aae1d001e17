"""The demo's section on counters: uploads and bytes per project, exact while rows come and go.

`show_counters(say, show)` runs in the demo's own process, with the history loaded. It needs the models
of the app ``pypi_counters`` (``INSTALLED_APPS``, ``migrate``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from django.core.management import call_command
from django.db import transaction
from django.db.models import Count, Sum

Say = Callable[[str], Any]


def show_counters(say: Say, show: Say) -> None:
    """Fill the counter, load and delete through it, compare it with GROUP BY, and time both reads."""
    from pypi.models import Project, Upload
    from pypi_counters.models import ProjectUploads

    began = time.perf_counter()
    call_command("rebuild_counters", "pypi_counters.ProjectUploads", verbosity=0)
    say(
        f"pypi_counters.ProjectUploads holds one row per project. Its first filling counted "
        f"{Upload.objects.count():,} uploads in "
        f"{(time.perf_counter() - began) * 1000:.0f} ms; nobody had to wait."
    )
    busiest = Project.objects.get(pk=ProjectUploads.objects.order_by("-total")[0].project_id)
    some = list(busiest.uploads.order_by("-uploaded_at")[:1000])
    with transaction.atomic():
        Upload.objects.filter(pk__in=[upload.pk for upload in some[:500]]).delete()
        show(
            f"in the transaction: for_key(project={busiest.name}).total = "
            f"{ProjectUploads.objects.for_key(project=busiest).total:,}"
        )
        transaction.set_rollback(True)
    for upload in some[:200]:
        upload.delete()
    Upload.objects.bulk_create(some[:200])
    require_exact()
    say(
        "500 uploads deleted and rolled back, 200 deleted one by one and created again at once: the counter "
        "equals the GROUP BY of the table, for every project."
    )
    counted = timed(lambda: Upload.objects.filter(project=busiest).count())
    read = timed(lambda: ProjectUploads.objects.for_key(project=busiest).total)
    show(f"COUNT(*) of {busiest.name}'s {counted[0]:,} uploads   {counted[1]:8.2f} ms")
    show(f"the counter's row                      {read[1]:8.2f} ms")
    total = timed(lambda: Upload.objects.aggregate(n=Count("*"), bytes=Sum("size"))["n"])
    every = timed(lambda: sum(row.total for row in ProjectUploads.objects.all()))
    show(f"COUNT(*) and SUM(size) of all {total[0]:,}   {total[1]:8.2f} ms")
    show(f"all rows of the counter, added up      {every[1]:8.2f} ms")


def require_exact() -> None:
    """Raise `AssertionError` unless every project's row is what its uploads come to."""
    from pypi.models import Upload
    from pypi_counters.models import ProjectUploads

    expected = {
        row["project"]: (row["n"], row["bytes"])
        for row in Upload.objects.values("project").annotate(n=Count("*"), bytes=Sum("size"))
    }
    found = {row.project_id: (row.total, row.bytes) for row in ProjectUploads.objects.filter(total__gt=0)}
    if expected != found:
        raise AssertionError("the counter is not what the table comes to")


def timed(read: Callable[[], Any], times: int = 9) -> tuple[Any, float]:
    """What `read` gives, and its median time in milliseconds."""
    taken, value = [], None
    for _ in range(times):
        began = time.perf_counter()
        value = read()
        taken.append((time.perf_counter() - began) * 1000)
    return value, median(taken)
