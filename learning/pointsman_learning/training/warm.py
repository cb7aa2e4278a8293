"""Warm start: regression of the values on labels, and the estimator's own targets."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pointsman_core.state import FloatArray, IntArray
from pointsman_learning.han import HanNetwork, Output
from pointsman_learning.training.config import WarmOptions
from pointsman_learning.training.dataset import Batch, LabelledStates

NEVER = -1e9
SURE = 1e-5


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over a batch."""

    value: Tensor
    estimator: Tensor
    policy: Tensor

    def total(self, options: WarmOptions) -> Tensor:
        """What is minimised."""
        return self.value + options.estimator_weight * self.estimator + 0.1 * self.policy


def losses(out: Output, batch: Batch, options: WarmOptions) -> Losses:
    """How far the network is from the labels.

    Only differences between the actions of a state count, so both sides are taken from their
    mean over the labelled actions: that takes out what all futures of a state have in common.
    """
    known = batch.known.to(out.twin_q.dtype)
    target = _centred(batch.value, known)
    error = _centred(out.twin_q, known) - target
    huber = functional.huber_loss(
        error, torch.zeros_like(error), delta=options.huber, reduction="none"
    )
    value = (huber * known).sum(dim=-1).mean()
    wanted = torch.softmax(
        (options.sharpness * out.q.detach()).masked_fill(~batch.allowed, NEVER), dim=-1
    )
    said = torch.log_softmax(out.logits.masked_fill(~batch.allowed, NEVER), dim=-1)
    policy = -(wanted * said.clamp(min=-50.0)).sum(dim=-1).mean()
    return Losses(value, _estimator_loss(out, batch), policy)


def _centred(values: Tensor, known: Tensor) -> Tensor:
    mean = (values * known).sum(dim=-1, keepdim=True) / known.sum(dim=-1, keepdim=True)
    return values - mean


def _estimator_loss(out: Output, batch: Batch) -> Tensor:
    there = batch.known[:, :-1].to(out.chance.dtype)
    chance = functional.binary_cross_entropy(
        out.chance.clamp(SURE, 1 - SURE), batch.quiet[..., 0], reduction="none"
    )
    # Squared, so that the mean is learned and not the median, which is 0 almost everywhere.
    impact = (out.impact - batch.quiet[..., 1]).square()
    return ((chance + impact) * there).sum() / there.sum().clamp(min=1.0)


def batches(
    states: LabelledStates, numbers: IntArray, rng: np.random.Generator, size: int
) -> Iterator[IntArray]:
    """All numbers once, in random batches of states of similar size: less padding."""
    in_flight = np.diff(states.graphs.starts[1:]).sum(axis=0)
    shuffled = rng.permutation(numbers)
    found: list[IntArray] = []
    for chunk in np.array_split(shuffled, max(1, len(shuffled) // (16 * size))):
        ordered = chunk[np.argsort(in_flight[chunk], kind="stable")]
        found += np.array_split(ordered, max(1, len(ordered) // size))
    for index in rng.permutation(len(found)).tolist():
        yield found[index]


@dataclass(frozen=True, slots=True)
class HeldOut:
    """How good a network is on labels it was not trained on."""

    value_loss: float
    estimator_loss: float
    differs: float
    """Share of states in which it chooses otherwise than the base policy."""
    gain: float
    """Of its choice over the base policy's in those labels, discounted QoS per decision."""
    gain_error: float
    """Standard error of that."""
    full_gain: float
    full_gain_error: float
    """The same without discount."""


def held_out(
    network: HanNetwork,
    states: LabelledStates,
    numbers: IntArray,
    options: WarmOptions,
    device: str = "cpu",
) -> HeldOut:
    """Measure it: one decision is the network's, all later ones are the base policy's."""
    parts: list[FloatArray] = []
    sums, seen = np.zeros(2), 0
    with torch.no_grad():
        for chosen in np.array_split(numbers, max(1, len(numbers) // 128)):
            batch = states.batch(chosen).to(device)
            out = network(batch.graphs)
            found = losses(out, batch, options)
            sums += len(chosen) * np.array([float(found.value), float(found.estimator)])
            seen += len(chosen)
            picked = out.q.masked_fill(~batch.allowed, NEVER).argmax(dim=1, keepdim=True)
            usual = batch.chosen[:, None]
            gains = [
                (table.gather(1, picked) - table.gather(1, usual)).squeeze(1)
                for table in (batch.value, batch.full)
            ]
            rows = torch.stack([(picked != usual).squeeze(1).float(), *gains], dim=1)
            parts.append(rows.cpu().numpy().astype(np.float64))
    table = np.concatenate(parts)
    mean, error = table.mean(axis=0), table.std(axis=0) / np.sqrt(len(table))
    value, estimator = (sums / seen).tolist()
    return HeldOut(
        value,
        estimator,
        float(mean[0]),
        float(mean[1]),
        float(error[1]),
        float(mean[2]),
        float(error[2]),
    )


@dataclass(frozen=True, slots=True)
class EstimatorReport:
    """The action impact estimator against ImpactGreedy's analytic terms, on held-out states."""

    chance_auc: float
    analytic_chance_auc: float
    chance_brier: float
    analytic_chance_brier: float
    calibration_error: float
    """Mean gap between predicted chance and share in time, over ten equal bins."""
    analytic_calibration_error: float
    impact_mae: float
    analytic_impact_mae: float
    impact_rmse: float
    analytic_impact_rmse: float
    pairs: int


def estimator_report(
    network: HanNetwork, states: LabelledStates, numbers: IntArray, device: str = "cpu"
) -> EstimatorReport:
    """Measure the estimator's own error."""
    from sklearn.metrics import roc_auc_score

    rows = []
    with torch.no_grad():
        for chosen in np.array_split(numbers, max(1, len(numbers) // 128)):
            batch = states.batch(chosen).to(device)
            out = network(batch.graphs)
            analytic = batch.graphs.analytic
            columns = (
                out.chance,
                analytic[..., 0],
                batch.quiet[..., 0],
                out.impact,
                analytic[..., 1],
                batch.quiet[..., 1],
            )
            there = batch.known[:, :-1]
            rows.append(torch.stack([c[there] for c in columns], dim=1).cpu().numpy())
    chance, before, truth, impact, impact_before, impact_truth = np.concatenate(rows).T
    both = 0 < truth.mean() < 1

    def auc(said: FloatArray) -> float:
        return float(roc_auc_score(truth, said)) if both else float("nan")

    return EstimatorReport(
        auc(chance), auc(before),
        float(np.mean((chance - truth) ** 2)), float(np.mean((before - truth) ** 2)),
        _calibration(chance, truth), _calibration(before, truth),
        float(np.abs(impact - impact_truth).mean()),
        float(np.abs(impact_before - impact_truth).mean()),
        float(np.sqrt(np.mean((impact - impact_truth) ** 2))),
        float(np.sqrt(np.mean((impact_before - impact_truth) ** 2))),
        len(truth),
    )  # fmt: skip


def _calibration(said: FloatArray, truth: FloatArray) -> float:
    bins = np.minimum((said * 10).astype(np.int64), 9)
    count = np.bincount(bins, minlength=10)
    gap = np.bincount(bins, said - truth, minlength=10)
    return float(np.abs(gap).sum() / max(count.sum(), 1))
