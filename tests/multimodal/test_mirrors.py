"""Names that scripts for vLLM import: such a script only needs its imports changed."""

import io
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmjax.assets.audio import AudioAsset
from mmjax.assets.image import ImageAsset
from mmjax.assets.video import VideoAsset
from mmjax.multimodal import audio
from mmjax.multimodal.image import MediaWithBytes, convert_image_mode, unwrap
from mmjax.multimodal.media import AudioMediaIO, ImageEmbeddingMediaIO, ImageMediaIO, VideoMediaIO
from mmjax.multimodal.utils import (
    encode_audio_base64,
    encode_audio_url,
    encode_image_base64,
    encode_image_url,
    encode_video_url,
    fetch_audio,
    fetch_image,
    fetch_video,
)
from mmjax.types import RequestError
from mmjax.utils.serial_utils import tensor2base64

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)

NAMES = {
    "assets.audio": "AudioAsset",
    "assets.image": "ImageAsset",
    "assets.video": "VideoAsset",
    "inputs": "TextPrompt TokensPrompt EmbedsPrompt ExplicitEncoderDecoderPrompt SingletonPrompt PromptType "
    "MultiModalDataDict MultiModalUUIDDict",
    "multimodal.audio": "split_audio find_split_point normalize_audio AudioSpec ChannelReduction AudioResampler "
    "MONO_AUDIO_SPEC PASSTHROUGH_AUDIO_SPEC get_audio_duration",
    "multimodal.image": "convert_image_mode",
    "multimodal.media": "MediaConnector MEDIA_CONNECTOR_REGISTRY ImageMediaIO VideoMediaIO AudioMediaIO MediaIO "
    "MediaWithBytes ImageEmbeddingMediaIO AudioEmbeddingMediaIO",
    "multimodal.media.audio": "AudioMediaIO",
    "multimodal.media.base": "MediaIO MediaWithBytes",
    "multimodal.media.connector": "MediaConnector",
    "multimodal.media.image": "ImageMediaIO",
    "multimodal.media.video": "VideoMediaIO",
    "multimodal.utils": "fetch_image fetch_audio fetch_video encode_image_base64 encode_image_url encode_audio_base64 "
    "encode_audio_url encode_video_base64 encode_video_url",
    "utils.serial_utils": "tensor2base64 base642tensor",
}


@pytest.mark.parametrize("module", NAMES)
def test_names(module: str) -> None:
    found = import_module(f"mmjax.{module}")
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_image_round_trip() -> None:
    picture = Image.fromarray(PIXELS)
    np.testing.assert_array_equal(np.asarray(fetch_image(encode_image_url(picture))), PIXELS)
    assert encode_image_url(picture, format="JPEG").startswith("data:image/jpeg;base64,")
    clear = Image.new("RGBA", (4, 4))
    assert fetch_image(encode_image_url(clear, image_mode="RGBA"), {"rgba_background_color": (9, 8, 7)}).getpixel(
        (0, 0)
    ) == (9, 8, 7)
    with pytest.raises(RequestError, match="Cannot write"):
        encode_image_base64(picture, format="BONE")


def test_readers_keep_the_bytes(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    made = ImageMediaIO().load_file(tmp_path / "a.png")
    assert isinstance(made, MediaWithBytes) and made.original_bytes == (tmp_path / "a.png").read_bytes()
    assert made.size == (9, 6) and unwrap(made).mode == "RGB"  # as if it were the image
    np.testing.assert_array_equal(np.asarray(made), PIXELS)
    with pytest.raises(RequestError, match="cannot be read"):
        ImageMediaIO().load_file(tmp_path / "none.png")


def test_modes() -> None:
    clear = Image.new("RGBA", (2, 2), (10, 20, 30, 0))
    assert convert_image_mode(clear, "RGB").getpixel((0, 0)) == (255, 255, 255)
    assert convert_image_mode(clear, "RGBA") is clear
    assert convert_image_mode(Image.new("RGB", (2, 2)), "L").mode == "L"
    assert convert_image_mode(Image.new("LA", (2, 2)), "RGBA").mode == "RGBA"
    with pytest.raises(RequestError, match="image_mode"):
        convert_image_mode(clear, "nonsense")


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_audio_round_trip(kind: str) -> None:
    samples = np.linspace(-0.5, 0.5, 800, dtype=np.float32)
    made, rate = fetch_audio(encode_audio_url(samples, 8000, format=kind))
    assert rate == 8000
    np.testing.assert_allclose(made, samples, atol=1e-4)
    stereo, _ = fetch_audio(encode_audio_url(np.stack([samples, -samples]), 8000, format=kind))
    np.testing.assert_allclose(stereo, 0, atol=1e-4)
    with pytest.raises(RequestError, match="Cannot write"):
        encode_audio_base64(samples, 8000, format="BONE")


def test_video_round_trip() -> None:
    frames = np.stack([np.full((16, 16, 3), shade, np.uint8) for shade in (0, 90, 180)])
    made, metadata = fetch_video(encode_video_url(frames), {"num_frames": 2})
    np.testing.assert_allclose(made.astype(int), frames[:2], atol=3)
    assert metadata["total_num_frames"] == 2
    with pytest.raises(RequestError, match="Only JPEG"):
        encode_video_url(frames, format="PNG")


def test_embeddings() -> None:
    rows = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    reader = ImageEmbeddingMediaIO()
    np.testing.assert_array_equal(reader.load_base64("", tensor2base64(rows)), rows)
    np.testing.assert_array_equal(reader.load_base64("", reader.encode_base64(rows)), rows)
    buffer = io.BytesIO()
    np.save(buffer, rows)
    np.testing.assert_array_equal(reader.load_bytes(buffer.getvalue()), rows)


# --- channels and rates


def test_normalize_audio() -> None:
    left, right = np.random.default_rng(0).uniform(-1, 1, (2, 50)).astype(np.float32)
    stereo = np.stack([left, right])
    ways = audio.ChannelReduction
    for way, expected in (
        (ways.MEAN, (left + right) / 2),
        (ways.FIRST, left),
        (ways.MAX, np.maximum(left, right)),
        (ways.SUM, left + right),
    ):
        for layout in (stereo, stereo.T):
            made = audio.normalize_audio(layout, audio.AudioSpec(channel_reduction=way))
            assert made.shape == (50,) and made.dtype == np.float32
            np.testing.assert_allclose(made, expected, atol=1e-6)
    assert audio.normalize_audio(stereo, audio.PASSTHROUGH_AUDIO_SPEC) is stereo
    assert audio.normalize_audio(left, audio.MONO_AUDIO_SPEC) is left
    assert audio.normalize_audio(left[None], audio.MONO_AUDIO_SPEC).shape == (50,)
    assert audio.normalize_audio(left, audio.AudioSpec(1)).shape == (50,)
    np.testing.assert_array_equal(audio.normalize_audio(np.stack([left] * 3), audio.AudioSpec(2)), [left, left])
    for wrong, spec in ((np.zeros((2, 2, 2)), audio.MONO_AUDIO_SPEC), (left, audio.AudioSpec(2))):
        with pytest.raises(RequestError):
            audio.normalize_audio(wrong, spec)


@pytest.mark.parity
def test_normalize_audio_of_torch() -> None:
    import torch

    stereo = torch.tensor([[1.0, 2.0, 3.0], [3.0, 0.0, 1.0]])
    for way, expected in (("MEAN", [2, 1, 2]), ("MAX", [3, 2, 3]), ("SUM", [4, 2, 4]), ("FIRST", [1, 2, 3])):
        made = audio.normalize_audio(stereo, audio.AudioSpec(channel_reduction=audio.ChannelReduction[way]))
        assert isinstance(made, torch.Tensor) and made.tolist() == expected


def test_resampler() -> None:
    samples = np.random.default_rng(0).uniform(-1, 1, 441).astype(np.float32)
    for method in audio.AudioResampler.METHODS:
        assert audio.AudioResampler(16_000, method).resample(samples, orig_sr=44_100).shape == (160,)
    assert audio.AudioResampler(16_000).resample(samples, orig_sr=16_000) is samples
    with pytest.raises(RequestError, match="Invalid resampling method: magic"):
        audio.AudioResampler(16_000, "magic")
    with pytest.raises(RuntimeError, match="`target_sr` is not provided"):
        audio.AudioResampler().resample(samples, orig_sr=8000)
    assert audio.get_audio_duration(y=samples, sr=441) == 1


@pytest.mark.parametrize("rate", [44_101.7, 999_983, 16_000.001, 123.456])
def test_odd_rates_are_resampled_in_little_time_and_memory(rate: float) -> None:
    count = int(min(rate, 50_000) * 0.1) + 1
    made = audio.resample(np.ones(count, np.float32), rate, 16_000)
    assert abs(len(made) - count * 16_000 / rate) <= 1


# --- samples


@pytest.mark.parametrize("name", ["stop_sign", "cherry_blossom"])
def test_image_assets(name: str) -> None:
    asset = ImageAsset(name)
    picture = asset.pil_image
    assert picture.mode == "RGB" and len(set(np.asarray(picture)[::40, ::40].reshape(-1, 3).sum(axis=1))) > 3
    assert Image.open(io.BytesIO(asset.read_bytes())).format == "JPEG"
    assert name != "stop_sign" or picture.size == (1300, 876)


@pytest.mark.parametrize("name", ["mary_had_lamb", "winning_call"])
def test_audio_assets(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, rate = AudioAsset(name).audio_and_sample_rate
    assert samples.dtype == np.float32 and 5 < len(samples) / rate < 20 and 0.1 < np.abs(samples).max() <= 1
    made, same = AudioMediaIO().load_base64("audio/wav", AudioAsset(name).url.partition(",")[2])
    assert same == rate and len(made) == len(samples)
    monkeypatch.setenv("VLLM_ASSETS_CACHE", str(tmp_path / "new"))
    assert soundfile.info(AudioAsset(name).get_local_path()).samplerate == rate


def test_video_assets(shared: Path) -> None:
    asset = VideoAsset("baby_reading", num_frames=8)
    assert asset.np_ndarrays.shape == (8, 180, 320, 3) and len(asset.pil_images) == 8
    assert asset.metadata["frames_indices"] == [0, 8, 16, 25, 33, 42, 50, 59]
    assert len(asset.get_audio(8000)) == 40_000 and len(VideoAsset("baby_reading").np_ndarrays) == 60
    real = VideoAsset(str(shared / "media/video/bunny_with_speech.mp4"), num_frames=4)
    assert real.np_ndarrays.shape == (4, 144, 256, 3) and len(real.get_audio()) == 176_000


@pytest.mark.parametrize("asset", [ImageAsset, AudioAsset, VideoAsset])
def test_unknown_samples(asset: type) -> None:
    with pytest.raises(RequestError, match="asset 'nothing'"):
        asset("nothing")


def test_options_of_readers() -> None:
    assert VideoMediaIO(ImageMediaIO(), num_frames=8, fps=2).sampling.num_frames == 8
    with pytest.raises(TypeError):
        VideoMediaIO(ImageMediaIO(), frames=8)  # type: ignore[call-arg]
