"""The page's section on video inputs through a server: videos by URL and as data, frame sampling and recovery,
audio."""

import base64
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest

from mmjax import LLM
from mmjax.multimodal.media import VideoMediaIO
from online_server import complete_chat, openai, openai_client, same_tokens, token_ids_of
from prompts import base64_image, chat_one, generate_one, random_image, user_messages
from web import Site

Shared = Callable[[str], LLM]
MakeOf = Callable[..., LLM]
Film = Callable[..., bytes]


def clip(link: str, **more: Any) -> dict[str, Any]:
    return {"type": "video_url", "video_url": {"url": link}, **more}


def data_of(film: bytes) -> str:
    return f"data:video/quicktime;base64,{base64.b64encode(film).decode()}"


def test_the_server_of_the_page(make_llm_of: MakeOf, site: Site, film: Film) -> None:
    """LLaVA-OneVision: a clip by its URL, as data, and as JPEG images; the number of frames of a request, with 0
    refused."""
    llm = make_llm_of("llava_onevision", "--runner generate --max-model-len 512 --media-io-kwargs.video.num_frames 4")
    site.pages["/film.mov"] = film()
    whole, link = film(), clip(site.url("/film.mov"))
    offline = chat_one(llm, user_messages("What's in this video?", clip(data_of(whole))))
    few = {"video": {"num_frames": 2}}
    frames = VideoMediaIO(num_frames=2).load_bytes(whole)
    two = generate_one(llm, {"prompt": offline.prompt, "multi_modal_data": {"video": [frames]}})
    pictures = clip("data:video/jpeg;base64," + ",".join(base64_image(random_image(i), "JPEG") for i in range(3)))
    drawn = chat_one(llm, user_messages("What's in this video?", pictures))
    with openai_client(llm) as client:
        messages = user_messages("What's in this video?", link)
        assert same_tokens(
            offline,
            complete_chat(client, messages),
            complete_chat(client, user_messages("What's in this video?", clip(data_of(whole)))),
        )
        assert same_tokens(drawn, complete_chat(client, user_messages("What's in this video?", pictures)))
        assert same_tokens(two, complete_chat(client, messages, media_io_kwargs=few))
        by_rate = complete_chat(
            client, messages, media_io_kwargs={"video": {"fps": 1}}
        )  # of 2.6 s, and no default num_frames
        assert same_tokens(two, by_rate)
        for wrong in ({"num_frames": 0}, {"num_frames": "many"}, {"fps": "fast"}, {"video_backend": "none"}):
            with pytest.raises(openai.BadRequestError, match=next(iter(wrong))):
                complete_chat(client, messages, media_io_kwargs={"video": wrong})
        with pytest.raises(openai.BadRequestError, match="Could not open video stream"):
            complete_chat(client, user_messages(clip(data_of(b"no film"))))
        assert same_tokens(offline, complete_chat(client, messages))
    (seen, _), (seen_of_two, _) = token_ids_of(offline, two)
    assert (len(seen) - len(seen_of_two)) % 2 == 0 and len(seen) > len(seen_of_two)


def test_frame_recovery(make_llm_of: MakeOf, film: Film) -> None:
    """`--media-io-kwargs '{"video": {"frame_recovery": true}}'`: the next good frame replaces a lost one, unless
    a request turns it off."""
    broken = film(17)
    kept, mended = (VideoMediaIO(num_frames=8, frame_recovery=mend).load_bytes(broken) for mend in (False, True))
    assert [len(frames) for frames, _ in (kept, mended)] == [7, 8]
    llm = make_llm_of("qwen2_vl", """--media-io-kwargs '{"video": {"frame_recovery": true, "num_frames": 8}}'""")
    messages = user_messages("What?", clip(data_of(broken)))
    told = chat_one(llm, messages)
    want = [
        generate_one(llm, {"prompt": told.prompt, "multi_modal_data": {"video": [each]}}) for each in (kept, mended)
    ]
    assert same_tokens(told, want[1]) and not same_tokens(*want)
    with openai_client(llm) as client:
        assert same_tokens(want[1], complete_chat(client, messages))
        assert same_tokens(
            want[0], complete_chat(client, messages, media_io_kwargs={"video": {"frame_recovery": False}})
        )


def test_audio_of_a_video(shared_llm: Shared, site: Site, tmp_path: Path) -> None:
    """`use_audio_in_video` in `mm_processor_kwargs`: the video's audio track is used, also from the cache."""
    file = tmp_path / "sounding.mp4"
    sources = ["-f", "lavfi", "-i", "testsrc=s=84x56:r=4:d=1", "-f", "lavfi", "-i", "sine=f=300:r=16000:d=1"]
    coded = ["-c:v", "libx264", "-pix_fmt", "yuv420p", "-c:a", "aac"]
    subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", *sources, *coded, str(file)], check=True)
    site.pages["/sounding.mp4"] = file.read_bytes()
    llm = shared_llm("qwen2_5_omni")
    messages = user_messages(clip(site.url("/sounding.mp4"), uuid="sounding"), "What?")
    io_kwargs: dict[str, Any] = {"media_io_kwargs": {"video": {"num_frames": 2}}}
    kwargs: dict[str, Any] = {**io_kwargs, "mm_processor_kwargs": {"use_audio_in_video": True}}
    offline, silent = chat_one(llm, messages, **kwargs), chat_one(llm, messages, **io_kwargs)
    again = user_messages({"type": "video_url", "video_url": None, "uuid": "sounding"}, "What?")
    with openai_client(llm) as client:
        answers = [complete_chat(client, messages, **kwargs), complete_chat(client, again, **kwargs)]
        assert same_tokens(offline, *answers)
        assert same_tokens(silent, complete_chat(client, messages, **io_kwargs)) and not same_tokens(silent, offline)
    (heard_tokens, _), (seen_tokens, _) = token_ids_of(offline, silent)
    assert len(heard_tokens) > len(seen_tokens)
