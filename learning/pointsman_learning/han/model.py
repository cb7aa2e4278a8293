"""The network. Shapes at the ends of lines: B graphs, E endpoints, R requests, d the width.

One set of weights, two ways to compute with it: `forward` (dense masked attention, see
`dense`; fast, and what is exported) and `forward_pyg` (PyG's HANConv, the oracle of tests).
Only the abstract of arXiv 2508.00234 is at hand: all sizes are ours.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from pointsman_core.deciders.impact import TUNED, ImpactParameters
from pointsman_core.graph import ANALYTIC_FEATURES, FEATURES
from pointsman_learning.han import dense
from pointsman_learning.han.conv import GraphHANConv
from pointsman_learning.han.estimator import ImpactEstimator
from pointsman_learning.han.graphs import RELATIONS, PaddedBatch

if TYPE_CHECKING:
    from torch_geometric.data import HeteroData


@dataclass(frozen=True, slots=True)
class HanConfig:
    """Sizes, and what an ablation leaves out."""

    width: int = 32
    """d"""
    heads: int = 4
    layers: int = 1
    hidden: int = 64
    """Of the heads."""
    use_han: bool = True
    """False: an endpoint is told by its own features and the request's only."""
    use_impact: bool = True
    """False: neither ImpactGreedy's terms among the features nor the estimator."""
    residual: bool = True
    """Values are learned as a difference to ImpactGreedy's; False: from nothing."""
    impact: ImpactParameters = TUNED
    """Of the ImpactGreedy that the graph's analytic terms were computed with."""
    sharpness: float = 25.0
    """The untrained policy is softmax(sharpness x value): 1 / temperature."""

    def __post_init__(self) -> None:
        """Refuse what cannot be built.

        Raises:
            ValueError: says what does not fit.

        """
        sizes = (self.width, self.heads, self.hidden)
        if min(sizes) < 1 or self.layers < 1 or self.width % self.heads:
            raise ValueError(
                "width, heads, hidden and layers must be positive, width a multiple of heads;"
                f" got {self.width}, {self.heads}, {self.hidden}, {self.layers}"
            )
        if self.residual and not self.use_impact:
            raise ValueError("without use_impact there is no base value: set residual to False")

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for checkpoints and the exported model."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HanConfig":
        """What `to_dict` made."""
        return cls(**(values | {"impact": ImpactParameters(**values["impact"])}))


@dataclass(frozen=True, slots=True)
class Output:
    """What the network says of B graphs; the last of E + 1 actions is rejection."""

    twin_q: Tensor
    """(2, B, E+1) value of each action, in QoS"""
    logits: Tensor
    """(B, E+1) of the policy"""
    valid: Tensor
    """(B, E+1) bool; whether rejection may be chosen is the policy's admission's business"""
    chance: Tensor
    """(B, E) that the new request is in time"""
    impact: Tensor
    """(B, E) change of the expected QoS of the requests there"""

    @property
    def q(self) -> Tensor:
        """(B, E+1) mean of the twins: what ranks the actions when serving."""
        return self.twin_q.mean(dim=0)

    def probability(self, *, may_reject: bool = True) -> Tensor:
        """(B, E+1) the policy; 0 where an action is not valid."""
        valid = self.valid
        if not may_reject:
            valid = torch.cat([valid[..., :-1], torch.zeros_like(valid[..., -1:])], dim=-1)
        # A large finite number: a row without any valid action must not become NaN.
        return torch.softmax(self.logits.masked_fill(~valid, -1e9), dim=-1) * valid


class HanLayer(nn.Module):
    """HAN beside a shortcut, each node type normalised by itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.conv = GraphHANConv(width, width, (list(FEATURES), list(RELATIONS)), heads=heads)
        self.endpoint = nn.LayerNorm(width)
        self.request = nn.LayerNorm(width)

    def add(self, h: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Embeddings after the layer; those of residents, to whom nothing points, stay."""
        return h | {
            "endpoint": self.endpoint(h["endpoint"] + new["endpoint"]),
            "request": self.request(h["request"] + new["request"]),
        }


class Head(nn.Module):
    """(…, size) to (…, 1); answers 0 until it is trained."""

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(size, hidden)
        self.last = nn.Linear(hidden, 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, told: Tensor) -> Tensor:
        """Compute."""
        answer: Tensor = self.last(torch.relu(self.first(told)))
        return answer


class HanNetwork(nn.Module):
    """Encoder, action impact estimator, twin values and policy."""

    def __init__(self, config: HanConfig) -> None:
        super().__init__()
        self.config = config
        d, hidden = config.width, config.hidden
        kinds = FEATURES if config.use_han else ("request", "endpoint")
        self.inputs = nn.ModuleDict({k: nn.Linear(len(FEATURES[k]), d) for k in kinds})
        for kind in kinds:
            self.register_buffer(f"keep_{kind}", _kept(kind, config), persistent=False)
        layers = config.layers if config.use_han else 0
        self.stack = nn.ModuleList(HanLayer(d, config.heads) for _ in range(layers))
        told = 2 * d + len(FEATURES["endpoint"])
        self.estimator = ImpactEstimator(told, hidden) if config.use_impact else None
        self.register_buffer("present", _present(), persistent=False)
        seen = told + (2 if config.use_impact else 0)
        self.values = nn.ModuleList(Head(seen, hidden) for _ in range(2))
        self.policy = Head(seen, hidden)
        rejecting = d + len(FEATURES["request"])
        self.reject_values = nn.ModuleList(Head(rejecting, hidden) for _ in range(2))
        self.reject_policy = Head(rejecting, hidden)
        self.sharpness = nn.Parameter(torch.tensor(config.sharpness))

    def forward(self, batch: PaddedBatch) -> Output:
        """Dense masked attention over padded graphs."""
        x = {
            "request": batch.request.unsqueeze(-2),  # (B, 1, F_r)
            "endpoint": batch.endpoint,
            "running": batch.running,
            "waiting": batch.waiting,
        }
        x = self.kept(x)
        h = self.embed(x)
        links = dense.Links.of(batch)
        for layer in self.layers:
            h = layer.add(h, dense.han_layer(layer.conv, h, links))
        answer = self.heads(x, h, batch.analytic)
        rejectable = torch.ones_like(batch.eligible[..., :1])
        valid = torch.cat([batch.eligible, rejectable], dim=-1)
        return Output(*answer[:2], valid, *answer[2:])

    def forward_pyg(self, data: "HeteroData") -> list[Output]:
        """The same by PyG, on graphs of eligible endpoints; an `Output` for each graph."""
        x = self.kept(dict(data.x_dict.items()))
        h, graph, graphs = self.embed(x), data.batch_dict, data.num_graphs
        for layer in self.layers:
            h = layer.add(h, layer.conv(h, data.edge_index_dict, graph, graphs))
        outputs = []
        for number in range(graphs):
            mine = {kind: graph[kind] == number for kind in ("request", "endpoint")}
            answer = self.heads(
                {kind: x[kind][rows].unsqueeze(0) for kind, rows in mine.items()},
                {kind: h[kind][rows].unsqueeze(0) for kind, rows in mine.items()},
                data["endpoint"].analytic[mine["endpoint"]].unsqueeze(0),
            )
            valid = torch.ones_like(answer[1], dtype=torch.bool)
            outputs.append(Output(*answer[:2], valid, *answer[2:]))
        return outputs

    @property
    def layers(self) -> "list[HanLayer]":
        """The encoder's layers; none without ``use_han``."""
        return cast("list[HanLayer]", list(self.stack))

    @property
    def twins(self) -> list[Head]:
        """Two heads of the same value, each with errors of its own."""
        return cast("list[Head]", list(self.values))

    @property
    def reject_twins(self) -> list[Head]:
        """The same of rejection."""
        return cast("list[Head]", list(self.reject_values))

    def kept(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """Features without those that an ablation leaves out, and node types in use."""
        kept = {kind: rows for kind, rows in x.items() if kind in self.inputs}
        if self.config.use_impact:
            return kept
        return {kind: rows * getattr(self, f"keep_{kind}") for kind, rows in kept.items()}

    def embed(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """(…, F) features to (…, d), each node type by weights of its own."""
        return {kind: torch.relu(self.inputs[kind](rows)) for kind, rows in x.items()}

    def heads(
        self, x: dict[str, Tensor], h: dict[str, Tensor], analytic: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Twin values, logits, chance and impact from features, embeddings, analytic terms."""
        chance, impact, base = analytic.unbind(-1)  # (B, E)
        request = h["request"].expand_as(h["endpoint"])  # (B, E, d)
        told = torch.cat([h["endpoint"], request, x["endpoint"]], dim=-1)
        if self.estimator is None:
            chance, impact = torch.zeros_like(chance), torch.zeros_like(impact)
        else:
            present = x["endpoint"] @ self.get_buffer("present")  # (B, E)
            chance, impact = self.estimator(told, chance, impact, present)
            estimates = torch.stack([chance, torch.tanh(impact)], dim=-1)  # (B, E, 2)
            told = torch.cat([told, estimates], dim=-1)
        rejecting = torch.cat([h["request"], x["request"]], dim=-1)  # (B, 1, d + F_r)

        def both(head: nn.Module, reject: nn.Module) -> Tensor:
            return torch.cat([head(told).squeeze(-1), reject(rejecting).squeeze(-1)], dim=-1)

        twins = [both(*pair) for pair in zip(self.twins, self.reject_twins, strict=True)]
        twin_q = torch.stack(twins)  # (2, B, E+1)
        logits = both(self.policy, self.reject_policy)  # (B, E+1)
        if self.config.residual:
            least = torch.full_like(base[..., :1], self.config.impact.least_value)
            start = torch.cat([base, least], dim=-1)  # (B, E+1)
            twin_q = twin_q + start
            logits = logits + self.sharpness * start
        return twin_q, logits, chance, impact


def _present() -> Tensor:
    """(F,) picks the counts of those present out of an endpoint's features."""
    return torch.tensor([float(name in ("running", "waiting")) for name in FEATURES["endpoint"]])


def _kept(kind: str, config: HanConfig) -> Tensor:
    """(F,) 0 where the feature is left out."""
    left_out = () if config.use_impact else ANALYTIC_FEATURES[kind]
    return torch.tensor([float(name not in left_out) for name in FEATURES[kind]])
