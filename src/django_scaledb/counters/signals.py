"""What receivers are told."""

from django.dispatch import Signal

counters_changed = Signal()
"""Sent once a transaction that changed a counter (mechanism "signals") has been committed.

``sender`` is the CounterModel's class, ``using`` the database alias, ``changes`` a list of
``(key, deltas)``: two dictionaries, the raw key's values by column name (as PostgreSQL's text, None
for NULL) and the non-zero amounts by total. A key that goes over a foreign key (``project__owner``)
is told as the row's own foreign key (``{"owner": "<pk of the project>"}``).

Receivers run after the commit and robustly: one that raises is logged and undoes nothing.
"""
