"""Reads media from `data:` URLs, and from `file:` URLs below the allowed directory."""

import base64
import binascii
import os
import stat
from pathlib import Path
from urllib.parse import unquote

from mmjax.multimodal.media_limits import DEFAULT, MediaLimits
from mmjax.types import RequestError


class LocalFilesDisabled(RequestError, RuntimeError):
    """A file: URL, although the operator allows none. Also a RuntimeError, which callers written for vLLM expect."""


def scheme_of(url: object) -> str:
    """`http`, `https`, `data` or `file`. RequestError for anything else."""
    if not isinstance(url, str):
        raise RequestError(f"A media URL must be a string, got {type(url).__name__}.", "bad_url")
    scheme = url[:8].partition(":")[0].lower() if ":" in url[:8] else ""
    if scheme not in ("http", "https", "data", "file"):
        raise RequestError("The URL must be either a HTTP, data or file URL.", "bad_url")
    return scheme


def split_data_url(url: str) -> tuple[str, str]:
    """The (type, text) of `data:<type>;base64,<text>`. Only the first comma separates."""
    head, comma, text = url[len("data:") :].partition(",")
    if not comma:
        raise RequestError("A data URL needs a comma between its type and its data.", "bad_url")
    media_type, *parameters = head.split(";")
    if not parameters or parameters[-1].strip().lower() != "base64":
        raise RequestError(
            "Only base64 data URLs are supported for now: write data:<type>;base64,<data>.", "unsupported_url"
        )
    return media_type.strip().lower(), text


def bare_base64(text: str) -> str:
    """Base64 text without line breaks and without the `data:<type>;base64,` that may stand before it."""
    if text[:5].lower() == "data:":
        text = split_data_url(text)[1]
    return text.replace("\n", "").replace("\r", "") if "\n" in text or "\r" in text else text


def from_base64(text: str, limits: MediaLimits = DEFAULT) -> bytes:
    """Decode standard base64, also with the line breaks that `base64 file` prints, and after a `data:` prefix.
    RequestError for other characters, bad padding, no data, or too much."""
    text = bare_base64(text)
    if limits.source_bytes and len(text) // 4 * 3 > limits.source_bytes + 2:
        raise RequestError(
            f"The base64 data hold more than the {limits.source_bytes} bytes that are decoded. Send a smaller file, or "
            "raise MMJAX_MAX_MEDIA_DOWNLOAD_SIZE_MB.",
            "media_too_large",
        )
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise RequestError("The data are not valid base64.", "bad_base64") from error
    if not data:
        raise RequestError("The base64 data are empty.", "bad_base64")
    return data


def allowed_directory(path: str | os.PathLike[str]) -> Path | None:
    """`allowed_local_media_path` with links resolved; None when it is empty. RequestError if it is not a directory."""
    if not str(path):
        return None
    real = Path(path).resolve()
    if not real.is_dir():
        reason = "must be a directory" if real.exists() else "does not exist"
        raise RequestError(f"Invalid `--allowed-local-media-path`: The path {path} {reason}.", "bad_path")
    return real


def read_file_url(url: str, allowed: Path | None, limits: MediaLimits = DEFAULT) -> bytes:
    """The content of a file below `allowed`, a resolved directory. Neither `..` nor links lead out of it.

    RequestError if no directory is allowed, for paths outside it, and for files that are not regular, cannot be read
    or are too large.
    """
    if allowed is None:
        raise LocalFilesDisabled("Cannot load local files without `--allowed-local-media-path`.", "forbidden_url")
    rest = url[len("file:") :].split("#")[0].split("?")[0]
    host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", "/", rest.lstrip("/"))
    if host not in ("", "localhost"):
        raise RequestError("A file URL must name no other host: write file:///path.", "bad_url")
    path = slash + unquote(path)
    outside = RequestError(
        f"The file path {path} must be a subpath of `--allowed-local-media-path {allowed}`.", "forbidden_url"
    )
    unreadable = RequestError(f"The file {path} cannot be read.", "bad_path")
    try:
        real = Path(path).resolve()
        if not real.is_relative_to(allowed):
            raise outside
        # do not block on a pipe, and do not follow a link that has meanwhile replaced the file
        handle = os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(error, RequestError):
            raise
        raise unreadable from error
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise RequestError(f"The file {path} is not a regular file.", "bad_path")
        if not _real_path(handle).is_relative_to(allowed):
            raise outside
        limit = limits.source_bytes or status.st_size
        with open(handle, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    finally:
        os.close(handle)
    if len(data) > limit:
        raise RequestError(
            f"The file {path} is larger than the {limit} bytes that are read. Use a smaller one, or raise "
            "MMJAX_MAX_MEDIA_DOWNLOAD_SIZE_MB.",
            "media_too_large",
        )
    return data


def _real_path(handle: int) -> Path:
    """The path of an open file, since a directory in its path may have become a link after it was resolved."""
    return Path(os.readlink(f"/proc/self/fd/{handle}"))
