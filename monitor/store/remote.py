"""The objects under a URL of S3, Google Cloud Storage or Azure, with errors that say what to do.

An object appears whole or not at all, by one PUT, and is read with its version, so that a manifest is replaced only by
whoever knows what it replaces. Each request is tried again for some seconds. What then still fails is the caller's to
repeat: every one of these requests may be repeated.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from monitor.errors import StoreError
from monitor.extras import require_extras

SCHEMES = ("s3://", "gs://", "az://", "file://")
_RETRIES = {"max_retries": 4, "retry_timeout": timedelta(seconds=20)}
_TIMEOUT_S = 30  # of one request, which carries at most `_CHUNK` bytes
_QUICK_S = 5.0  # a request that fails that soon is made again, beyond what the client does
_CHUNK = 5 << 20  # objects are read and written in parts of that size
_METADATA = ("http://169.254.", "http://metadata.google")  # asked where the environment has no credentials
_TOLD = 300  # characters of an error of the client


class RemoteError(StoreError):
    """The object store cannot be reached, or refuses. Asking again later may help."""


class RemoteMissing(RemoteError):
    """There is no such object."""


class RemoteChanged(RemoteError):
    """An object is not the one that was to be replaced."""


class RemoteDamaged(StoreError):
    """The bytes of an object are not those that its name says."""


class Remote:
    """The objects under a URL. Credentials and the endpoint come from the environment, as docs/store.md says.

    Raises StoreError for what is no such URL, and MissingPackageError without obstore. No server is asked yet.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith(SCHEMES):
            raise StoreError(f"{url!r} is no URL of an object store: expected {', '.join(SCHEMES)} and a path.")
        require_extras("A mirror", "cloud")
        import obstore
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        self.url, self._obs, self._error = url.rstrip("/"), obstore, BaseError
        local = url.startswith("file://")
        options: dict[str, Any] = {"mkdir": True} if local else {"retry_config": _RETRIES, "client_options": _client()}
        try:
            if local:
                os.makedirs(url.removeprefix("file://"), exist_ok=True)
            self._store = from_url(self.url, **options)
        except (BaseError, OSError, ValueError) as error:
            raise StoreError(f"{url!r} cannot be used as an object store: {_first_line(error)}.") from error
        self.requests = 0

    def put(self, path: str, data: bytes | Path, *, replaces: Mapping[str, Any] | str = "overwrite") -> dict[str, Any]:
        """Write an object; returns its version. Raises RemoteError.

        replaces: "overwrite" for whatever is there, "create" for nothing, or the version that it takes the place of;
        RemoteChanged is raised if something else is there, FileNotFoundError if the file at `data` is gone.
        """
        if isinstance(data, Path):
            data.stat()  # the client takes a missing file for a missing bucket
        try:
            if self.url.startswith("file://") and isinstance(replaces, Mapping):  # a folder knows no such condition
                found = self._call(path, self._obs.head, self._store, path)
                if found["e_tag"] != replaces.get("e_tag"):
                    raise RemoteChanged(f"{self.url}/{path} is another one by now.")
                replaces = "overwrite"
            kept = replaces if isinstance(replaces, str) else dict(replaces)
            made = self._call(path, self._obs.put, self._store, path, data, mode=kept)
        except RemoteMissing as error:
            if isinstance(replaces, str):
                raise RemoteError(f"{self.url} does not exist: make that bucket first ({error}).") from error
            raise RemoteChanged(f"{self.url}/{path} is gone.") from error
        return _version(made)

    def get(self, path: str) -> tuple[bytes, dict[str, Any]]:
        """The bytes of a small object and its version. Raises RemoteMissing and RemoteError."""

        def read() -> tuple[bytes, Any]:
            found = self._obs.get(self._store, path)
            return bytes(found.bytes()), found.meta

        data, meta = self._call(path, read)
        return data, _version(meta)

    def fetch(self, path: str, size: int, crc32: int, into: Path) -> None:
        """Copy an object of `size` bytes into a new durable file.

        Raises RemoteMissing, RemoteDamaged if size or CRC are others, RemoteError and OSError.
        """
        tmp = into.with_name(f"{into.name}.part")
        crc = 0
        try:
            with open(tmp, "wb") as file:
                for start in range(0, size, _CHUNK):
                    part = self._range(path, start, min(_CHUNK, size - start), size)
                    crc = zlib.crc32(part, crc)
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            if crc != crc32:
                raise RemoteDamaged(f"{self.url}/{path} has CRC-32 {crc:08x}, its name says {crc32:08x}.")
            os.rename(tmp, into)
        finally:
            tmp.unlink(missing_ok=True)

    def folder(self, path: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """({name: what the server says of the object}, names of the folders) directly under a path.

        Raises RemoteError.
        """
        try:
            found = self._call(path, self._obs.list_with_delimiter, self._store, path)
        except RemoteMissing as error:
            raise RemoteError(f"{self.url} does not exist, or may not be listed ({error}).") from error
        objects = {str(one["path"]).rpartition("/")[2]: dict(one) for one in found["objects"]}
        return objects, [str(prefix).rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"]]

    def delete(self, paths: list[str]) -> None:
        """Delete objects; those that are gone already are gone. Raises RemoteError."""
        for path in paths:
            try:
                self._call(path, self._obs.delete, self._store, path)
            except RemoteMissing:
                continue

    def _range(self, path: str, start: int, length: int, size: int) -> bytes:
        try:
            part = bytes(self._call(path, self._obs.get_range, self._store, path, start=start, length=length))
        except RemoteMissing:
            raise
        except RemoteError:
            self._require_size(path, size)
            raise
        if len(part) != length:  # it ends before
            self._require_size(path, size)
            raise RemoteError(f"{self.url}/{path}: {len(part)} of {length} bytes came.")
        return part

    def _require_size(self, path: str, size: int) -> None:
        there = self._call(path, self._obs.head, self._store, path)["size"]
        if there != size:
            raise RemoteDamaged(f"{self.url}/{path} has {there} bytes, its manifest says {size}.")

    def _call(self, path: str, function: Any, *args: Any, **options: Any) -> Any:
        pauses = [0.1, 0.4]
        quick = time.monotonic() + _QUICK_S
        while True:
            self.requests += 1
            try:
                return function(*args, **options)
            except FileNotFoundError as error:  # obstore's NotFoundError is one
                raise RemoteMissing(f"{self.url}/{path}: {_first_line(error)}") from error
            except (self._error, OSError, ValueError) as error:
                told = _told(self.url, path, error)
                # the client does not ask again where the body of an answer breaks off
                if type(error).__name__ != "GenericError" or not pauses or time.monotonic() > quick:
                    raise told from error
                time.sleep(pauses.pop(0))


def _client() -> dict[str, Any]:
    """The options of the HTTP client. Who gives an endpoint of http:// means it."""
    endpoints = [value for name, value in os.environ.items() if name.startswith(("AWS_ENDPOINT", "AZURE_STORAGE_ENDP"))]
    plain = any(value.startswith("http://") for value in endpoints)
    return {"timeout": f"{_TIMEOUT_S}s", "connect_timeout": "5s"} | ({"allow_http": True} if plain else {})


def _version(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: found[key] for key in ("e_tag", "version") if found.get(key) is not None}


def _told(url: str, path: str, error: Exception) -> RemoteError:
    kind = type(error).__name__
    if kind in ("PreconditionError", "AlreadyExistsError"):
        return RemoteChanged(f"{url}/{path} is another one by now.")
    text = _first_line(error)
    if any(host in text for host in _METADATA):
        return RemoteError(f"{url}: no credentials. Set them in the environment, as docs/store.md says ({text}).")
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or "status: 403" in text or "status: 401" in text:
        return RemoteError(f"{url} refuses: check the credentials in the environment and what they allow ({text}).")
    return RemoteError(f"{url} cannot be reached: {text}.")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= _TOLD else f"{text[:_TOLD]}..."
