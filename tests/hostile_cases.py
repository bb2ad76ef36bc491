"""The table of hostile media; `hostile` defines a case."""

import base64
import io
import struct
import zlib

import numpy as np
from PIL import Image

from hostile import (
    CLIP,
    Case,
    Shaped,
    chunk,
    clip,
    closed,
    encoded,
    given,
    inline,
    link,
    local,
    noise,
    png_file,
    served,
    sound,
    url,
    wav_head,
    with_claimed_size,
    zeroed,
)
from web import body, gzipped, png, redirect, trickle, wav

IMAGE_FILES = [
    Case("empty file", "image", served(body(b"", Content_Length="0")), "without any data"),
    Case("a web page", "image", served(b"<html>no</html>"), "not an image in a supported format"),
    Case("zeros", "image", inline(bytes(1000)), "not an image in a supported format"),
    Case("half a PNG", "image", inline(lambda: noise("PNG")[:4000]), "Failed to load image"),
    Case("half a JPEG", "image", inline(lambda: noise("JPEG")[:2000]), "Failed to load image"),
    Case("half a WebP", "image", inline(lambda: noise("WEBP")[:2000]), "Failed to load image"),
    Case("half a GIF", "image", inline(lambda: noise("GIF")[:2000]), "Failed to load image"),
    Case("half a TIFF", "image", inline(lambda: noise("TIFF")[:2000]), "Failed to load image"),
    Case("half a BMP", "image", inline(lambda: noise("BMP")[:2000]), "Failed to load image"),
    Case("an AVIF without its image", "image", inline(lambda: noise("AVIF").replace(b"iinf", b"free")), "Failed to"),
    Case("a PNG of 2.5 gigapixels", "image", inline(png_file(50_000, 50_000, b"")), "Scale the image down"),
    Case("a PNG as wide as can be", "image", inline(png_file(2**31 - 1, 1, b"")), "Failed to load image"),
    Case("a PNG without pixels", "image", inline(png_file(0, 10, b"")), "Failed to load image"),
    Case("a PNG with damaged data", "image", inline(png_file(8, 8, b"no zlib")), "Failed to load image"),
    Case(
        "a PNG with a bomb of a text",
        "image",
        inline(
            lambda: png_file(
                8, 8, zlib.compress(bytes(200)), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(80_000_000)))
            )
        ),
        "Failed to load image",
    ),
    Case(
        "a PNG with too little data",
        "image",
        inline(png_file(900, 900, zlib.compress(bytes(50)))),
        "Failed to load image",
    ),
    Case("a PNG with a bad checksum", "image", inline(lambda: png().replace(b"IHDR", b"IHDS")), "Failed to load image"),
    Case(
        "a GIF of 4 gigapixels",
        "image",
        inline(b"GIF89a" + b"\xff\xff\xff\xff" + b"\0\0\0,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"),
        "Scale the image down",
    ),
    Case(
        "a JPEG of 4 gigapixels",
        "image",
        inline(lambda: noise("JPEG").replace(struct.pack(">HH", 64, 64), b"\xff\xff\xff\xff", 1)),
        "Failed to load image",
    ),
    Case(
        "a BMP of negative size",
        "image",
        inline(lambda: noise("BMP")[:18] + struct.pack("<ii", -64, -64) + noise("BMP")[26:]),
        "Failed to load image",
    ),
    Case(
        "a TIFF that points to itself",
        "image",
        inline(b"II*\0\x08\0\0\0\x01\0\x00\x01\x03\0\x01\0\0\0\x08\0\0\0\x08\0\0\0"),
        "Failed to load image",
    ),
    Case(
        "PostScript",
        "image",
        inline(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"),
        "not an image in a supported format",
    ),
    Case(
        "SVG with an entity bomb",
        "image",
        inline(b'<!DOCTYPE s [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><svg>&b;</svg>'),
        "not an image in a supported format",
    ),
    Case("a PDF", "image", inline(b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n"), "not an image in a supported format"),
    Case("a pickle", "image", inline(b"\x80\x04cos\nsystem\n."), "not an image in a supported format"),
    Case("a sound", "image", inline(wav()), "not an image in a supported format"),
    Case(
        "an image too narrow for the model",
        "image",
        inline(lambda: encoded(Image.new("RGB", (4000, 3)), "PNG")),
        "aspect ratio",
    ),
    Case(
        "more rows than the model can read",
        "image",
        inline(lambda: encoded(Image.new("RGB", (1500, 1500)), "PNG")),
        "Reduce the input resolution",
    ),
]

IMAGE_VALUES = [
    Case("NaN", "image", given(np.full((8, 8, 3), np.nan)), "must lie in 0..255"),
    Case("infinity", "image", given(np.full((8, 8, 3), np.inf)), "must lie in 0..255"),
    Case("normalised values", "image", given(np.full((8, 8, 3), -2.1)), "Pass raw pixels"),
    Case("values of 10 bits", "image", given(np.full((8, 8, 3), 1023, np.int32)), "must lie in 0..255"),
    Case("complex numbers", "image", given(np.zeros((8, 8, 3), complex)), "use uint8"),
    Case("objects", "image", given(np.full((8, 8, 3), None)), "use uint8"),
    Case("texts", "image", given(np.full((8, 8, 3), "a")), "use uint8"),
    Case("times", "image", given(np.zeros((8, 8, 3), "M8[s]")), "use uint8"),
    Case("records", "image", given(np.zeros((8, 8, 3), [("a", "u1")])), "use uint8"),
    Case("one axis", "image", given(np.zeros(8, np.uint8)), "one item has 3 axes"),
    Case("seven axes", "image", given(np.zeros((1,) * 7, np.uint8)), "one item has 3 axes"),
    Case("seven channels", "image", given(np.zeros((8, 8, 7), np.uint8)), "1, 3 or 4 channels"),
    Case("no pixels", "image", given(np.zeros((0, 8, 3), np.uint8)), "empty"),
    Case(
        "a view of a terapixel",
        "image",
        given(lambda: np.broadcast_to(np.uint8(0), (10**6, 10**6, 3))),
        "Scale the image down",
    ),
    Case(
        "a view of a billion images",
        "image",
        given(lambda: np.broadcast_to(np.uint8(0), (10**9, 8, 8, 3))),
        "too many images",
    ),
    Case(
        "a thousand images",
        "image",
        given(lambda: np.broadcast_to(np.uint8(0), (1000, 8, 8, 3))),
        "At most 999 image(s)",
    ),
    Case("a pretended array", "image", given(Shaped((8, 8, 3, 1), result=np.zeros((8, 8)))), "image"),
    Case("an array that fails", "image", given([Shaped((8, 8), result=RuntimeError("gone"))]), "image"),
    Case("a path", "image", given("/etc/passwd"), "Open files first"),
    Case("a URL", "image", given("http://127.0.0.1/a.png"), "Open files first"),
    Case("bytes", "image", given(b"\x89PNG"), "Open files first"),
    Case("a number", "image", given(7), "image"),
    Case("an object", "image", given(object()), "image"),
    Case("a function", "image", given([print]), "image"),
    Case("nested lists", "image", given([[[[0]]]]), "image"),
    Case("a dictionary", "image", given({"url": "x"}), "--enable-mm-embeds"),
    Case("a PIL image without pixels", "image", given(Image.new("RGB", (0, 9))), "empty"),
    Case(
        "a lazy PIL image that is cut short",
        "image",
        given(lambda: Image.open(io.BytesIO(noise("PNG")[:6000]))),
        "Failed to load image",
    ),
    Case(
        "a lazy PIL image of 81 megapixels, cut short",
        "image",
        given(lambda: Image.open(io.BytesIO(png_file(9000, 9000, zlib.compress(bytes(99)))))),
        "Failed to load image",
    ),
    Case("a closed PIL image", "image", given(lambda: closed()), "Failed to load image"),
]


URLS = [
    Case("no scheme", "image", url("//127.0.0.1/a.png"), "HTTP, data or file URL"),
    Case("an unknown scheme", "image", url("gopher://127.0.0.1/a.png"), "HTTP, data or file URL"),
    Case("a script", "image", url("javascript:alert(1)"), "HTTP, data or file URL"),
    Case("ffmpeg's concat", "video", url("concat:/etc/passwd|/etc/hosts"), "HTTP, data or file URL"),
    Case("no host", "image", url("http:///a.png"), "HTTP, data or file URL"),
    Case("a port that cannot be", "image", url("http://127.0.0.1:99999/"), "malformed"),
    Case("line breaks", "image", url("http://127.0.0.1/\r\nHost: evil"), "malformed"),
    Case("a backslash before the host", "image", url("http://127.0.0.1\\@10.0.0.1/"), "malformed"),
    Case("a very long URL", "image", url("http://127.0.0.1/" + "a" * 100_000), "malformed"),
    Case("a private network", "image", url("http://10.0.0.1/a.png"), "allowed domains"),
    Case("the metadata service", "image", url("http://169.254.169.254/latest/meta-data/"), "allowed domains"),
    Case("another spelling of this machine", "image", url("http://2130706433/a.png"), "allowed domains"),
    Case("a host as user name", "image", url("http://127.0.0.1@10.0.0.1/a.png"), "allowed domains"),
    Case(
        "a redirect to the metadata service",
        "image",
        served(redirect("http://169.254.169.254/latest/")),
        "allowed domains",
    ),
    Case("a redirect to a file", "image", served(redirect("file:///etc/passwd")), "HTTP, data or file URL"),
    Case("a redirect to itself", "image", served(redirect("/x")), "redirects"),
    Case("a page that is not there", "image", served(404), "HTTP status 404"),
    Case("a page that is forbidden", "audio", served(403), "HTTP status 403"),
    Case("a server that fails", "video", served(500), "HTTP status 500"),
    Case("one byte at a time", "image", served(trickle(0.05, 400)), "took longer than"),
    Case("one byte at a time, of audio", "audio", served(trickle(0.05, 400)), "took longer than"),
    Case("a body without end", "image", served(body(bytes(6_000_000))), "MMJAX_MAX_MEDIA_DOWNLOAD_SIZE_MB"),
    Case(
        "a body that is declared huge",
        "image",
        served(body(b"x", Content_Length=str(10**15))),
        "MMJAX_MAX_MEDIA_DOWNLOAD_SIZE_MB",
    ),
    Case("a packed bomb", "image", served(gzipped(bytes(200_000_000))), "MMJAX_MAX_MEDIA_DOWNLOAD_SIZE_MB"),
    Case("a body that ends early", "image", served(body(b"x", Content_Length="500")), "connection to"),
    Case(
        "no HTTP at all",
        "image",
        served(lambda request: request.wfile.write(b"220 mail ready\r\n\r\n")),
        "connection to",
    ),
    Case("no base64", "image", url("data:image/png;base64,%%%"), "not valid base64"),
    Case("base64 cut short", "image", url("data:image/png;base64,iVBORw0"), "not valid base64"),
    Case("no data", "audio", url("data:audio/wav;base64,"), "empty"),
    Case("data in another encoding", "image", url("data:text/plain,hello"), "Only base64 data URLs"),
    Case("data without a comma", "image", url("data:image/png;base64"), "comma"),
    Case(
        "data above the limit",
        "image",
        url(lambda: f"data:image/png;base64,{'A' * 8_000_000}"),
        "MMJAX_MAX_MEDIA_DOWNLOAD_SIZE_MB",
    ),
    Case("a file elsewhere", "image", url("file:///etc/passwd"), "must be a subpath"),
    Case("a file through ..", "image", local("../../../../etc/passwd"), "must be a subpath"),
    Case("a file through encoded ..", "image", local("%2e%2e/%2e%2e/%2e%2e/%2e%2e/etc/passwd"), "must be a subpath"),
    Case("a link that leads out", "image", link("/etc/passwd"), "must be a subpath"),
    Case("a link to a folder outside", "image", link("/etc"), "must be a subpath"),
    Case("a device", "image", link("/dev/zero"), "must be a subpath"),
    Case("memory of this process", "image", url("file:///proc/self/environ"), "must be a subpath"),
    Case("a folder", "image", local("."), "not a regular file"),
    Case("no such file", "audio", local("none.wav"), "cannot be read"),
    Case("a file of another host", "image", url("file://evil.test/a.png"), "no other host"),
    Case("a zero in a path", "image", local("a%00.png"), "cannot be read"),
    Case("a local file that is not an image", "image", local("bad.png", b"bad"), "not an image in a supported format"),
]

AUDIO = [
    Case("noise", "audio", inline(bytes(range(256)) * 8, "audio/wav"), "Invalid or unsupported audio file"),
    Case("only a head", "audio", inline(b"RIFF\x24\0\0\0WAVE", "audio/wav"), "Invalid or unsupported audio file"),
    Case("a sound without samples", "audio", inline(lambda: sound(np.zeros(0)), "audio/wav"), "audio"),
    Case(
        "half a FLAC",
        "audio",
        inline(lambda: sound(np.zeros(9), "FLAC")[:30], "audio/flac"),
        "Invalid or unsupported audio file",
    ),
    Case("a rate of zero", "audio", inline(wav_head(rate=0), "audio/wav"), "audio"),
    Case("a rate of gigahertz", "audio", inline(wav_head(rate=2**31), "audio/wav"), "audio"),
    Case("no channels", "audio", inline(wav_head(channels=0), "audio/wav"), "Invalid or unsupported audio file"),
    Case("thousands of channels", "audio", inline(wav_head(channels=9000), "audio/wav"), "audio"),
    Case(
        "a bomb of silence",
        "audio",
        inline(lambda: sound(np.zeros(40 * 48_000), "FLAC", 48_000), "audio/flac"),
        "Split it first",
    ),
    Case(
        "a playlist",
        "audio",
        inline(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "audio/mpeg"),
        "Invalid or unsupported audio file",
    ),
    Case(
        "an ffmpeg script",
        "audio",
        inline(b"ffconcat version 1.0\nfile /etc/passwd\n", "audio/mpeg"),
        "Invalid or unsupported audio file",
    ),
    Case("a picture as audio", "audio", inline(png(), "audio/wav"), "Invalid or unsupported audio file"),
    Case(
        "a video without sound",
        "audio",
        inline(lambda: clip("-c:v", "mpeg4"), "audio/mp4"),
        "Invalid or unsupported audio file",
    ),
    Case("NaN samples", "audio", given((np.full(1600, np.nan), 16_000)), "NaN or infinite"),
    Case("infinite samples", "audio", given((np.full(1600, np.inf), 8000)), "NaN or infinite"),
    Case("no samples", "audio", given((np.zeros(0), 16_000)), "empty"),
    Case("three axes of samples", "audio", given((np.zeros((2, 2, 9)), 16_000)), "at most (channels, time)"),
    Case("a rate of 0", "audio", given((np.zeros(99), 0)), "sampling rate"),
    Case("a negative rate", "audio", given((np.zeros(99), -1)), "sampling rate"),
    Case("a rate that is no number", "audio", given((np.zeros(99), float("nan"))), "sampling rate"),
    Case("a rate beyond reason", "audio", given((np.zeros(99), 1e300)), "sampling rate"),
    Case(
        "a rate that multiplies samples", "audio", given(lambda: (np.zeros(10**6, np.float32), 100)), "Split it first"
    ),
    Case(
        "a view of a trillion samples",
        "audio",
        given(lambda: (np.broadcast_to(np.float32(0), (10**12,)), 16_000)),
        "Split it first",
    ),
    Case(
        "a view of a billion clips",
        "audio",
        given(lambda: np.broadcast_to(np.float32(0), (10**9, 16))),
        "too many audios",
    ),
    Case("a list of texts", "audio", given((["a", "b"], 16_000)), "numbers only"),
    Case("ragged lists", "audio", given(([[0.0], [0.0, 1.0]], 16_000)), "audio"),
    Case("64-bit integers", "audio", given((np.zeros(99, np.int64), 16_000)), "full scale"),
    Case("audio by its path", "audio", given("speech.wav"), "Read files first"),
    Case("audio as bytes", "audio", given(b"RIFF"), "Read files first"),
    Case("two clips for one prompt", "audio", given([np.zeros(99), np.zeros(99)]), "At most 1 audio(s)"),
]

VIDEO = [
    Case("noise as video", "video", inline(bytes(range(256)) * 8, "video/mp4"), "Could not open video stream"),
    Case(
        "half a video", "video", inline(lambda: clip("-c:v", "mpeg4")[:600], "video/mp4"), "Could not open video stream"
    ),
    Case(
        "an index without frames",
        "video",
        inline(lambda: clip("-c:v", "mpeg4", count=1)[:800], "video/mp4"),
        "Could not open video stream",
    ),
    Case(
        "frames of zeros",
        "video",
        inline(lambda: zeroed(clip("-c:v", "mjpeg", kind="avi")), "video/avi"),
        "Could not open video stream",
    ),
    Case(
        "frames that claim gigapixels",
        "video",
        inline(
            lambda: with_claimed_size(clip("-c:v", "rawvideo", "-pix_fmt", "bgr24", kind="avi"), 60_000, 60_000),
            "video/avi",
        ),
        "ideo",
    ),
    Case(
        "a playlist of local files",
        "video",
        inline(b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n", "video/mp4"),
        "Could not open video stream",
    ),
    Case(
        "a playlist of private hosts",
        "video",
        inline(b"#EXTM3U\n#EXTINF:1,\nhttp://10.0.0.1/a.ts\n", "application/x-mpegurl"),
        "Could not open video stream",
    ),
    Case(
        "a script of ffmpeg",
        "video",
        inline(b"ffconcat version 1.0\nfile '/etc/passwd'\n", "video/mp4"),
        "Could not open video stream",
    ),
    Case(
        "a manifest",
        "video",
        inline(b'<?xml version="1.0"?><MPD><BaseURL>file:///etc/</BaseURL></MPD>', "video/mp4"),
        "Could not open video stream",
    ),
    Case("sound as video", "video", inline(lambda: sound(np.zeros(1600)), "video/mp4"), "Could not open video stream"),
    Case("JPEGs that are not JPEGs", "video", url("data:video/jpeg;base64,AAAA,AAAA"), "Failed to load image"),
    Case(
        "JPEGs of different sizes",
        "video",
        url(
            lambda: (
                "data:video/jpeg;base64,"
                + ",".join(
                    base64.b64encode(encoded(Image.new("RGB", size), "JPEG")).decode() for size in ((8, 8), (9, 8))
                )
            )
        ),
        "same size",
    ),
    Case("JPEGs with an empty one", "video", url("data:video/jpeg;base64,,,"), "empty"),
    Case(
        "frames of different sizes", "video", given([[Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))]]), "same size"
    ),
    Case("frames of NaN", "video", given(np.full((2, 28, 28, 3), np.nan)), "must lie in 0..255"),
    Case("no frames", "video", given(np.zeros((0, 28, 28, 3), np.uint8)), "empty"),
    Case("frames of two axes", "video", given([np.zeros((28, 28), np.uint8)] * 2), "video"),
    Case("six axes", "video", given(np.zeros((1,) * 6, np.uint8)), "one item has 4 axes"),
    Case(
        "a view of a million frames",
        "video",
        given(lambda: np.broadcast_to(np.uint8(0), (10**6, 28, 28, 3))),
        "Send fewer or smaller frames",
    ),
    Case(
        "a view of frames of a terapixel",
        "video",
        given(lambda: np.broadcast_to(np.uint8(0), (4, 10**6, 10**6, 3))),
        "Send fewer or smaller frames",
    ),
    Case(
        "metadata that is not a dictionary",
        "video",
        given([(np.zeros((2, 28, 28, 3), np.uint8), 7)]),
        "metadata must be a dictionary",
    ),
    Case(
        "metadata of odd types",
        "video",
        given((np.zeros((2, 28, 28, 3), np.uint8), {"fps": object()})),
        "Cannot identify",
    ),
    Case("a rate of no frames", "video", given((CLIP, {"fps": 0})), "fps"),
    Case("a rate of NaN frames", "video", given((CLIP, {"fps": float("nan")})), "fps"),
    Case("a rate in letters", "video", given((CLIP, {"fps": "fast"})), "fps"),
    Case("more numbers than frames", "video", given((CLIP, {"frames_indices": [0, 1, 2]})), "frames_indices"),
    Case("indices that are not numbers", "video", given((CLIP, {"frames_indices": ["a", "b"]})), "frames_indices"),
    Case("negative numbers of frames", "video", given((CLIP, {"frames_indices": [-1, 0]})), "frames_indices"),
    Case("paths of frames", "video", given([["a.png", "b.png"]]), "Open files first"),
    Case("a video by its path", "video", given("clip.mp4"), "video"),
    Case("more frames than the model can read", "video", given(lambda: np.zeros((64, 280, 280, 3), np.uint8)), "video"),
]


CASES = IMAGE_FILES + IMAGE_VALUES + URLS + AUDIO + VIDEO
