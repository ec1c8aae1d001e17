"""Errors of the test cluster; kept apart from `django_scaledb.exceptions`, which imports Django."""


class ClusterError(Exception):
    """The PostgreSQL cluster could not do what was asked."""


class PostgresNotFound(ClusterError):
    """No PostgreSQL server was found on this machine."""

    @property
    def reason(self) -> str:
        """What was tried, in one line, without the advice."""
        return " ".join(line.strip() for line in str(self).partition("\nInstall ")[0].splitlines())
