"""Videos with their sound in a prompt: `<audio start> ... <audio end>` with the embeddings of both interleaved by time.

The sound of a video is an audio item of the same prompt. Audio items go to placeholders and to videos in the order of
the prompt; without audio placeholders, the n-th video has the n-th audio item.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from mmjax.processors.base import ExpandedPrompt, MediaItem, PlaceholderSpan, expand_placeholders, placeholder_mismatch
from mmjax.types import RequestError

VIDEO_WITH_AUDIO = -1  # stands for a video and its sound while the rest of the prompt is expanded
Items = Mapping[str, Sequence[MediaItem]]
EmbedRun = tuple[str, int, int]  # modality, first embedding, number of embeddings


@dataclasses.dataclass(frozen=True)
class AudioInVideoExpander:
    """Expands prompts in which every video comes with its sound.

    placeholder_ids, placeholder_text: as for `expand_placeholders`. bos_id, eos_id: the tokens around the embeddings of
    a video and its sound. interleave: the order of the embeddings of the two.
    """

    placeholder_ids: Mapping[str, int]
    placeholder_text: Mapping[str, str]
    bos_id: int
    eos_id: int
    interleave: Callable[[MediaItem, MediaItem], list[EmbedRun]]

    def expand(self, token_ids: Sequence[int], items: Items) -> ExpandedPrompt:
        """A token for every embedding of each item. A prompt that is expanded already is returned as it is.

        RequestError when placeholders and items do not match, or a video has no sound.
        """
        videos, audios = items["video"], items.get("audio", ())
        if len(audios) < len(videos):
            raise RequestError(
                f"use_audio_in_video: {len(videos)} video(s) need an audio item each, which is their sound, but "
                f"{len(audios)} audio item(s) were given.",
                "audio_in_video",
            )
        folded, audio_of = self._fold(list(token_ids), videos, audios)
        other_audios = [index for index in range(len(audios)) if index not in audio_of]
        others = {**items, "video": (), "audio": [audios[index] for index in other_audios]}
        expanded = expand_placeholders(folded, others, self.placeholder_ids, self.placeholder_text)
        runs = [self.interleave(video, audios[index]) for video, index in zip(videos, audio_of, strict=True)]
        return self._unfold(expanded, runs, audio_of, other_audios)

    def _fold(
        self, token_ids: list[int], videos: Sequence[MediaItem], audios: Sequence[MediaItem]
    ) -> tuple[list[int], list[int]]:
        """The prompt with one VIDEO_WITH_AUDIO per video, expanded or not, and the index of each one's audio item."""
        video_id, audio_id = self.placeholder_ids["video"], self.placeholder_ids["audio"]
        found, found_audio = token_ids.count(video_id), token_ids.count(audio_id)
        mismatch = placeholder_mismatch("video", len(videos), found, self.placeholder_text["video"])
        is_expanded = found == sum(item.num_embeds for item in videos) and found_audio == sum(
            item.num_embeds for item in audios
        )
        # every other audio item is one placeholder, or else a run of them
        audio_is_single = found_audio == len(audios) - len(videos)
        folded: list[int] = []
        audio_of: list[int] = []
        at = num_audios = 0
        while at < len(token_ids):
            here = token_ids[at : at + 2]
            if here == [self.bos_id, video_id] if is_expanded else here[0] == video_id:
                if len(audio_of) == len(videos):
                    raise mismatch
                if num_audios >= len(audios):
                    raise placeholder_mismatch(
                        "audio", len(audios) - len(videos), found_audio, self.placeholder_text["audio"]
                    )
                run = self._expand(videos[len(audio_of)], audios[num_audios]) if is_expanded else [video_id]
                if token_ids[at : at + len(run)] != run:
                    raise mismatch
                audio_of.append(num_audios)
                folded.append(VIDEO_WITH_AUDIO)
                at += len(run)
                num_audios += 1
            else:
                num_audios += here[0] == audio_id and (audio_is_single or token_ids[at - 1 : at] != [audio_id])
                folded.append(here[0])
                at += 1
        if len(audio_of) != len(videos):
            raise mismatch
        return folded, audio_of

    def _expand(self, video: MediaItem, audio: MediaItem) -> list[int]:
        """The tokens of a video and its sound."""
        runs = self.interleave(video, audio)
        embeds = [self.placeholder_ids[modality] for modality, _, count in runs for _ in range(count)]
        return [self.bos_id, *embeds, self.eos_id]

    def _unfold(
        self,
        folded: ExpandedPrompt,
        runs: Sequence[list[EmbedRun]],
        audio_of: Sequence[int],
        other_audios: Sequence[int],
    ) -> ExpandedPrompt:
        """Replace the n-th VIDEO_WITH_AUDIO by the n-th video and its sound; other_audios: indices of all others."""
        out: list[int] = []
        spans: list[PlaceholderSpan] = []
        waiting, video = collections.deque(folded.spans), 0
        for at, token in enumerate(folded.token_ids):
            if waiting and waiting[0].start == at:
                span = waiting.popleft()
                index = other_audios[span.item_index] if span.modality == "audio" else span.item_index
                spans.append(dataclasses.replace(span, start=len(out), item_index=index))
            if token != VIDEO_WITH_AUDIO:
                out.append(token)
                continue
            out.append(self.bos_id)
            for modality, first, count in runs[video]:
                index = video if modality == "video" else audio_of[video]
                spans.append(PlaceholderSpan(len(out), count, modality, index, first))
                out += [self.placeholder_ids[modality]] * count
            out.append(self.eos_id)
            video += 1
        return ExpandedPrompt(out, spans)
