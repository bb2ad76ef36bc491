"""Videos with their sound in a prompt: `<audio start> ... <audio end>` with rows of both, which take turns by time.

The sound of a video is an audio item of the same prompt. Items of sound go to placeholders and to videos in the order
of the prompt; without placeholders of their own, the n-th video has the n-th of them.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence

from mmjax.processors.base import ExpandedPrompt, MediaItem, PlaceholderSpan, expand_placeholders, placeholder_mismatch
from mmjax.types import RequestError

CLIP = -1  # stands for a video with its sound while the rest of the prompt is expanded
Items = Mapping[str, Sequence[MediaItem]]
EmbedRun = tuple[str, int, int]  # kind, first row, rows


@dataclasses.dataclass(frozen=True)
class AudioInVideo:
    """Expands prompts in which every video comes with its sound.

    markers, placeholder: as for `expand_placeholders`. bos, eos: the tokens around the rows. turns: the order of the
    rows of a video and its sound.
    """

    placeholder_ids: Mapping[str, int]
    placeholder_text: Mapping[str, str]
    bos: int
    eos: int
    turns: Callable[[MediaItem, MediaItem], list[EmbedRun]]

    def expand(self, tokens: Sequence[int], items: Items) -> ExpandedPrompt:
        """One marker per row of each item. Prompts that are expanded already are kept. RequestError when placeholders
        and items do not match, or a video has no sound."""
        clips, sounds = items["video"], items.get("audio", ())
        if len(sounds) < len(clips):
            raise RequestError(
                f"use_audio_in_video: {len(clips)} video(s) need an audio item each, which is their sound, but "
                f"{len(sounds)} audio item(s) were given.",
                "audio_in_video",
            )
        folded, pairs = self._fold(list(tokens), clips, sounds)
        alone = [index for index in range(len(sounds)) if index not in pairs]
        rest = {**items, "video": (), "audio": [sounds[index] for index in alone]}
        expanded = expand_placeholders(folded, rest, self.placeholder_ids, self.placeholder_text)
        turns = [self.turns(clip, sounds[pair]) for clip, pair in zip(clips, pairs, strict=True)]
        return self._unfold(expanded, turns, pairs, alone)

    def _fold(
        self, tokens: list[int], clips: Sequence[MediaItem], sounds: Sequence[MediaItem]
    ) -> tuple[list[int], list[int]]:
        """The prompt with one CLIP per video with its sound, expanded or not, and the index of each one's sound."""
        video, audio = self.placeholder_ids["video"], self.placeholder_ids["audio"]
        found, heard_alone = tokens.count(video), tokens.count(audio)
        wrong = placeholder_mismatch("video", len(clips), found, self.placeholder_text["video"])
        whole = found == sum(item.num_embeds for item in clips) and heard_alone == sum(
            item.num_embeds for item in sounds
        )
        single = heard_alone == len(sounds) - len(clips)  # every other sound is one marker, or else a run of them
        folded: list[int] = []
        pairs: list[int] = []
        at = heard = 0
        while at < len(tokens):
            here = tokens[at : at + 2]
            if here == [self.bos, video] if whole else here[0] == video:
                if len(pairs) == len(clips):
                    raise wrong
                if heard >= len(sounds):
                    raise placeholder_mismatch(
                        "audio", len(sounds) - len(clips), heard_alone, self.placeholder_text["audio"]
                    )
                run = self._run(clips[len(pairs)], sounds[heard]) if whole else [video]
                if tokens[at : at + len(run)] != run:
                    raise wrong
                pairs.append(heard)
                folded.append(CLIP)
                at += len(run)
                heard += 1
            else:
                heard += here[0] == audio and (single or tokens[at - 1 : at] != [audio])
                folded.append(here[0])
                at += 1
        if len(pairs) != len(clips):
            raise wrong
        return folded, pairs

    def _run(self, clip: MediaItem, sound: MediaItem) -> list[int]:
        """What becomes of a video's marker."""
        rows = [self.placeholder_ids[modality] for modality, _, count in self.turns(clip, sound) for _ in range(count)]
        return [self.bos, *rows, self.eos]

    def _unfold(
        self, folded: ExpandedPrompt, turns: Sequence[list[EmbedRun]], pairs: Sequence[int], alone: Sequence[int]
    ) -> ExpandedPrompt:
        """Put the n-th video and its sound where the n-th CLIP is; `alone`: the indices of all other sounds."""
        tokens: list[int] = []
        spans: list[PlaceholderSpan] = []
        waiting, clip = collections.deque(folded.spans), 0
        for at, token in enumerate(folded.token_ids):
            if waiting and waiting[0].start == at:
                span = waiting.popleft()
                index = alone[span.item_index] if span.modality == "audio" else span.item_index
                spans.append(dataclasses.replace(span, start=len(tokens), item_index=index))
            if token != CLIP:
                tokens.append(token)
                continue
            tokens.append(self.bos)
            for modality, first, rows in turns[clip]:
                spans.append(
                    PlaceholderSpan(len(tokens), rows, modality, clip if modality == "video" else pairs[clip], first)
                )
                tokens += [self.placeholder_ids[modality]] * rows
            tokens.append(self.eos)
            clip += 1
        return ExpandedPrompt(tokens, spans)
