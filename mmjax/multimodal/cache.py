"""A disk cache of fetched files, in the directory MMJAX_MEDIA_CACHE. If that is unset, there is no cache.

A file's name is a hash of its URL and of the policy under which it was fetched, so a stricter policy never finds a file
that it would refuse. A file holds a digest and the data; its modification time is when it was fetched, its access time
when it was last used. Several processes may share a directory.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from mmjax.config import env, env_number
from mmjax.multimodal.network import FetchPolicy
from mmjax.types import ValidationError

log = logging.getLogger(__name__)

FILE_NAME = re.compile(r"[0-9a-f]{64}(\.part\w+)?")  # other files in the directory are not read, counted or removed
DIGEST_SIZE = hashlib.sha256().digest_size
ABANDONED_S = 3600.0  # an unfinished file this old was left by a process that died


@dataclasses.dataclass(frozen=True)
class MediaCache:
    """Files in a directory. May be used from several threads.

    max_bytes: of all files together. ttl_s: seconds after which a file is fetched again. 0 means no limit.
    """

    directory: Path
    max_bytes: int = 5120 << 20
    ttl_s: float = 24 * 3600.0

    @classmethod
    def from_env(cls) -> "MediaCache | None":
        """The cache that the operator has set up, or None. ValidationError for a variable that cannot be read."""
        name = env("MEDIA_CACHE", "")
        max_bytes = int(env_number("MEDIA_CACHE_MAX_SIZE_MB", cls.max_bytes >> 20) * 2**20)
        hours = env_number("MEDIA_CACHE_TTL_HOURS", cls.ttl_s / 3600)
        if not name:
            return None
        directory = Path(name).expanduser()
        if directory.exists() and not directory.is_dir():
            message = f"MMJAX_MEDIA_CACHE must name a folder, but {directory} is not one."
            raise ValidationError(message, parameter="MMJAX_MEDIA_CACHE", value=name)
        return cls(directory, max_bytes, hours * 3600)

    def get(self, url: str, policy: FetchPolicy) -> bytes | None:
        """The cached data of a URL under this policy, or None."""
        try:
            # links are not followed, and files of other users of the machine are not trusted
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(self._path(url, policy), flags)
            try:
                return self._read(handle, policy)
            finally:
                os.close(handle)
        except OSError:
            return None

    def _read(self, handle: int, policy: FetchPolicy) -> bytes | None:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or self._is_old(status.st_mtime):
            return None
        if policy.max_bytes and status.st_size - DIGEST_SIZE > policy.max_bytes:
            return None
        with open(handle, "rb", closefd=False) as file:
            digest, data = file.read(DIGEST_SIZE), file.read()
        if hashlib.sha256(data).digest() != digest:
            return None
        os.utime(handle, (time.time(), status.st_mtime))
        return data

    def put(self, url: str, policy: FetchPolicy, data: bytes) -> None:
        """Store fetched data, and remove the least recently used files if the cache is too large. Never raises: without
        the file, the next fetch of the URL only takes longer."""
        if self.max_bytes and len(data) + DIGEST_SIZE > self.max_bytes:
            return
        path = self._path(url, policy)
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=f"{path.name}.part", dir=self.directory)
            try:
                with open(handle, "wb") as file:
                    file.write(hashlib.sha256(data).digest())
                    file.write(data)
                os.replace(part, path)  # atomic: a concurrent reader sees the old file or the new one
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise
            self._evict()
        except OSError as error:
            log.warning("MMJAX_MEDIA_CACHE: a file cannot be stored in %s (%s)", self.directory, error.strerror)

    def _path(self, url: str, policy: FetchPolicy) -> Path:
        rules = f"{sorted(policy.domains)} {policy.redirects} {policy.block_private} "
        return self.directory / hashlib.sha256((rules + url).encode(errors="surrogatepass")).hexdigest()

    def _is_old(self, fetched: float) -> bool:
        return bool(self.ttl_s) and time.time() - fetched > self.ttl_s

    def _evict(self) -> None:
        """Remove old files, and then the least recently used ones until the rest is within max_bytes."""
        found = []
        for path, status in self._files():
            abandoned = ".part" in path.name and time.time() - status.st_mtime > ABANDONED_S
            if abandoned or self._is_old(status.st_mtime):
                _remove(path)
            elif ".part" not in path.name:
                found.append((status.st_atime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found, key=lambda file: file[0]):
            if not self.max_bytes or total <= self.max_bytes:
                return
            _remove(path)
            total -= size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        with os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process has removed it
                    if FILE_NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        yield Path(entry.path), entry.stat(follow_symlinks=False)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
