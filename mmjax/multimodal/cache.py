"""Fetched files on disk, so that a URL is fetched once whoever asks. Off unless MMJAX_MEDIA_CACHE names a folder.

A file is named by a hash of its URL and of the rules under which it was fetched, so what other rules would refuse is
not there for them. It holds a digest and the data; its modification time is when it was fetched, its access time when
it was last used. Several processes may share a folder.
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
from mmjax.multimodal.network import Policy
from mmjax.types import ValidationError

log = logging.getLogger(__name__)

OURS = re.compile(r"[0-9a-f]{64}(\.part\w+)?")  # nothing else in the folder is read, counted or removed
DIGEST = hashlib.sha256().digest_size
ABANDONED_S = 3600.0  # after which a file that was never finished is one of a process that has died


@dataclasses.dataclass(frozen=True)
class MediaCache:
    """max_bytes, ttl_s: of all files together, and from the fetching of one; 0 is no limit. Safe from any thread."""

    folder: Path
    max_bytes: int = 5120 << 20
    ttl_s: float = 24 * 3600.0

    @classmethod
    def from_env(cls) -> "MediaCache | None":
        """What the operator set, None: no cache. Raises ValidationError for a variable that cannot be read."""
        name = env("MEDIA_CACHE", "")
        largest = int(env_number("MEDIA_CACHE_MAX_SIZE_MB", cls.max_bytes >> 20) * 2**20)
        hours = env_number("MEDIA_CACHE_TTL_HOURS", cls.ttl_s / 3600)
        if not name:
            return None
        folder = Path(name).expanduser()
        if folder.exists() and not folder.is_dir():
            words = f"MMJAX_MEDIA_CACHE must name a folder, but {folder} is none."
            raise ValidationError(words, parameter="MMJAX_MEDIA_CACHE", value=name)
        return cls(folder, largest, hours * 3600)

    def get(self, url: str, policy: Policy) -> bytes | None:
        """What was kept of a URL under these rules; None: nothing, or nothing that can still be used."""
        try:
            # a link is not followed, and what another user of the machine has put here is not believed
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(self._path(url, policy), flags)
            try:
                return self._read(handle, policy)
            finally:
                os.close(handle)
        except OSError:
            return None

    def _read(self, handle: int, policy: Policy) -> bytes | None:
        about = os.fstat(handle)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid() or self._is_old(about.st_mtime):
            return None
        if policy.max_bytes and about.st_size - DIGEST > policy.max_bytes:
            return None
        with open(handle, "rb", closefd=False) as file:
            digest, data = file.read(DIGEST), file.read()
        if hashlib.sha256(data).digest() != digest:
            return None
        os.utime(handle, (time.time(), about.st_mtime))
        return data

    def put(self, url: str, policy: Policy, data: bytes) -> None:
        """Keep what was fetched, and drop what was used the longest ago where there is too much. Never raises: without
        the file the next one who asks waits a little longer."""
        if self.max_bytes and len(data) + DIGEST > self.max_bytes:
            return
        path = self._path(url, policy)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle, part = tempfile.mkstemp(prefix=f"{path.name}.part", dir=self.folder)
            try:
                with open(handle, "wb") as file:
                    file.write(hashlib.sha256(data).digest())
                    file.write(data)
                os.replace(part, path)  # whoever reads meanwhile has the old file or the new one
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part)
                raise
            self._make_room()
        except OSError as error:
            log.warning("MMJAX_MEDIA_CACHE: a file cannot be kept in %s (%s)", self.folder, error.strerror)

    def _path(self, url: str, policy: Policy) -> Path:
        rules = f"{sorted(policy.domains)} {policy.redirects} {policy.block_private} "
        return self.folder / hashlib.sha256((rules + url).encode(errors="surrogatepass")).hexdigest()

    def _is_old(self, fetched: float) -> bool:
        return bool(self.ttl_s) and time.time() - fetched > self.ttl_s

    def _make_room(self) -> None:
        """Remove what is too old, and then the least recently used until the rest is within bounds."""
        found = []
        for entry, about in self._files():
            left = ".part" in entry.name and time.time() - about.st_mtime > ABANDONED_S
            if left or self._is_old(about.st_mtime):
                _remove(entry)
            elif ".part" not in entry.name:
                found.append((about.st_atime, about.st_size, entry))
        total = sum(size for _, size, _ in found)
        for _, size, entry in sorted(found, key=lambda file: file[0]):
            if not self.max_bytes or total <= self.max_bytes:
                return
            _remove(entry)
            total -= size

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another process was quicker
                    if OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        yield Path(entry.path), entry.stat(follow_symlinks=False)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
