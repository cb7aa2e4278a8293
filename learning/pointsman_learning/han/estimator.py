"""The action impact estimator: what a choice does to the new request and to those there."""

import torch
from torch import Tensor, nn

EDGE = 1e-4
"""Chances are kept so far from 0 and 1 before their logit is taken."""


class ImpactEstimator(nn.Module):
    """Corrects ImpactGreedy's estimates; has targets of its own from the simulator.

    Untrained it repeats them (the chance to within `EDGE`).
    """

    def __init__(self, size: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(size, hidden)
        self.last = nn.Linear(hidden, 2)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, told: Tensor, chance: Tensor, impact: Tensor, present: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, E) chance that the new request is in time, and impact on those there.

        ``told`` (B, E, size) is what is known of each choice; ``chance`` and ``impact`` (B, E)
        are ImpactGreedy's; ``present`` (B, E) is positive where someone is there: elsewhere
        there is nobody to have an impact on.
        """
        change = self.last(torch.relu(self.first(told)))  # (B, E, 2)
        sure = chance.clamp(EDGE, 1.0 - EDGE)
        logit = torch.log(sure) - torch.log1p(-sure)
        return torch.sigmoid(logit + change[..., 0]), impact + change[..., 1] * present.sign()
