"""PyG's HANConv with what several graphs in one batch need."""

import warnings
from typing import Optional

import torch
from torch import Tensor

with warnings.catch_warnings():
    # PyG compiles some of its helpers by what newer releases of torch call deprecated.
    warnings.simplefilter("ignore", FutureWarning)
    from torch_geometric.nn import HANConv
    from torch_geometric.utils import scatter, softmax

SCORE_LIMIT = 20.0
"""Attention scores beyond it are cut off, so that exp() is safe without knowing the largest."""


class GraphHANConv(HANConv):  # type: ignore[misc]
    """HANConv whose semantic attention is each graph's own.

    The original averages over all nodes of a batch: an answer would depend on its batch-mates
    (and on padding). Here each graph weighs its relations by the mean over its own nodes.
    """

    def forward(
        self,
        x_dict: dict[str, Tensor],
        edge_index_dict: dict[tuple[str, str, str], Tensor],
        batch_dict: dict[str, Tensor],
        graphs: int,
    ) -> dict[str, Tensor]:
        """New features of the node types that some relation points to.

        ``batch_dict`` holds each node's graph, of ``graphs`` in all.
        """
        heads, size = self.heads, self.out_channels // self.heads
        x = {kind: self.proj[kind](rows).view(-1, heads, size) for kind, rows in x_dict.items()}
        found: dict[str, list[Tensor]] = {}
        for relation, edges in edge_index_dict.items():
            source, _, target = relation
            name = "__".join(relation)
            alpha = (
                (x[source] * self.lin_src[name]).sum(dim=-1),
                (x[target] * self.lin_dst[name]).sum(dim=-1),
            )
            out = self.propagate(edges, x=(x[source], x[target]), alpha=alpha)
            found.setdefault(target, []).append(torch.relu(out))
        return {
            kind: self._weigh(torch.stack(outs), batch_dict[kind], graphs)
            for kind, outs in found.items()
        }

    def _weigh(self, outs: Tensor, graph: Tensor, graphs: int) -> Tensor:
        """(relations, N, d) to (N, d): semantic attention."""
        keys = torch.tanh(self.k_lin(outs))
        mean = scatter(keys, graph, dim=1, dim_size=graphs, reduce="mean")
        weights = torch.softmax((self.q * mean).sum(-1), dim=0)  # (relations, graphs)
        told: Tensor = (weights[:, graph, None] * outs).sum(dim=0)
        return told

    def message(
        self,
        x_j: Tensor,
        alpha_i: Tensor,
        alpha_j: Tensor,
        index: Tensor,
        ptr: Optional[Tensor],  # noqa: UP045 - PyG reads annotations and knows only this form
        size_i: Optional[int],  # noqa: UP045
    ) -> Tensor:
        """As in HANConv, but for the limit on scores."""
        alpha = torch.nn.functional.leaky_relu(alpha_j + alpha_i, self.negative_slope)
        alpha = softmax(alpha.clamp(-SCORE_LIMIT, SCORE_LIMIT), index, ptr, size_i)
        weighted: Tensor = (x_j * alpha.unsqueeze(-1)).flatten(-2)
        return weighted
