"""Archives in a storage of Django's, of which nothing but save, open, size, exists and delete is asked."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO

from django.core.exceptions import ImproperlyConfigured
from django.core.files import File
from django.core.files.base import ContentFile
from django.core.files.storage import Storage, storages

from django_scaledb.conf import settings
from django_scaledb.exceptions import ArchiveError, ConfigurationError

_CHUNK = 1 << 20


def find(alias: str | None = None) -> Storage:
    """The storage `alias` of ``STORAGES``, else that of the setting; raises `ConfigurationError`."""
    alias = alias or settings.ARCHIVE_STORAGE
    try:
        return storages[alias]
    except ImproperlyConfigured as error:
        raise ConfigurationError(
            f'the archive\'s storage {alias!r} cannot be used: {error}; set SCALEDB["ARCHIVE_STORAGE"] to '
            "an alias of STORAGES"
        ) from error


def save(storage: Storage, name: str, content: IO[bytes] | bytes) -> str:
    """Store `content`, on the disk where there is one; the name that the storage gave it."""
    file = ContentFile(content) if isinstance(content, bytes) else File(content)
    kept = storage.save(name, file)
    try:
        path = storage.path(kept)
    except NotImplementedError:
        return kept
    for place in (path, os.path.dirname(path)):
        with suppress(FileNotFoundError):  # a storage in memory has paths, and no files
            number = os.open(place, os.O_RDONLY)
            try:
                os.fsync(number)
            finally:
                os.close(number)
    return kept


@contextmanager
def fetched(storage: Storage, name: str) -> Iterator[tuple[IO[bytes], int, str]]:
    """A local copy of `name`, which can be read from anywhere; its size, its SHA-256 in hex."""
    digest, size = hashlib.sha256(), 0
    with tempfile.TemporaryFile() as local:
        with storage.open(name, "rb") as remote:
            while chunk := remote.read(_CHUNK):
                digest.update(chunk)
                size += len(chunk)
                local.write(chunk)
        local.seek(0)
        yield local, size, digest.hexdigest()


def read(storage: Storage, name: str) -> bytes:
    with storage.open(name, "rb") as file:
        content: bytes = file.read()
        return content


def require(storage: Storage, name: str, size: int | None = None) -> None:
    """Raises `ArchiveError` unless the file is there, and has that many bytes."""
    if not storage.exists(name):
        raise ArchiveError(f"{name} is not in the archive's storage any more")
    if size is not None and (found := storage.size(name)) != size:
        raise ArchiveError(f"{name} has {found} bytes in the archive's storage, and was written with {size}")


def remove(storage: Storage, name: str) -> None:
    """Delete what a run that died has left, if it has."""
    with suppress(FileNotFoundError):
        storage.delete(name)
