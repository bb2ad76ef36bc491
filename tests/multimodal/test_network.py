"""Media over HTTP: allowed hosts and addresses, limits of size and time, and error messages."""

import asyncio
import socket
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmjax.multimodal import network
from mmjax.multimodal.media import MediaConnector
from mmjax.multimodal.network import FetchPolicy, FetchTimeout
from mmjax.types import RequestError
from web import (
    PIXELS,
    Site,
    body,
    connector,
    fetch_error,
    fetch_pixels,
    gzipped,
    png,
    redirect,
    to_base64,
    trickle,
    wav,
)

# --- HTTP


def test_an_image_from_the_web(site: Site) -> None:
    np.testing.assert_array_equal(fetch_pixels(site.url("/a.png?size=1#top")), PIXELS)
    path, headers = site.seen[0]
    assert path == "/a.png?size=1" and headers["User-Agent"].startswith("mmjax/")


def test_the_other_modalities(site: Site) -> None:
    site.pages["/a.wav"] = wav()
    samples, rate = connector().fetch_audio(site.url("/a.wav"))
    assert rate == 8000 and len(samples) == 800
    with pytest.raises(RequestError, match="Could not open video stream"):
        connector().fetch_video(site.url("/a.wav"))


def test_without_blocking_an_event_loop(site: Site) -> None:
    async def both() -> list[Any]:
        one = connector()
        return await asyncio.gather(
            *(one.fetch_image_async(site.url("/a.png")) for _ in range(4)),
            one.fetch_image_async(f"data:image/png;base64,{to_base64(png())}"),
        )

    assert all(np.array_equal(np.asarray(made), PIXELS) for made in asyncio.run(both()))


def test_from_within_an_event_loop(site: Site) -> None:
    async def blocking() -> Image.Image:
        return connector().fetch_image(site.url("/a.png"))

    assert asyncio.run(blocking()).size == (9, 6)


def test_a_download_can_be_cancelled(site: Site) -> None:
    site.pages["/slow"] = trickle(0.05, 1000)

    async def main() -> float:
        task = asyncio.ensure_future(connector().fetch_image_async(site.url("/slow")))
        await asyncio.sleep(0.2)
        begin = time.monotonic()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return time.monotonic() - begin

    assert asyncio.run(main()) < 10


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 300, 304])
def test_refusals_of_the_origin(site: Site, status: int) -> None:
    site.pages["/x"] = status
    error = fetch_error(site.url("/x?token=secret").replace("//", "//user:pass@"))
    assert str(status) in str(error) and error.code == "fetch_status"
    assert not {"secret", "user", "pass"} & set(str(error).replace("@", " ").replace(":", " ").split())
    assert len(site.seen) == 1  # asked once


def test_server_errors_are_tried_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([503, png()])

    def page(request: Any) -> None:
        answer = next(answers)
        request.send_response(200 if isinstance(answer, bytes) else answer)
        request.end_headers()
        request.wfile.write(answer if isinstance(answer, bytes) else b"")

    site.pages["/flaky"] = page
    slept: list[float] = []
    really = asyncio.sleep

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await really(0)

    monkeypatch.setattr(network.asyncio, "sleep", sleep)
    assert fetch_pixels(site.url("/flaky"), FetchPolicy(block_private=False)).shape == (6, 9, 3)
    assert slept == [1]
    site.pages["/down"] = 500
    error = fetch_error(site.url("/down"), FetchPolicy(block_private=False))
    assert error.code == "fetch_status" and slept == [1, 1, 4]
    assert sum(path == "/down" for path, _ in site.seen) == 3


@pytest.mark.parametrize("where", ["headers", "body"])
def test_slow_responses(site: Site, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "0.3")

    def silent(_: Any) -> None:
        time.sleep(3)

    site.pages["/slow"] = silent if where == "headers" else trickle(0.05, 100)
    error = fetch_error(site.url("/slow"))
    assert isinstance(error, FetchTimeout) and isinstance(error, TimeoutError) and "0.3 s" in str(error)


def test_no_server() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert "Cannot connect" in str(fetch_error(f"http://127.0.0.1:{port}/"))
    assert "cannot be resolved" in str(fetch_error("http://nobody.invalid/", FetchPolicy(attempts=1)))


@pytest.mark.parametrize(
    "make",
    [
        lambda size: body(b"x" * size, Content_Length=str(size)),
        lambda size: body(b"x" * size),  # of unknown length
        lambda size: gzipped(b"x" * size),
    ],
    ids=["declared", "undeclared", "packed"],
)
def test_size_limit(site: Site, make: Callable[[int], Any]) -> None:
    site.pages["/big"] = make(3_000_000)
    error = fetch_error(site.url("/big"), FetchPolicy(block_private=False, attempts=1, max_bytes=1_000_000))
    assert error.code == "media_too_large" and "MMJAX_MAX_MEDIA_DOWNLOAD_SIZE_MB" in str(error)


def test_packed_bodies_are_unpacked(site: Site) -> None:
    site.pages["/packed.png"] = gzipped(png())
    np.testing.assert_array_equal(fetch_pixels(site.url("/packed.png")), PIXELS)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (body(b"not packed", Content_Encoding="gzip"), "damaged data"),
        (body(b"x", Content_Encoding="br"), "unknown encoding"),
        (body(b"", Content_Length="0"), "without any data"),
        (body(b"short", Content_Length="500"), "connection to"),
        (lambda request: request.wfile.write(b"this is no HTTP\r\n\r\n"), "connection to"),
        (b"<html>not found</html>", "not an image in a supported format"),
    ],
)
def test_bodies_that_are_not_images(site: Site, answer: Any, words: str) -> None:
    site.pages["/bad"] = answer
    assert words in str(fetch_error(site.url("/bad")))


# --- redirects


def test_redirects(site: Site) -> None:
    site.pages |= {f"/{n}": redirect(f"/{n + 1}") for n in range(5)} | {"/5": redirect(site.url("/a.png"), 308)}
    np.testing.assert_array_equal(fetch_pixels(site.url("/0")), PIXELS)


def test_redirects_may_be_switched_off(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.pages["/moved"] = redirect("/a.png")
    monkeypatch.setenv("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0")
    monkeypatch.setenv("MMJAX_MEDIA_EGRESS_BLOCK_PRIVATE", "0")
    with pytest.raises(RequestError, match="following redirects is switched off"):
        MediaConnector().fetch_image(site.url("/moved"))
    assert MediaConnector().fetch_image(site.url("/a.png")).size == (9, 6)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("/loop", "redirects"),
        ("file:///etc/hostname", "HTTP, data or file URL"),
        ("data:image/png;base64,AAAA", "malformed"),
        ("ftp://127.0.0.1/a.png", "HTTP, data or file URL"),
        ("http://[::bad/", "failed"),
        ("http://127.0.0.1\\@elsewhere.test/", "allowed domains"),
        ("http://elsewhere.test/a.png", "allowed domains"),
    ],
)
def test_redirects_are_checked(site: Site, place: str, words: str) -> None:
    site.pages["/loop"] = redirect(place)
    policy = FetchPolicy(domains=frozenset({"127.0.0.1"}), attempts=1)
    assert words in str(fetch_error(site.url("/loop"), policy))


# --- hosts


@pytest.mark.parametrize(
    "url",
    [
        "http://evil.test/a.png",
        "http://sub.good.test/a.png",
        "http://good.test.evil.test/a.png",
        "http://good.test@evil.test/a.png",
        "http://good.test:80@evil.test/",
        "http://evil.test/?http://good.test/",
        "http://evil.test#good.test",
        "https://evil.test\\@good.test/a.png",
    ],
)
def test_domains_are_matched_exactly(url: str) -> None:
    error = fetch_error(url, FetchPolicy(domains=frozenset({"good.test"}), attempts=1))
    assert error.code in ("forbidden_url", "bad_url")


@pytest.mark.parametrize("url", ["http://GOOD.test/", "https://good.test:8443/x", "http://user@good.test/"])
def test_allowed_domains(url: str) -> None:
    assert network.parse(url, FetchPolicy(domains=frozenset({"good.test"}))).host == "good.test"


def test_domains_in_upper_case_and_unicode() -> None:
    for domain in ("bücher.test", "xn--bcher-kva.test"):
        policy = FetchPolicy.from_env(["other.test", domain], 0)
        assert network.parse("http://b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.test/", policy)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.1", "172.16.5.4", "192.168.1.1", "169.254.169.254", "100.100.100.200", "0.0.0.0",
        "224.0.0.1", "255.255.255.255", "240.0.0.1", "168.63.129.16", "192.0.2.1", "198.18.0.1", "::1", "::", "fe80::1",
        "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fec0::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1",
        "64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "2001:db8::1", "::7f00:1", "", "localhost",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not network.is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_public_addresses(address: str) -> None:
    assert network.is_public(address)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f000001", "0177.0.0.1", "127.1", "[::1]", "[::ffff:127.0.0.1]"]
)
def test_private_hosts_in_every_spelling(site: Site, host: str) -> None:
    error = fetch_error(site.url("/a.png", host), FetchPolicy(attempts=1))
    assert error.code in ("forbidden_url", "fetch_failed", "bad_url") and not site.seen


def test_private_addresses_are_blocked_unless_named(site: Site) -> None:
    error = fetch_error(site.url("/a.png"), FetchPolicy(attempts=1))
    assert "--allowed-media-domains" in str(error) and "MMJAX_MEDIA_EGRESS_BLOCK_PRIVATE=0" in str(error)
    named = FetchPolicy(domains=frozenset({"127.0.0.1"}), attempts=1)
    np.testing.assert_array_equal(fetch_pixels(site.url("/a.png"), named), PIXELS)


class Resolver:
    """Answers name queries from a table of successive answers, and counts them."""

    def __init__(self, **answers: list[list[str]]):
        self.answers, self.asked = {name.replace("_", "."): found for name, found in answers.items()}, list[str]()

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        found = self.answers.get(host, [[host]])
        return found.pop(0) if len(found) > 1 else found[0]


@pytest.fixture
def loopback_is_public(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treats 127.0.0.1 as the only public address."""
    monkeypatch.setattr(network, "is_public", lambda address: address == "127.0.0.1")


def test_a_name_that_changes_its_address(site: Site, monkeypatch: pytest.MonkeyPatch, loopback_is_public: None) -> None:
    """The name is resolved once for each connection, and the same address is checked and used."""
    resolver = Resolver(evil_test=[["127.0.0.1"], ["10.0.0.1"]])
    monkeypatch.setattr(network, "resolve", resolver)
    np.testing.assert_array_equal(fetch_pixels(site.url("/a.png", "evil.test"), FetchPolicy(attempts=1)), PIXELS)
    assert resolver.asked == ["evil.test"] and site.seen[0][1]["Host"] == f"evil.test:{site.port}"
    error = fetch_error(site.url("/a.png", "evil.test"), FetchPolicy(attempts=1))
    assert error.code == "forbidden_url" and len(site.seen) == 1


def test_redirects_to_private_addresses(site: Site, monkeypatch: pytest.MonkeyPatch, loopback_is_public: None) -> None:
    monkeypatch.setattr(network, "resolve", Resolver(public_test=[["127.0.0.1"]], inside_test=[["10.0.0.1"]]))
    for place in ("http://inside.test/", "http://169.254.169.254/latest/meta-data/", "//10.0.0.1/x"):
        site.pages["/moved"] = redirect(place)
        error = fetch_error(site.url("/moved", "public.test"), FetchPolicy(attempts=1))
        assert error.code == "forbidden_url" and "no public address" in str(error)


def test_only_the_public_ones_of_several_addresses(
    site: Site, monkeypatch: pytest.MonkeyPatch, loopback_is_public: None
) -> None:
    monkeypatch.setattr(network, "resolve", Resolver(mixed_test=[["10.0.0.1", "127.0.0.1", "169.254.169.254"]]))
    np.testing.assert_array_equal(fetch_pixels(site.url("/a.png", "mixed.test"), FetchPolicy(attempts=1)), PIXELS)


def test_no_cookies_and_no_credentials_are_sent(
    site: Site, monkeypatch: pytest.MonkeyPatch, loopback_is_public: None
) -> None:
    monkeypatch.setattr(network, "resolve", Resolver(one_test=[["127.0.0.1"]], two_test=[["127.0.0.1"]]))

    def bait(request: Any) -> None:
        request.send_response(302)
        request.send_header("Set-Cookie", "who=me")
        request.send_header("Location", site.url("/a.png", "two.test"))
        request.end_headers()

    site.pages["/bait"] = bait
    fetch_pixels(site.url("/bait", "user:secret@one.test"), FetchPolicy(attempts=1))
    assert "Authorization" in site.seen[0][1]
    assert not {"Authorization", "Cookie", "Referer"} & set(site.seen[1][1])


def test_proxies_of_the_environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy is used only if addresses are not checked."""
    monkeypatch.setenv("http_proxy", site.url(""))
    monkeypatch.setenv("no_proxy", "")
    assert "no public address" in str(fetch_error("http://10.0.0.1/a.png", FetchPolicy(attempts=1)))
    assert not site.seen
    site.pages["http://far.test/a.png"] = png()
    np.testing.assert_array_equal(fetch_pixels("http://far.test/a.png"), PIXELS)
