"""The Qwen2.5-Omni thinker of transformers, run on whole batches of equal items.

transformers' own forward pass loops over the items of a batch; here the same submodules are called on arrays
[items, tokens, width]. `python examples/train_demo/check.py` compares the two, features and positions included.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from batches import Batch, Form
from hints import Hints

from mmjax.demo import paint
from mmjax.demo.scenes import SHAPES

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
Tensors = dict[str, torch.Tensor]
FILL = 16  # per row: lists of tokens are filled up to multiples of it, so that few shapes occur


def filled(array: np.ndarray, step: int, value: float = 0) -> np.ndarray:
    """With as many more rows of `value` as make the number a multiple of `step`."""
    return np.pad(array, ((0, -len(array) % step), *((0, 0),) * (array.ndim - 1)), constant_values=value)


class Fast:
    """Batch -> logits at the wanted tokens, and greedy answers."""

    def __init__(self, model: Any, device: str, end: int) -> None:
        self.hints = Hints(model.config.text_config.hidden_size, len(SHAPES)).to(device)
        self.model, self.device, self.end = model, device, end
        self.config = model.config
        home = model.model if hasattr(model.model, "visual") else model  # moved between versions of transformers
        self.visual, self.audio_tower = home.visual, home.audio_tower
        self.text = model.model.language_model if home is model.model else model.model
        self.mean, self.std = (torch.tensor(v, device=device) for v in (MEAN, STD))
        self.window = torch.hann_window(400, device=device)
        self.mel = torch.from_numpy(_mel_filters()).to(device)
        c = self.config
        text = c.text_config
        sections = text.rope_parameters["mrope_section"]
        steps = torch.arange(sum(sections), device=device) / sum(sections)
        self.speeds = text.rope_parameters["rope_theta"] ** -steps  # of every pair of dimensions, radians per position
        self.axis = torch.arange(3, device=device).repeat_interleave(torch.tensor(sections, device=device))
        self.marks = {"image": c.image_token_id, "video": c.video_token_id, "audio": c.audio_token_id}
        self.places: dict[tuple[int, int], torch.Tensor] = {}

    def arrays(self, batch: Batch) -> dict[str, np.ndarray]:
        """All that is read of a batch. tokens i64[B, T]; positions i64[3, B, T]; media i64[M]: the flattened tokens
        that `features` replace; wanted i64[W], targets i64[W]: the flattened tokens whose successors are learnt, and
        these, or -100; told i64[K], spots f32[K, 3]: `named`, with 1 where it is meant; edges f32[2]; turns, things,
        ground, noise, sounds as in the batch, if they are there."""
        out = {"tokens": batch.tokens, "positions": self.positions(batch)}
        if batch.turns.any():
            out["turns"] = batch.turns
        if batch.kind != "text":
            out["media"] = np.flatnonzero(batch.tokens == self.marks[batch.kind])
        wanted = np.flatnonzero(batch.wanted)  # a row never starts with one
        step = FILL * len(batch.tokens)
        out["wanted"], out["targets"] = filled(wanted - 1, step), filled(batch.tokens.ravel()[wanted], step, -100)
        for name in ("things", "ground", "noise", "sounds"):
            if (array := getattr(batch, name)) is not None:
                out[name] = array
        if batch.things is not None:
            out["edges"] = np.array(batch.edges, np.float32)
        if batch.named is not None and batch.spots is not None:
            out["told"] = filled(batch.named, step)
            out["spots"] = filled(np.pad(batch.spots, ((0, 0), (0, 1)), constant_values=1), step)
        return out

    def put(self, array: np.ndarray) -> torch.Tensor:
        """On the device, without waiting for what runs there."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device == "cuda" else tensor

    def given(self, batch: Batch) -> Tensors:
        """`arrays` on the device; of sounds, in their place, mel f32[B, 128, frames]."""
        out = {name: self.put(array) for name, array in self.arrays(batch).items()}
        if "sounds" in out:
            sounds = out.pop("sounds").float() / 32767
            with torch.autocast(self.device, enabled=False):  # as the processors do, in training and in tests
                out["mel"] = self.spectrum(sounds if batch.quiet else self.noisy(sounds))
        return out

    # -- features: the formulas of transformers' processors ----------------------------------------------------------

    def pixels(self, form: Form, given: Tensors) -> torch.Tensor:
        """[N, H, W, 3] in 0..1, rounded to bytes."""
        _, rows, columns = form.grid
        x, y = (
            (torch.arange(count, device=self.device) + 0.5) / count * edge
            for count, edge in zip((columns * 28, rows * 28), given["edges"], strict=True)
        )
        out = paint.paint(torch, given["things"], given["ground"], x, y)
        out += torch.randn(out.shape, device=self.device) * given["noise"][:, None, None, None]
        return (out.clip(0, 1) * 255).round() / 255

    def patches(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames [2N, H, W, 3] in 0..1 -> [N, patches in merge-block order, 1176]."""
        frames = (frames - self.mean) / self.std
        n, h, w, _ = frames.shape
        cut = frames.reshape(n // 2, 2, h // 28, 2, 14, w // 28, 2, 14, 3)
        return cut.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(n // 2, h * w // 196, 1176)

    def noisy(self, sounds: torch.Tensor) -> torch.Tensor:
        """float32 [B, samples] with noise of its own in most rows, half of it mostly low."""
        rows = (len(sounds), 1)
        noise = torch.randn_like(sounds)
        tilted = torch.fft.rfft(noise)
        tilted /= torch.sqrt(torch.arange(tilted.shape[1], device=self.device) + 20)
        low = torch.rand(rows, device=self.device) < 0.5
        noise = torch.where(low, torch.fft.irfft(tilted, noise.shape[1]), noise)
        level = 10 ** (-(8 + 32 * torch.rand(rows, device=self.device)) / 20)
        level = level * (torch.rand(rows, device=self.device) > 0.35)
        loud = sounds.square().mean(1, keepdim=True).sqrt()
        return (sounds + noise * level * loud / (noise.std(1, keepdim=True) + 1e-9)).clip(-1, 1)

    def spectrum(self, sounds: torch.Tensor) -> torch.Tensor:
        """float32 [B, samples] -> log mel [B, 128, samples / 160], as if padded with silence at the end."""
        padded = F.pad(sounds, (0, 480))
        wave = torch.stft(padded, 400, 160, window=self.window, return_complex=True)
        power = wave.abs() ** 2
        log = torch.clamp(self.mel.T @ power, min=1e-10).log10()
        log = torch.maximum(log, log.amax((1, 2), keepdim=True) - 8.0)
        return ((log + 4.0) / 4.0)[:, :, : sounds.shape[1] // 160]

    # -- towers ------------------------------------------------------------------------------------------------------

    def see(self, patches: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """[N, patches, 1176] of one grid (in tokens) -> [N, rows * columns, width]."""
        tower = self.visual
        if (places := self.places.get((rows, columns))) is None:
            grid = np.indices((2 * rows, 2 * columns)).reshape(2, rows, 2, columns, 2).transpose(0, 1, 3, 2, 4)
            places = self.places[rows, columns] = torch.from_numpy(grid.reshape(2, -1).T.copy()).to(self.device)
        cos, sin = (part[None, :, None] for part in tower.rotary_pos_emb(patches, places))
        span = tower.window_size // tower.patch_size
        home = places[:, 0] // span * 1000 + places[:, 1] // span
        near = None if max(rows, columns) * 2 <= span else home[:, None] == home[None]
        x = F.linear(patches, tower.patch_embed.proj.weight.flatten(1)).float()
        n, length, _ = x.shape
        for index, block in enumerate(tower.blocks):
            y = _norm(x, block.norm1)
            a = block.attn
            q, k, v = (part(y).view(n, length, a.num_heads, -1) for part in (a.q, a.k, a.v))
            q, k = (_turn(part, cos, sin).to(v.dtype) for part in (q, k))
            mask = None if index in tower.fullatt_block_indexes else near
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            x = x + a.proj(y.transpose(1, 2).reshape(n, length, -1))
            x = x + block.mlp(_norm(x, block.norm2))
        return tower.merger.mlp(_norm(x, tower.merger.ln_q).reshape(n, length // 4, -1))

    def listen(self, mel: torch.Tensor) -> torch.Tensor:
        """[B, 128, frames] -> [B, tokens, width]."""
        tower = self.audio_tower
        size = 2 * tower.n_window
        count, bands, frames = mel.shape
        whole = frames // size
        parts = []
        if whole:
            chunks = mel[:, :, : whole * size].reshape(count, bands, whole, size).transpose(1, 2).flatten(0, 1)
            parts.append(self._chunks(chunks).reshape(count, whole * tower.n_window, -1))
        if frames % size:
            parts.append(self._chunks(mel[:, :, whole * size :]))
        x = torch.cat(parts, 1)
        x = x[:, : x.shape[1] // 2 * 2]
        x = (x[:, ::2] + x[:, 1::2]) / 2
        return tower.proj(tower.ln_post(x))

    def _chunks(self, mel: torch.Tensor) -> torch.Tensor:
        tower = self.audio_tower
        x = F.gelu(tower.conv2(F.gelu(tower.conv1(mel)))).transpose(1, 2)
        x = x + tower.positional_embedding.positional_embedding[: x.shape[1]].to(self.device)
        n, length, _ = x.shape
        for layer in tower.layers:
            y = layer.self_attn_layer_norm(x)
            a = layer.self_attn
            q, k, v = (p(y).view(n, length, a.num_heads, -1).transpose(1, 2) for p in (a.q_proj, a.k_proj, a.v_proj))
            y = F.scaled_dot_product_attention(q, k, v)
            x = x + a.out_proj(y.transpose(1, 2).reshape(n, length, -1))
            x = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
        return x

    # -- the language model ------------------------------------------------------------------------------------------

    def positions(self, batch: Batch) -> np.ndarray:
        """i64[3, B, T] rotary positions of rows whose items all have the batch's grid."""
        tokens = batch.tokens
        place = batch.places if batch.turns.any() else np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        if batch.kind in ("text", "audio"):
            return np.repeat(place[None], 3, 0)
        t, h, w = batch.grid
        places = np.indices((t, h, w)).reshape(3, -1)
        places[0] = (np.arange(t, dtype=np.float32) * np.float32(batch.seconds) * 25).astype(np.int64).repeat(h * w)
        each, extent = t * h * w, int(places.max()) + 1
        media = tokens == self.marks[batch.kind]
        before = media.cumsum(1) - media
        base = place - before + before // each * extent
        return np.where(media, base + places[:, before % each], base)

    def features(self, form: Form, given: Tensors) -> torch.Tensor | None:
        """What the towers give, in the order of the batch's tokens."""
        if form.kind == "text":
            return None
        if form.kind == "audio":
            return self.listen(given["mel"])
        with torch.no_grad():
            frames = self.pixels(form, given)
            patches = self.patches(frames if form.kind == "video" else frames.repeat_interleave(2, 0))
        return self.see(patches, *form.grid[1:])

    def states(self, given: Tensors, features: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[B, T, width] before the head, after the first layer and after the second."""
        embeds = self.text.embed_tokens(given["tokens"])
        if features is not None:
            flat = embeds.flatten(0, 1).index_copy(0, given["media"], features.flatten(0, 1).to(embeds.dtype))
            embeds = flat.view_as(embeds)
        return self.think(embeds, given["positions"], self.seen(given["turns"]) if "turns" in given else None)

    def seen(self, turns: torch.Tensor) -> torch.Tensor:
        """bool [B, 1, T, T]: which tokens each one sees."""
        before = torch.ones(turns.shape[1], turns.shape[1], dtype=torch.bool, device=self.device).tril()
        return (before & ((turns[:, None] == 0) | (turns[:, None] == turns[:, :, None])))[:, None]

    def think(
        self, x: torch.Tensor, positions: torch.Tensor, seen: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The decoder's layers on [B, T, width] at positions [3, B, T]: what the last gives, normed, and what the
        first and the second do. Rows end in what nobody looks at."""
        angle = positions.permute(1, 2, 0)[..., self.axis] * self.speeds
        cos, sin = (torch.cat((part, part), -1)[:, :, None] for part in (angle.cos(), angle.sin()))
        b, t, _ = x.shape
        for layer in self.text.layers:
            a, y = layer.self_attn, _norm(x, layer.input_layernorm)
            q, k, v = (part(y).view(b, t, -1, a.head_dim) for part in (a.q_proj, a.k_proj, a.v_proj))
            q, k = (_turn(part, cos, sin).to(v.dtype) for part in (q, k))
            k, v = (part.repeat_interleave(q.shape[2] // part.shape[2], 2) for part in (k, v))
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None)
            x = x + a.o_proj(y.transpose(1, 2).reshape(b, t, -1))
            x = x + layer.mlp(_norm(x, layer.post_attention_layernorm))
            if layer is self.text.layers[0]:
                early = x
            elif layer is self.text.layers[1]:
                middle = x
        return _norm(x, self.text.norm), early, middle

    def loss(self, form: Form, given: Tensors) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean cross entropy of the wanted tokens, the loss of the hints, and the share of tokens predicted right.
        Waits for nothing, reads nothing of the host's and needs no cuFFT: a GPU may record it."""
        features = self.features(form, given)
        hidden, early, middle = self.states(given, features)
        logits = self.model.lm_head(hidden.flatten(0, 1).index_select(0, given["wanted"])).float()
        loss = F.cross_entropy(logits, given["targets"])
        hint = torch.zeros_like(loss)
        if "things" in given and features is not None:
            early, middle = early.flatten(0, 1), middle.flatten(0, 1)
            media = given["media"]
            hint = self.hints(form, given, features, early.index_select(0, media), middle.index_select(0, media))
            if "told" in given:
                hint = hint + self.hints.words(middle.index_select(0, given["told"]), given["spots"])
        meant = given["targets"] >= 0
        return loss, hint, ((logits.argmax(-1) == given["targets"]) & meant).sum() / meant.sum()

    @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def answer(self, batch: Batch, most: int = 32) -> list[list[int]]:
        """Greedy tokens of every row after its question, without the end mark."""
        first = batch.wanted.argmax(1)
        room = int(first.max()) + most
        rows = np.zeros((len(first), room), np.int64)
        rows[:, : batch.tokens.shape[1]] = batch.tokens[:, :room]
        rows[np.arange(room)[None] >= first[:, None]] = 0
        given = self.given(dataclasses.replace(batch, tokens=rows, wanted=np.zeros_like(rows, bool)))
        tokens, starts = given["tokens"], torch.from_numpy(first).to(self.device)
        features = self.features(batch.form, given)
        end, each = self.end, torch.arange(len(starts), device=self.device)
        answered = torch.arange(room, device=self.device)[None] >= starts[:, None]
        for step in range(most):
            hidden, *_ = self.states(given, features)
            logits = self.model.lm_head(hidden[each, starts + step - 1])
            logits[:, list(self.marks.values())] = -torch.inf  # would be taken for one more item
            tokens[each, starts + step] = logits.argmax(-1)
            if bool(((tokens == end) & answered).any(1).all()):
                break
        out = []
        for row, start in zip(tokens.tolist(), starts.tolist(), strict=True):
            said = row[start : start + most]
            out.append(said[: said.index(end)] if end in said else said)
        return out


def published(name: str) -> str:
    """A parameter's name in published checkpoints, whatever this version of transformers calls it."""
    for prefix, other in (("visual.", "visual."), ("audio_tower.", "audio_tower."), ("language_model.", "model.")):
        if name.startswith(f"model.{prefix}"):
            name = other + name.removeprefix(f"model.{prefix}")
            break
    return f"thinker.{name}"


def _norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    """What transformers' RMSNorm does, in one kernel."""
    return F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x = x.float()
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _mel_filters() -> np.ndarray:
    """float32 [201, 128]: Slaney's triangles from 0 to 8 kHz, of equal area."""

    def hertz(mel: np.ndarray) -> np.ndarray:
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp(np.log(6.4) / 27 * (mel - 15)))

    top = 15 + 27 * np.log(8) / np.log(6.4)
    edges = hertz(np.linspace(0, top, 130))
    bins = np.linspace(0, 8000, 201)
    down = -(edges[None, :-2] - bins[:, None]) / np.diff(edges)[None, :-1]
    up = (edges[None, 2:] - bins[:, None]) / np.diff(edges)[None, 1:]
    return (np.maximum(0, np.minimum(down, up)) * 2 / (edges[2:] - edges[:-2])).astype(np.float32)
