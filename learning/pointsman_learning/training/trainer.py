"""A whole training run: labels, warm start, a second round, soft actor-critic, export.

Everything lives in one folder: ``labels-1/``, ``labels-2/``, ``replay/``, ``checkpoint.pt``,
``curves.csv``, and at the end ``han_drl.onnx`` and ``training_report.json``. A run that was
broken off goes on from the last finished epoch or round and ends with the same weights: every
random draw has a stream of its own, named by stage and number, so no generator's state is kept.
"""

import csv
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pointsman_core.graph import schema_hash
from pointsman_core.state import IntArray
from pointsman_learning.han import HanConfig, HanNetwork
from pointsman_learning.resumed import differences
from pointsman_learning.training import checkpoints, labelling
from pointsman_learning.training.config import ConfigError, TrainConfig
from pointsman_learning.training.dataset import LabelledStates
from pointsman_learning.training.policy import by_network
from pointsman_learning.training.sac import Experience, Learner, Replay, collect, mean_of
from pointsman_learning.training.shards import load_all
from pointsman_learning.training.validation import Played, Row, Validation
from pointsman_learning.training.warm import (
    EstimatorReport,
    batches,
    estimator_report,
    held_out,
    losses,
)

WARM, AGAIN, SAC, DONE = "warm start", "second round", "soft actor-critic", "done"
STAGES = (WARM, AGAIN, SAC, DONE)
LABELS = "labels"
SECOND_ROUND_SEED = 100_000_000
SECOND_RATE = 0.3
"""Of the first round's learning rate."""


class OutOfTime(Exception):  # noqa: N818 - an outcome, not an error
    """The minutes are over; the run can be resumed, and is exported as it is."""


@dataclass(frozen=True, slots=True)
class Event:
    """What the run tells whoever watches it."""

    stage: str
    """`LABELS`, or a stage of `STAGES`."""
    text: str
    done: int = 0
    total: int = 0
    during: str = ""
    """The stage that labels are made for; empty: this one."""


Report = Callable[[Event], None]


@dataclass(frozen=True, slots=True)
class Result:
    """What came out."""

    model: Path
    report: Path
    """Provenance and metrics; ``pointsman model-card`` makes the model's card."""
    rows: tuple[Row, ...]
    estimator: EstimatorReport
    finished: bool
    """False: it ran out of time, and may be resumed."""


@dataclass(slots=True)
class _Patience:
    """Ends a stage after so many judgements without a better one *of this stage*.

    A stage begins anew with a high learning rate, so for a while it may well be worse than
    the best of the stage before.
    """

    limit: int
    best: float = -np.inf
    worse: int = 0

    def judged(self, score: float) -> None:
        """Take a judgement into account."""
        self.worse = 0 if score > self.best else self.worse + 1
        self.best = max(self.best, score)

    @property
    def over(self) -> bool:
        return self.worse >= self.limit

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"best": self.best, "worse": self.worse}


class Trainer:
    """One run in one folder."""

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        *,
        jobs: int = 1,
        ray: bool = False,
        minutes: float | None = None,
        command: str = "",
        report: Report = lambda _: None,
    ) -> None:
        """Prepare it; ``command`` is what started it, for the model's provenance."""
        self.config, self.folder = config, folder
        self._jobs, self._ray, self._report = jobs, ray, report
        self._command, self._prepared = command, False
        self._started = time.monotonic()
        self._deadline = None if minutes is None else self._started + 60.0 * minutes
        # One thread: these products are small, and sums of several threads differ by machine.
        torch.set_num_threads(1)
        torch.manual_seed(config.seed)
        self.network = HanNetwork(_han_config(config)).to(config.device)
        self.stage, self.number = WARM, 0
        self._stage_state: dict[str, Any] = {}
        # Untrained it is ImpactGreedy, with which all are compared: what is worse is not kept.
        untrained = 0.0 if config.network.residual else -np.inf
        self._best: dict[str, Any] = {
            "score": untrained,
            "weights": _copied(self.network),
            "at": "",
        }
        self._seconds_before = 0.0
        self._curves: list[dict[str, float | str]] = []
        domain = config.domain
        self.validation = Validation.of(
            config.validation,
            experts=domain.experts,
            policy=domain.policy,
            quality_data=domain.quality_data,
            arrivals=domain.arrivals,
        )
        self._base: Played | None = None

    # --- the whole ---------------------------------------------------------------------

    def prepare(self, *, resume: bool = False) -> None:
        """Look at all that is given and at the folder, before anything takes time.

        Raises:
            ConfigError: the folder holds another run, or one that is to be resumed explicitly;
                or no workload is at hand.
            CheckpointError: there is nothing to resume, or it is damaged.
            ManifestErrors, WorkloadError: what is trained on cannot be used.

        """
        if self._prepared:
            return
        if not self.validation.scenarios:
            raise ConfigError("validation.workloads: the data of none of them is at hand")
        self.config.domain.check()
        self._open(resume=resume)
        self._prepared = True

    def run(self, *, resume: bool = False) -> Result:
        """Train, export and compare; raises as `prepare`."""
        self.prepare(resume=resume)
        try:
            if self.stage == WARM:
                self._regress(self._labels(1), AGAIN)
            if self.stage == AGAIN:
                if self.config.labels.second_round:
                    # Of the learned policy's own states only, in smaller steps.
                    self._regress(self._labels(2, only=True), SAC, rate=SECOND_RATE)
                else:
                    self._enter(SAC)
            if self.stage == SAC:
                self._act()
            finished = True
        except OutOfTime:
            finished = False
        return self._publish(finished=finished)

    def _open(self, *, resume: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "config.json"
        text = self.config.model_dump_json(indent=2) + "\n"
        begun = (self.folder / "checkpoint.pt").exists()
        if resume:
            if file.exists():
                _require_same(file, self.config)
            # Broken off among its first labels a run has no more than these and its settings.
            if begun or not file.exists():
                self._restore(checkpoints.load(self.folder / "checkpoint.pt"))
            return
        if begun:
            raise ConfigError(f"{self.folder}: holds a run; resume it, or use another folder")
        file.write_text(text)

    # --- labels ------------------------------------------------------------------------

    def _labels(self, round_number: int, *, only: bool = False) -> LabelledStates:
        """All labels up to a round, or that round's only; those missing are made first."""
        config, options = self.config, self.config.labels
        first = options.shards * config.seed
        todo = labelling.tasks(
            config.domain, options, self.folder / "labels-1", seed=first, count=options.shards
        )
        folders = [self.folder / "labels-1"]
        if round_number == 2:
            policy = self.folder / "warm.pt"
            folders.append(self.folder / "labels-2")
            todo += labelling.tasks(
                config.domain,
                options,
                folders[-1],
                seed=SECOND_ROUND_SEED + first,
                count=options.second_round,
                policy=policy,
            )
        self._make(todo)
        wanted = folders[-1:] if only else folders
        shards = [shard for folder in wanted for shard in load_all(folder)]
        if not shards:
            raise OutOfTime
        return LabelledStates(shards, config.credit)

    def _make(self, todo: list[labelling.Task]) -> None:
        made, labels, seconds = 0, 0, 0.0
        for one in labelling.run(todo, jobs=self._jobs, ray=self._ray):
            made, labels, seconds = made + 1, labels + one.labels, seconds + one.cpu_s
            text = f"{labels:,} labels, {labels / max(seconds, 1e-9):.0f} per CPU second"
            self._report(Event(LABELS, text, made, len(todo), during=self.stage))
            # Half of the time at most goes into labels; what is there is learned from.
            if self._deadline is not None and time.monotonic() > self._half_time():
                break

    def _half_time(self) -> float:
        assert self._deadline is not None  # noqa: S101
        return (self._started + self._deadline) / 2

    # --- regression --------------------------------------------------------------------

    def _split(self, states: LabelledStates) -> tuple[IntArray, IntArray]:
        """Training and held-out states; a scenario's states stay together."""
        seeds = np.array([one["seed"] for one in states.info])
        every = max(2, round(1 / self.config.warm.held_out))
        held = seeds % every == every - 1
        if held.all() or not held.any():
            raise ConfigError(
                "labels: too few scenarios to keep some of them out of training; raise"
                " labels.shards, labels.rollouts.trunks or warm.held_out"
            )
        return np.flatnonzero(~held), np.flatnonzero(held)

    def _regress(self, states: LabelledStates, then: str, *, rate: float = 1.0) -> None:
        options, stage = self.config.warm, self.stage
        highest = rate * options.learning_rate
        train, held = self._split(states)
        optimiser = torch.optim.AdamW(
            self.network.parameters(),
            lr=highest,
            weight_decay=options.weight_decay,
        )
        if self._stage_state:
            optimiser.load_state_dict(self._stage_state["optimiser"])
        patience = _Patience(options.patience, **self._stage_state.get("patience", {}))
        steps = max(1, options.epochs * len(train) // options.batch)
        while self.number < options.epochs and not patience.over:
            step = self.number * len(train) // options.batch
            rng = np.random.default_rng([self.config.seed, 80, STAGES.index(stage), self.number])
            for numbers in batches(states, train, rng, options.batch):
                _set_rate(optimiser, highest * _rate(step, steps))
                batch = states.batch(numbers).to(self.config.device)
                loss = losses(self.network(batch.graphs), batch, options).total(options)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
                optimiser.step()
                step += 1
            self.number += 1
            found = held_out(self.network, states, held, options, self.config.device)
            patience.judged(self._judge(asdict(found), epochs=options.epochs))
            self._checkpoint({"optimiser": optimiser.state_dict(), "patience": patience.state()})
        self.network.load_state_dict(self._best["weights"])
        # Not one file: the first is the base of the second round's labels.
        name = "warm.pt" if stage == WARM else "second.pt"
        checkpoints.save_network(self.folder / name, self.network)
        self._enter(then)

    # --- soft actor-critic -------------------------------------------------------------

    def _act(self) -> None:
        config, options = self.config, self.config.sac
        if options.rounds == 0:
            self._enter(DONE)
            return
        states = self._labels(2 if config.labels.second_round else 1)
        train, _ = self._split(states)
        torch.manual_seed(config.seed)  # a resumed run has drawn other numbers before
        learner = Learner(self.network, options, device=config.device)
        patience = _Patience(options.patience, **self._stage_state.get("patience", {}))
        if self._stage_state:
            learner.restore(self._stage_state["learner"])
        replay = Replay(options.replay)
        for number in range(self.number):
            replay.add(Experience.load(self._replay_file(number)))
        while self.number < options.rounds and not patience.over:
            fresh = collect(
                self.network,
                config.domain,
                options,
                round_number=self.number,
                seed=config.seed,
                own_only=config.credit.own_only,
                device=config.device,
            )
            fresh.save(self._replay_file(self.number))
            replay.add(fresh)
            if self.number == 0:
                learner.mean_reward = float(fresh.reward.mean())
            rng = np.random.default_rng([config.seed, 81, self.number])
            found = []
            for _ in range(options.updates):
                extra = None
                if options.label_weight:
                    numbers = train[rng.integers(len(train), size=config.warm.batch)]
                    batch = states.batch(numbers).to(config.device)
                    out = self.network(batch.graphs)
                    told = losses(out, batch, config.warm)
                    estimates = config.warm.estimator_weight * told.estimator
                    extra = options.label_weight * (told.value + estimates)
                found.append(learner.update(replay.draw(rng, options.batch), extra))
            self.number += 1
            measured = mean_of(found) | {"reward": float(fresh.reward.mean())}
            patience.judged(self._judge(measured, epochs=options.rounds))
            self._checkpoint({"learner": learner.state(), "patience": patience.state()})
        self._enter(DONE)

    def _replay_file(self, number: int) -> Path:
        return self.folder / "replay" / f"round-{number:04d}.npz"

    # --- judging and keeping -----------------------------------------------------------

    @property
    def base(self) -> Played:
        """ImpactGreedy on the validation windows."""
        if self._base is None:
            self._base = self.validation.baseline()
        return self._base

    def _judge(self, measured: Mapping[str, float], *, epochs: int) -> float:
        """Play the validation windows: the gain in per cent; keeps the best weights so far.

        By predicted quality: actual scores are a noisier view of what the policy can know.
        """
        self.network.eval()
        played = self.validation.play(by_network(self.network, device=self.config.device))
        self.network.train()
        row = self.validation.rows(played, self.base)[len(list(self.validation.options.cells()))]
        score = row.predicted_gain.mean
        better = bool(score > self._best["score"])
        if better:
            at = f"{self.stage} {self.number}"
            self._best = {"score": score, "weights": _copied(self.network), "at": at}
        self._curves.append(
            {
                "stage": self.stage,
                "number": self.number,
                "seconds": round(self._seconds, 1),
                "validation_gain_percent": row.gain.mean,
                "validation_predicted_gain_percent": score,
                "validation_predicted_low": row.predicted_gain.low,
                "validation_predicted_high": row.predicted_gain.high,
                **measured,
            }
        )
        self._write_curves()
        text = f"validation {score:+.2f} % over ImpactGreedy by predicted quality"
        text += f", {row.gain.mean:+.2f} % by actual{', best so far' if better else ''}"
        self._report(Event(self.stage, text, self.number, epochs))
        return float(score)

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _write_curves(self) -> None:
        names = list(dict.fromkeys(name for row in self._curves for name in row))
        with (self.folder / "curves.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self._curves)

    def _enter(self, stage: str) -> None:
        self.stage, self.number, self._stage_state = stage, 0, {}
        self._save()

    def _checkpoint(self, state: dict[str, Any]) -> None:
        self._stage_state = state
        self._save()
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise OutOfTime

    def _save(self) -> None:
        checkpoints.save(
            self.folder / "checkpoint.pt",
            {
                "stage": self.stage,
                "number": self.number,
                "stage_state": self._stage_state,
                "weights": self.network.state_dict(),
                "best": self._best,
                "curves": self._curves,
                "seconds": self._seconds,
            },
        )

    def _restore(self, kept: dict[str, Any]) -> None:
        self.stage, self.number = kept["stage"], kept["number"]
        self._stage_state, self._best = kept["stage_state"], kept["best"]
        self._curves, self._seconds_before = kept["curves"], kept["seconds"]
        self.network.load_state_dict(kept["weights"])

    # --- the end -----------------------------------------------------------------------

    def _publish(self, *, finished: bool) -> Result:
        """Export the best weights, with a table on the validation windows."""
        from pointsman_learning.han.export import export

        self.network.load_state_dict(self._best["weights"])
        network = self.network.to("cpu").eval()
        rows = tuple(self.validation.rows(self.validation.play(by_network(network)), self.base))
        states = LabelledStates(load_all(self.folder / "labels-1"), self.config.credit)
        estimator = estimator_report(network, states, self._split(states)[1])
        metrics = {
            "validation": [_plain(row) for row in rows],
            "estimator": asdict(estimator),
        }
        provenance = {
            "config": _public(self.config),
            "schema": schema_hash(),
            "labels": states.label_count,
            "states": len(states),
            "data": self.config.domain.draw(0, requests=2).scenario.description,
            "command": self._command,
            "trained": bool(self._best["at"]),
            "kept": self._best["at"] or "the untrained network",
            "finished": finished,
        }
        model, report = self.folder / "han_drl.onnx", self.folder / "training_report.json"
        model.write_bytes(export(network, provenance=provenance, metrics=metrics))
        content = {
            "model": model.name,
            "parameters": sum(p.numel() for p in network.parameters()),
            "training_minutes": round(self._seconds / 60, 1),
            "provenance": provenance,
            "metrics": metrics,
        }
        report.write_text(json.dumps(content, indent=2) + "\n")
        return Result(model, report, rows, estimator, finished)


def _require_same(file: Path, config: TrainConfig) -> None:
    """Refuse to go on with a run of other settings."""
    try:
        was = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: is damaged: {error}") from error
    changed = differences(was, json.loads(config.model_dump_json()))
    if changed:
        raise ConfigError(
            f"{file.parent}: the run to be resumed had other settings: {'; '.join(changed)}"
        )


def _han_config(config: TrainConfig) -> HanConfig:
    try:
        return HanConfig(**config.network.model_dump(), sharpness=config.warm.sharpness)
    except ValueError as error:
        raise ConfigError(f"network: {error}") from error


def _public(config: TrainConfig) -> dict[str, Any]:
    """Plain data, with names of files only: a model is given away, folders are private."""
    content: dict[str, Any] = json.loads(config.model_dump_json())
    for name in ("experts", "quality_data", "arrivals"):
        if content["domain"][name] is not None:
            content["domain"][name] = Path(content["domain"][name]).name
    return content


def _copied(network: HanNetwork) -> dict[str, torch.Tensor]:
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: a short rise, then down to zero along a cosine."""
    return float(min(1.0, (step + 1) / 50) * 0.5 * (1 + np.cos(np.pi * min(1.0, step / steps))))


def _set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = rate


def _plain(row: Row) -> dict[str, Any]:
    """Numbers for JSON, in per cent where gains; NaN is null."""

    def known(value: float) -> float | None:
        return round(value, 5) if np.isfinite(value) else None

    return {
        "windows": row.name,
        "count": row.windows,
        "impact_greedy_qos": known(row.base),
        "qos": known(row.qos),
        "gain_percent": [known(v) for v in (row.gain.mean, row.gain.low, row.gain.high)],
        "predicted_gain_percent": [
            known(v)
            for v in (row.predicted_gain.mean, row.predicted_gain.low, row.predicted_gain.high)
        ],
        "rejected": [known(share) for share in row.rejected],
    }
