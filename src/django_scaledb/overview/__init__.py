"""The overview page in the Django admin: what `partitions`, `routing` and `counters` know, on one page."""
