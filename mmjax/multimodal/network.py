"""Fetches bytes over HTTP from hosts that the operator allows, and from no other machine.

Host names are resolved here, their addresses are checked, and connections go to the checked addresses, so it does not
help an attacker if a name resolves differently the next time. Every redirect is checked too.
"""

import asyncio
import concurrent.futures
import dataclasses
import functools
import ipaddress
import os
import re
import ssl
import threading
import zlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx

from mmjax.config import env_flag, env_number
from mmjax.multimodal.media_limits import DEFAULT
from mmjax.types import RequestError
from mmjax.version import __version__

T = TypeVar("T")

# characters that programs interpret differently: backslashes, control characters
AMBIGUOUS = re.compile(r"[\x00-\x1f\x7f\\]")
HOST = re.compile(r"[a-z0-9_.-]+|[0-9a-f:.]+", re.IGNORECASE)
MAX_REDIRECTS = 10
MAX_ADDRESSES = 4  # tried per host
REDIRECT_STATUSES = frozenset({301, 302, 303, 307, 308})
BACKOFF = 4.0  # the time limit and the pause grow by this factor with each attempt; the first pause is one second

# in a public range, but used for services of the cloud
METADATA_ADDRESSES = frozenset({"168.63.129.16"})
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # IPv4 addresses as seen by IPv6-only networks


class FetchTimeout(RequestError, TimeoutError):
    """The server took too long."""


@dataclasses.dataclass(frozen=True)
class FetchPolicy:
    """The hosts from which media may be fetched, and the number of attempts. domains: allowed hosts; empty allows all.

    block_private: only hosts with public addresses, unless their names are in `domains`. Proxies from the environment
    are then not used, since the addresses to which they connect cannot be checked.
    """

    domains: frozenset[str] = frozenset()
    redirects: bool = True
    block_private: bool = True
    attempts: int = 3
    max_bytes: int = DEFAULT.source_bytes

    @classmethod
    def from_env(cls, domains: Sequence[str] | None, max_bytes: int) -> "FetchPolicy":
        """The policy that the operator has set. ValidationError for a variable that cannot be read."""
        return cls(
            domains=frozenset(domain.lower() for domain in domains or ()),
            redirects=env_flag("MEDIA_URL_ALLOW_REDIRECTS", cls.redirects),
            block_private=env_flag("MEDIA_EGRESS_BLOCK_PRIVATE", cls.block_private),
            attempts=max(1, int(env_number("MEDIA_FETCH_MAX_RETRIES", cls.attempts))),
            max_bytes=max_bytes,
        )


class _Retry(Exception):
    """A failure that may be temporary. The argument is the error to raise if no attempt is left."""


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the open internet. False for private, local and reserved ones, and for text that
    is not an address."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        mapped = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF) if ip in NAT64 else ip.ipv4_mapped
        if mapped is not None:
            return is_public(str(mapped))
        tunnels = [v4 for v4 in (ip.sixtofour, *(ip.teredo or ())) if v4 is not None]
        if ip.is_site_local or not all(is_public(str(v4)) for v4 in tunnels):
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and str(ip) not in METADATA_ADDRESSES


async def resolve(host: str, port: int) -> list[str]:
    """The addresses of a host, in the order in which to try them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=1)  # SOCK_STREAM
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def redacted(url: httpx.URL) -> str:
    """A URL for messages: without credentials, query and fragment."""
    return str(url.copy_with(userinfo=b"", query=None, fragment=None))


def parse(url: str | httpx.URL, policy: FetchPolicy) -> httpx.URL:
    """A URL that may be fetched. RequestError if it cannot be read or its host is not among the allowed ones."""
    malformed = RequestError("The media URL is malformed.", "bad_url")
    try:
        if AMBIGUOUS.search(str(url)):
            raise malformed
        parsed = httpx.URL(url)
        host = parsed.raw_host.decode("ascii")
    except (httpx.InvalidURL, UnicodeError, ValueError, TypeError) as error:
        raise malformed from error
    if parsed.scheme not in ("http", "https") or not host:
        raise RequestError("The URL must be either a HTTP, data or file URL.", "bad_url")
    if not HOST.fullmatch(host) or (parsed.port or 0) > 65535:
        raise malformed
    if policy.domains and not _is_listed(parsed, policy):
        raise RequestError(
            f"The URL must be from one of the allowed domains: {sorted(policy.domains)}. Input URL domain: "
            f"{parsed.host}",
            "forbidden_url",
        )
    return parsed


def _is_listed(url: httpx.URL, policy: FetchPolicy) -> bool:
    """Whether the operator has listed this host, in Unicode or in Punycode."""
    return url.host in policy.domains or url.raw_host.decode("ascii") in policy.domains


async def fetch(url: str, policy: FetchPolicy, timeout_s: float) -> bytes:
    """GET a URL. timeout_s: for the first attempt, including redirects and body; later attempts have more time.

    RequestError for any failure: a forbidden host or address, an HTTP error, too many bytes, no connection, or a
    FetchTimeout. Only failed connections, timeouts and server errors are retried.
    """
    parsed = parse(url, policy)
    for attempt in range(policy.attempts):
        limit = timeout_s * BACKOFF**attempt
        try:
            try:
                async with asyncio.timeout(limit):
                    return await _follow(parsed, policy, limit)
            except (TimeoutError, httpx.TimeoutException) as error:
                shown = redacted(parsed)
                message = f"Fetching {shown} took longer than {limit:g} s. Try again, or send the data itself."
                raise _Retry(FetchTimeout(message, "fetch_timeout")) from error
        except _Retry as retry:
            if attempt + 1 == policy.attempts:
                raise retry.args[0] from retry
            await asyncio.sleep(BACKOFF**attempt)
    raise AssertionError("there is at least one attempt")


async def _follow(url: httpx.URL, policy: FetchPolicy, timeout_s: float) -> bytes:
    """The body, with redirects followed."""
    for _ in range(MAX_REDIRECTS):
        response = await _get(url, policy, timeout_s)
        if isinstance(response, bytes):
            return response
        if not policy.redirects:
            raise RequestError(
                f"{redacted(url)} redirects to another place, and following redirects is switched off "
                "(MMJAX_MEDIA_URL_ALLOW_REDIRECTS). Use the final URL.",
                "forbidden_url",
            )
        try:
            url = parse(url.join(response), policy)
        except httpx.InvalidURL as error:
            raise RequestError(f"{redacted(url)} redirects to a malformed URL.", "bad_url") from error
    raise RequestError(f"More than {MAX_REDIRECTS} redirects on the way from the media URL.", "fetch_failed")


async def _get(url: httpx.URL, policy: FetchPolicy, timeout_s: float) -> bytes | str:
    """The body as bytes, or the location of a redirect as a string."""
    failure: Exception | None = None
    addresses = await _addresses(url, policy)
    timeout = httpx.Timeout(timeout_s, connect=timeout_s / len(addresses))
    for address in addresses:
        try:
            return await _get_from(url, address, policy, timeout)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            failure = error
        except httpx.TimeoutException:
            raise
        except httpx.InvalidURL as error:
            raise RequestError(f"{redacted(url)} redirects to a malformed URL.", "bad_url") from error
        except httpx.HTTPError as error:
            raise _Retry(
                RequestError(f"The connection to {redacted(url)} failed ({type(error).__name__}).", "fetch_failed")
            ) from error
    raise _Retry(RequestError(f"Cannot connect to {redacted(url)}.", "fetch_failed")) from failure


async def _addresses(url: httpx.URL, policy: FetchPolicy) -> list[str | None]:
    """The addresses to connect to; None leaves the choice to the HTTP client."""
    if not policy.block_private or _is_listed(url, policy):
        return [None]
    try:
        found = await resolve(url.raw_host.decode("ascii"), url.port or {"http": 80, "https": 443}[url.scheme])
    except (OSError, UnicodeError) as error:
        raise RequestError(f"The host of {redacted(url)} cannot be resolved.", "fetch_failed") from error
    public: list[str | None] = [address for address in found if is_public(address)]
    if not public:
        raise RequestError(
            f"The host {url.host} has no public address, and media are not fetched from private networks. Name the "
            "host in `--allowed-media-domains`, or set MMJAX_MEDIA_EGRESS_BLOCK_PRIVATE=0.",
            "forbidden_url",
        )
    return public[:MAX_ADDRESSES]


async def _get_from(url: httpx.URL, address: str | None, policy: FetchPolicy, timeout: httpx.Timeout) -> bytes | str:
    """`_get` from one address of the host."""
    headers = {"User-Agent": f"mmjax/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"}
    target, extensions = url, {}
    if address is not None:
        headers["Host"] = url.netloc.decode("ascii")
        target, extensions = url.copy_with(host=address), {"sni_hostname": url.raw_host.decode("ascii")}
    direct = address is not None or policy.block_private
    # a client per request, so that cookies and connections are not shared across event loops
    async with (
        httpx.AsyncClient(verify=_ssl_context(), trust_env=not direct, timeout=timeout) as client,
        client.stream("GET", target, headers=headers, extensions=extensions) as response,
    ):
        if response.status_code in REDIRECT_STATUSES and "location" in response.headers:
            return response.headers["location"]
        _check_status(url, response.status_code)
        body = _Body(url, response.headers, policy.max_bytes)
        async for chunk in response.aiter_raw():
            body.add(chunk)
        return body.whole()


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()


def _check_status(url: httpx.URL, status: int) -> None:
    if status < 300:
        return
    error = RequestError(f"{redacted(url)} answered with HTTP status {status}.", "fetch_status")
    raise _Retry(error) if status >= 500 else error


class _Body:
    """The body of a response as it arrives, decompressed, within a limit of bytes."""

    def __init__(self, url: httpx.URL, headers: httpx.Headers, limit: int):
        self.url, self.limit, self.parts, self.size = url, limit or float("inf"), list[bytes](), 0
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("identity", "", "gzip", "x-gzip", "deflate"):
            raise RequestError(f"{redacted(url)} answered in the unknown encoding {encoding!r}.", "fetch_failed")
        self.decompressor = None if encoding in ("identity", "") else zlib.decompressobj(wbits=47)  # gzip or zlib
        declared = headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.limit:
            raise self._too_large()

    def add(self, chunk: bytes) -> None:
        while chunk:
            if self.decompressor is None:
                part, chunk = chunk, b""
            else:
                try:
                    part = self.decompressor.decompress(chunk, 1 << 20)
                except zlib.error as error:
                    raise RequestError(f"{redacted(self.url)} answered with damaged data.", "fetch_failed") from error
                chunk = self.decompressor.unconsumed_tail
            self.size += len(part)
            if self.size > self.limit:
                raise self._too_large()
            self.parts.append(part)

    def whole(self) -> bytes:
        if not self.size:
            raise RequestError(f"{redacted(self.url)} answered without any data.", "fetch_failed")
        return b"".join(self.parts)

    def _too_large(self) -> RequestError:
        return RequestError(
            f"{redacted(self.url)} is larger than the {self.limit} bytes that are fetched. Send a smaller file, or "
            "raise MMJAX_MAX_MEDIA_DOWNLOAD_SIZE_MB.",
            "media_too_large",
        )


# --- for callers without an event loop


class _Background:
    """An event loop on a thread of its own, started when it is first needed, and again after a fork."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.pool: concurrent.futures.ThreadPoolExecutor | None = None

    def event_loop(self) -> asyncio.AbstractEventLoop:
        with self.lock:
            if self.loop is None:
                self.loop = asyncio.new_event_loop()
                threading.Thread(target=self.loop.run_forever, name="mmjax-fetch", daemon=True).start()
            return self.loop

    def workers(self) -> concurrent.futures.ThreadPoolExecutor:
        with self.lock:
            if self.pool is None:
                threads = max(1, int(env_number("MEDIA_LOADING_THREAD_COUNT", 8)))
                self.pool = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="mmjax-media")
            return self.pool


_background = _Background()
os.register_at_fork(after_in_child=_background.__init__)  # type: ignore[misc]


def wait_for(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the background event loop, and wait for it. An interrupt cancels it."""
    future = asyncio.run_coroutine_threadsafe(work, _background.event_loop())
    try:
        return future.result()
    finally:
        future.cancel()


async def in_worker(work: Callable[..., T], *arguments: Any) -> T:
    """Call a slow function on a worker thread for media, so that the event loop stays responsive."""
    return await asyncio.get_running_loop().run_in_executor(_background.workers(), work, *arguments)
