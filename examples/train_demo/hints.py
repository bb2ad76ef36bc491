"""What training adds to the answers: what is where in a picture, token by token.

From answers alone a model this small learns what is easy and then stands still: which of two things is further left is
one word in a sentence, and nothing says of which tokens it must be told. The scenes are known, so linear readouts,
thrown away after training, ask each token of a picture where it is, what covers it and where that is, and each word
that names a thing where this is. The tower alone cannot know places: its attention only knows distances, and on an even
ground one token sees what another does. The decoder can, from how far a token is from the mark before the picture.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from batches import Form

SHAPES = slice(10, None)  # in a row of `Batch.things`


class Hints(torch.nn.Module):  # type: ignore[misc, unused-ignore]
    """Readouts of what the tower gives (which shape, if any; its colour), of the decoder's first layer (where a token
    of the picture is itself) and of its second (the shape again; whether its centre is here; where that is; and of
    words that name a thing, where this is)."""

    def __init__(self, width: int, shapes: int) -> None:
        super().__init__()
        self.shapes = shapes
        self.seen = torch.nn.Linear(width, shapes + 1 + 3)
        self.placed = torch.nn.Linear(width, 2)
        self.thought = torch.nn.Linear(width, shapes + 1 + 1 + 2)
        self.named = torch.nn.Linear(width, 2)

    def forward(
        self,
        form: Form,
        given: Mapping[str, torch.Tensor],
        features: torch.Tensor,
        early: torch.Tensor,
        middle: torch.Tensor,
    ) -> torch.Tensor:
        """Mean loss. given: what `Fast.given` makes of a batch; features [N, tokens, width] of N pictures; early and
        middle [N * tokens, width]: the same tokens after the decoder's first and second layer."""
        label, color, centre, place, own = targets(form, given, self.shapes)
        covered = label < self.shapes
        share = covered.float() / covered.sum().clamp(min=1)
        seen, thought = self.seen(features.flatten(0, 1)).float(), self.thought(middle).float()
        kinds = self.shapes + 1
        shape = F.cross_entropy(seen[:, :kinds], label) + F.cross_entropy(thought[:, :kinds], label)
        shade = ((seen[:, kinds:] - color).abs().mean(1) * share).sum()
        here = F.binary_cross_entropy_with_logits(thought[:, kinds], centre)
        where = ((thought[:, kinds + 1 :] - place).abs().mean(1) * share).sum()
        itself = (self.placed(early).float() - own).abs().mean()
        return shape + 2 * shade + 2 * here + 4 * where + 4 * itself

    def words(self, told: torch.Tensor, spots: torch.Tensor) -> torch.Tensor:
        """Mean loss. told [K, width]: words that name things, after the second layer; spots [K, 3]: where these are,
        and 1 if the word counts or else 0."""
        sure = spots[:, 2]
        return 4 * ((self.named(told).float() - spots[:, :2]).abs().mean(1) * sure).sum() / sure.sum()


@torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
def targets(form: Form, given: Mapping[str, torch.Tensor], shapes: int) -> tuple[torch.Tensor, ...]:
    """Of every token of every picture (of pairs of frames: of the first): which shape covers it i64 (`shapes`: none),
    its colour f32 [.., 3], whether its centre is in this token f32, that centre f32 [.., 2], and the token's own, both
    0..1 in the picture.
    """
    things = given["things"][:: 2 if form.kind == "video" else 1]
    _, rows, columns = form.grid
    width, height = given["edges"]
    down, across = (
        (torch.arange(n, device=things.device) + 0.5) / n * edge for n, edge in ((rows, height), (columns, width))
    )
    own = torch.stack(torch.meshgrid(down / height, across / width, indexing="ij")[::-1], -1).flatten(0, 1)
    own = own.expand(len(things), -1, -1).flatten(0, 1)
    across = across[None, None, None, :] - things[:, :, 0, None, None]
    down = down[None, None, :, None] - things[:, :, 1, None, None]
    there = things[:, :, 9, None, None] > 0
    far = torch.where(there, torch.sqrt(across**2 + down**2) / things[:, :, 9, None, None], torch.inf)
    inside = (across.abs() <= width / columns / 2) & (down.abs() <= height / rows / 2) & there
    far = torch.where(inside, far - 100, far).flatten(2)  # a thing smaller than its token is there all the same
    least, near = far.min(1)
    mine = things.gather(1, near[:, :, None].expand(-1, -1, things.shape[2])).flatten(0, 1)
    label = torch.where(least.flatten() < 0.9, mine[:, SHAPES].argmax(1), shapes)
    place = mine[:, :2] / given["edges"]
    return label, mine[:, 6:9], (least.flatten() < -50).float(), place, own
