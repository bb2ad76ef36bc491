"""The disk cache of fetched media: keys, size and expiry."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from mmjax.multimodal.cache import MediaCache
from mmjax.multimodal.media import MediaConnector
from mmjax.multimodal.network import FetchPolicy
from mmjax.types import RequestError, ValidationError
from web import OPEN, PIXELS, Site, connector, png, redirect

URL = "http://example.org/a.png?key=1"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the disk cache."""
    monkeypatch.setenv("VLLM_MEDIA_CACHE", str(tmp_path / "kept" / "media"))
    return tmp_path / "kept" / "media"


def test_a_url_is_fetched_once(site: Site, folder: Path) -> None:
    for _ in range(3):
        np.testing.assert_array_equal(np.asarray(connector().fetch_image(site.url("/a.png"))), PIXELS)
    assert [path for path, _ in site.seen] == ["/a.png"]
    [file] = folder.iterdir()
    assert len(file.name) == 64 and file.stat().st_mode & 0o077 == 0 == folder.stat().st_mode & 0o077
    connector().fetch_image(site.url("/a.png?other"))
    assert len(site.seen) == 2 and len(list(folder.iterdir())) == 2


def test_off_by_default(site: Site) -> None:
    assert connector().cache is None
    for _ in range(2):
        connector().fetch_image(site.url("/a.png"))
    assert len(site.seen) == 2


def test_undecodable_data_are_not_cached(site: Site, folder: Path) -> None:
    site.pages["/b.png"] = b"an error page"
    for _ in range(2):
        with pytest.raises(RequestError, match="Failed to load image"):
            connector().fetch_image(site.url("/b.png"))
        with pytest.raises(RequestError, match="HTTP status 404"):
            connector().fetch_image(site.url("/c.png"))
    assert len(site.seen) == 4 and not folder.exists()


def test_the_policy_applies_to_cached_data(site: Site, folder: Path) -> None:
    """Data fetched under one policy are not found under another, be it about hosts, redirects, addresses or sizes."""
    site.pages |= {"/there": redirect(site.url("/a.png", host="localhost")), "/here": redirect("/a.png")}
    for path in ("/a.png", "/there", "/here"):
        connector().fetch_image(site.url(path))
    asked = len(site.seen)
    for path, policy, words in (
        ("/a.png", FetchPolicy(frozenset({"other.example"}), block_private=False, attempts=1), "allowed domains"),
        ("/there", FetchPolicy(frozenset({"127.0.0.1"}), block_private=False, attempts=1), "allowed domains"),
        ("/here", FetchPolicy(redirects=False, block_private=False, attempts=1), "redirects"),
        ("/a.png", FetchPolicy(attempts=1), "private networks"),
        ("/a.png", FetchPolicy(block_private=False, attempts=1, max_bytes=20), "larger than"),
    ):
        with pytest.raises(RequestError, match=words):
            connector(policy).fetch_image(site.url(path))
    assert len(site.seen) == asked + 3  # of the second, the third and the last, each found out by asking
    np.testing.assert_array_equal(np.asarray(connector().fetch_image(site.url("/there"))), PIXELS)
    assert len(site.seen) == asked + 3


def test_the_least_recently_used_are_evicted(tmp_path: Path) -> None:
    cache = MediaCache(tmp_path, max_bytes=350)
    for number in range(3):
        cache.put(f"{URL}{number}", OPEN, bytes([number]) * 80)  # and a digest of 32
        os.utime(cache._path(f"{URL}{number}", OPEN), (number, time.time()))
    assert cache.get(f"{URL}0", OPEN) == bytes(80)  # used, and so no longer the oldest
    (tmp_path / "notes.txt").write_text("mine " * 99)
    cache.put(f"{URL}3", OPEN, bytes([3]) * 80)
    assert [cache.get(f"{URL}{number}", OPEN) is None for number in range(4)] == [False, True, False, False]
    cache.put(f"{URL}4", OPEN, bytes(400))
    assert cache.get(f"{URL}4", OPEN) is None and cache.get(f"{URL}3", OPEN) is not None
    assert (tmp_path / "notes.txt").exists()


def test_old_or_damaged_files_are_not_used(tmp_path: Path) -> None:
    cache, day = MediaCache(tmp_path, ttl_s=3600.0), 24 * 3600
    cache.put(URL, OPEN, b"data")
    file = cache._path(URL, OPEN)
    whole = file.read_bytes()
    for broken in (b"", whole[:-1], whole[:5], whole[:-1] + b"x"):
        file.write_bytes(broken)
        assert cache.get(URL, OPEN) is None
    file.write_bytes(whole)
    assert cache.get(URL, OPEN) == b"data"
    os.utime(file, (time.time(), time.time() - day))
    assert cache.get(URL, OPEN) is None and MediaCache(tmp_path, ttl_s=0).get(URL, OPEN) == b"data"
    left = tmp_path / f"{'a' * 64}.partx"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    cache.put(f"{URL}2", OPEN, b"other")
    assert [each.read_bytes()[32:] for each in tmp_path.iterdir()] == [b"other"]


def test_links_and_folders_are_not_followed(tmp_path: Path) -> None:
    cache, real = MediaCache(tmp_path / "kept"), MediaCache(tmp_path / "real")
    real.put(URL, OPEN, b"data")
    cache.directory.mkdir()
    cache._path(URL, OPEN).symlink_to(real._path(URL, OPEN))
    assert cache.get(URL, OPEN) is None
    cache.put(URL, OPEN, b"new")
    assert cache.get(URL, OPEN) == b"new" and real.get(URL, OPEN) == b"data"
    cache._path(f"{URL}2", OPEN).mkdir()
    assert cache.get(f"{URL}2", OPEN) is None


def test_a_folder_that_cannot_be_written(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The media item is returned anyway; a name that is not a folder is an error at once."""
    cache = MediaCache(tmp_path / "file" / "below")
    (tmp_path / "file").write_bytes(png())
    cache.put(URL, OPEN, b"data")
    assert "MMJAX_MEDIA_CACHE" in caplog.text and cache.get(URL, OPEN) is None
    monkeypatch.setenv("MMJAX_MEDIA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ValidationError, match="must name a folder"):
        MediaConnector()
    monkeypatch.setenv("MMJAX_MEDIA_CACHE", str(tmp_path / "kept"))
    monkeypatch.setenv("VLLM_MEDIA_CACHE_TTL_HOURS", "soon")
    with pytest.raises(ValidationError, match="MMJAX_MEDIA_CACHE_TTL_HOURS"):
        MediaConnector()
    monkeypatch.setenv("VLLM_MEDIA_CACHE_TTL_HOURS", "0.5")
    monkeypatch.setenv("MMJAX_MEDIA_CACHE_MAX_SIZE_MB", "1")
    assert MediaConnector().cache == MediaCache(tmp_path / "kept", 1 << 20, 1800.0)
