"""GraphHANConv's arithmetic as dense masked attention: same weights, padded batches, no scatter.

Every request is on one endpoint, so its attention score needs only that endpoint's part, and
a softmax over the requests of each endpoint is two products with the (E, R) table of who is
where. Scores are limited, so the largest need not be taken off first. Works with any leading
dimensions, or none; padded requests are in no row of the table, padded endpoints masked.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pointsman_learning.han.conv import SCORE_LIMIT, GraphHANConv
from pointsman_learning.han.graphs import RELATIONS

if TYPE_CHECKING:
    from pointsman_learning.han.graphs import PaddedBatch

_RUNNING, _WAITING, _TO_ENDPOINT, _TO_REQUEST = ("__".join(name) for name in RELATIONS)
_TINY = 1e-16
"""As in PyG's softmax."""


@dataclass(frozen=True, slots=True)
class Links:
    """Which nodes are linked, as numbers 0 and 1."""

    eligible: Tensor
    """(…, E, 1) endpoints that are in the graph"""
    share: Tensor
    """(…, E, 1) the same over their number"""
    running: Tensor
    """(…, E, R1) where each running request is"""
    waiting: Tensor
    """(…, E, R2)"""

    @classmethod
    def of(cls, batch: "PaddedBatch") -> "Links":
        """Of a batch, or of one graph without its leading dimension."""
        eligible = batch.eligible.to(batch.endpoint.dtype).unsqueeze(-1)
        return cls(
            eligible=eligible,
            share=eligible / eligible.sum(dim=-2, keepdim=True).clamp(min=1.0),
            running=_table(batch.running_endpoint, eligible),
            waiting=_table(batch.waiting_endpoint, eligible),
        )


def _table(where: Tensor, eligible: Tensor) -> Tensor:
    """(…, R) numbers of endpoints to (…, E, R) zeros and ones."""
    numbers = torch.arange(eligible.shape[-2], device=where.device).unsqueeze(-1)
    return (where.unsqueeze(-2) == numbers).to(eligible.dtype)


def han_layer(conv: GraphHANConv, h: dict[str, Tensor], links: Links) -> dict[str, Tensor]:
    """New embeddings of endpoints (…, E, d) and of the request (…, 1, d)."""
    x = {kind: conv.proj[kind](rows) for kind, rows in h.items()}  # (…, N, d)
    running = _attend(conv, _RUNNING, x["running"], x["endpoint"], links.running)
    waiting = _attend(conv, _WAITING, x["waiting"], x["endpoint"], links.waiting)
    # There is one request: its attention is 1 everywhere.
    told = torch.relu(x["request"]).expand_as(running)
    everywhere = links.eligible.transpose(-1, -2)  # (…, 1, E)
    request = _attend(conv, _TO_REQUEST, x["endpoint"], x["request"], everywhere)
    return {"endpoint": _weigh(conv, [running, waiting, told], links.share), "request": request}


def _attend(conv: Any, relation: str, source: Tensor, target: Tensor, links: Tensor) -> Tensor:  # noqa: ANN401
    """(…, T, d) what the sources (…, S, d) tell the targets (…, T, d) they are linked to."""
    heads = conv.heads
    from_source = source @ _blocks(conv.lin_src[relation])  # (…, S, heads)
    from_target = target @ _blocks(conv.lin_dst[relation])  # (…, T, heads)
    score = from_source + links.transpose(-1, -2) @ from_target  # (…, S, heads)
    score = torch.nn.functional.leaky_relu(score, conv.negative_slope)
    weight = torch.exp(score.clamp(-SCORE_LIMIT, SCORE_LIMIT))
    shape = (*source.shape[:-1], heads, source.shape[-1] // heads)
    parts = source.reshape(shape) * weight.unsqueeze(-1)  # (…, S, heads, d/heads)
    told = links @ parts.flatten(-2)  # (…, T, d)
    weights = links @ weight + _TINY  # (…, T, heads)
    shape = (*target.shape[:-1], heads, target.shape[-1] // heads)
    mean = told.reshape(shape) / weights.unsqueeze(-1)
    return torch.relu(mean.flatten(-2))


def _blocks(vector: Tensor) -> Tensor:
    """(1, heads, size) one vector per head to (heads x size, heads), so that x @ it scores."""
    heads = vector.shape[1]
    eye = torch.eye(heads, device=vector.device, dtype=vector.dtype)
    return (vector[0].unsqueeze(-1) * eye.unsqueeze(1)).flatten(0, 1)


def _weigh(conv: Any, outs: list[Tensor], share: Tensor) -> Tensor:  # noqa: ANN401
    """(…, E, d) relations weighed by semantic attention, its mean over the graph's endpoints."""
    keys = [torch.tanh(conv.k_lin(out)) * share for out in outs]
    scores = [(key.sum(dim=-2, keepdim=True) * conv.q).sum(dim=-1, keepdim=True) for key in keys]
    weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1)  # (…, 1, 3)
    return torch.stack(outs, dim=-1).mul(weights.unsqueeze(-2)).sum(dim=-1)
