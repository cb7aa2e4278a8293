"""A model card in Markdown: what a trained model is, how it was trained, how it does.

Every number comes from the model file's own metadata or from files of `pointsman evaluate`
that evaluate this very model, told by its SHA-256.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson
import polars as pl
import yaml

from pointsman_common.files import reason
from pointsman_common.wording import counted, ranged
from pointsman_core.deciders.han_drl import FORMAT, HanModel
from pointsman_core.graph import schema_hash
from pointsman_learning.evaluation.registry import BOUND
from pointsman_learning.evaluation.results import CELL, RATIO_FLOOR, Row
from pointsman_learning.evaluation.statistics import MIN_WINDOWS, Interval, mean_intervals

NOT_RECORDED: Final = "not recorded"
UNKNOWN: Final = "?"
WORST_SHOWN: Final = 5
"""Cells listed of those where the model may be worse. Ours."""


class CardError(ValueError):
    """No card can be made of these files; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What `pointsman evaluate` found, as far as it says something of one model."""

    source: str
    decider: str
    """What the model is called there."""
    setting: Mapping[str, Any]
    runs: pl.DataFrame
    summary: Sequence[Row]

    @classmethod
    def load(cls, file: Path, *, sha256: str) -> "Evaluation":
        """Read an ``evaluation.json``.

        Raises:
            CardError: it cannot be read, is none, does not evaluate the model of that SHA-256,
                or compares it with nothing.

        """
        try:
            document = orjson.loads(file.read_bytes())
            setting, summary = document["setting"], document["summary"]
            models = setting.get("models", {})
            names = [name for name, one in models.items() if one["sha256"] == sha256]
            runs = pl.DataFrame(document["runs"], infer_schema_length=None)
        except OSError as error:
            raise CardError(f"{file.name}: {reason(error)}") from None
        except (ValueError, KeyError, TypeError, AttributeError, pl.exceptions.PolarsError):
            raise CardError(f"{file.name}: is no evaluation.json of pointsman evaluate") from None
        if not names:
            raise CardError(
                f"{file.name}: does not evaluate the model with the SHA-256 {sha256}: run"
                " pointsman evaluate --model FILE"
            )
        found = cls(file.name, names[0], setting, runs, summary)
        if any(row["difference"] is None for row in found.cells()):
            raise CardError(
                f"{file.name}: compares {names[0]} with nothing: evaluate baselines too, and"
                " let --reference be another decider"
            )
        return found

    @property
    def title(self) -> str:
        """What sets it apart from other evaluations of the card."""
        parts = [f"`{self.setting['site']}`"]
        if self.setting.get("outages"):
            parts.append("an endpoint lost and one added in each window")
        return ", ".join(parts)

    def cells(self) -> list[Row]:
        """The model's row of each cell."""
        return [row for row in self.summary if row["decider"] == self.decider]

    def reference_of(self, cell: Row) -> Row:
        """The row of what the model is compared with there."""
        return next(
            row
            for row in self.summary
            if row["decider"] == cell["reference"] and all(row[n] == cell[n] for n in CELL)
        )

    def pairs(self) -> list[tuple[Row, Row]]:
        """The model's row of each cell, and its reference's."""
        return [(row, self.reference_of(row)) for row in self.cells()]


def model_card(model: HanModel, *, file: str, size: int, evaluations: Sequence[Evaluation]) -> str:
    """Write the card of a model file of ``size`` bytes; equal input gives equal text."""
    sections = (
        _what(model, file, size),
        _training(model),
        _use(model, evaluations),
        _limits(evaluations),
        _results(evaluations),
        _worse(evaluations),
    )
    return "\n".join(line for section in sections for line in section).rstrip() + "\n"


# --- The model ---------------------------------------------------------------------------


def _what(model: HanModel, file: str, size: int) -> Iterator[str]:
    info = model.info
    yield f"# Model card: `{file}`"
    yield ""
    yield "Made by `pointsman model-card` from the model file and its evaluations; not by hand."
    yield ""
    yield "## What it is"
    kind = "graph network over the endpoints and the requests on them"
    if info.config.get("use_han") is False:
        kind = "network over each endpoint's own features, without the graph (an ablation)"
    yield "For each LLM request it chooses one endpoint of a pool, or rejection where a policy"
    yield f"allows that. It is a {kind}."
    yield "It aims at the highest average QoS: the mean over all requests of the answer's quality,"
    yield "0 where it is late."
    yield ""
    network = {name: value for name, value in info.config.items() if name != "impact"}
    impact = {name: getattr(info.impact, name) for name in info.impact.__dataclass_fields__}
    yield from _facts(
        {
            "file": f"`{file}`, {size:,} bytes",
            "SHA-256": f"`{model.sha256}`",
            "format": f"`{FORMAT}`, feature schema `{schema_hash()[:12]}`",
            "network": _listed(network),
            "ImpactGreedy's parameters within": _listed(impact),
        }
    )


def _training(model: HanModel) -> Iterator[str]:
    told = dict(model.info.provenance)
    config = told.pop("config", None)
    told.pop("schema", None)  # a model of another one cannot be loaded
    yield "## How it was trained"
    untrained = told.pop("trained", True) is False
    if untrained:
        yield "It was **not trained**: its weights are those it began with."
        yield ""
    facts = {
        "command": _code(told.pop("command", None)),
        "data, for example": told.pop("data", None),
        "labels": _counted(told.pop("labels", None)),
        "states that have labels": _counted(told.pop("states", None)),
        "weights kept of": told.pop("kept", None),
        "ran to its end": told.pop("finished", None),
    }
    shown = {
        name: NOT_RECORDED if value is None else value
        for name, value in facts.items()
        if value is not None or not untrained
    }
    yield from _facts(shown | told)
    yield from _validation(model.info.metrics)
    yield from _estimator(model.info.metrics)
    if config is not None:
        yield from _folded("All settings", ["```yaml", *_yaml(config), "```"])


def _yaml(config: object) -> list[str]:
    return yaml.safe_dump(config, sort_keys=False, default_flow_style=None).splitlines()


def _validation(metrics: Mapping[str, Any]) -> Iterator[str]:
    rows = metrics.get("validation") or []
    if not rows:
        return
    yield "On validation windows, whose prompts and times are those of neither training nor test,"
    yield "against ImpactGreedy; the weights kept are the best of several by these very windows:"
    yield ""
    header = ["windows", "number", "ImpactGreedy", "QoS", "gain", "by predicted quality"]
    wide = [row for row in rows if str(row.get("windows")).endswith("all")]
    yield from _table(header, (_validation_row(row) for row in wide or rows))
    if wide and len(wide) < len(rows):
        own = [row for row in rows if row not in wide]
        table = list(_table(header, (_validation_row(row) for row in own)))
        yield from _folded("By kind of window", table[:-1])


def _validation_row(row: Mapping[str, Any]) -> list[str]:
    return [
        str(row.get("windows", UNKNOWN)),
        str(row.get("count", UNKNOWN)),
        _share(row.get("impact_greedy_qos")),
        _share(row.get("qos")),
        _gain(row.get("gain_percent")),
        _gain(row.get("predicted_gain_percent")),
    ]


def _estimator(metrics: Mapping[str, Any]) -> Iterator[str]:
    told = metrics.get("estimator") or {}
    names = [name for name in told if f"analytic_{name}" in told]
    if not names:
        return
    yield f"The action impact estimator on {_counted(told.get('pairs'))} held-out choices:"
    yield ""
    header = ["measure", "estimator", "ImpactGreedy's terms"]
    yield from _table(
        header,
        ([n.replace("_", " "), _share(told[n]), _share(told[f"analytic_{n}"])] for n in names),
    )


# --- What it is for ----------------------------------------------------------------------


def _use(model: HanModel, evaluations: Sequence[Evaluation]) -> Iterator[str]:
    yield "## Intended use"
    yield "- In the policy server, as `algorithm: HanDrl` of a RoutingPolicy, for LLM requests with"
    yield "  a limit of latency per output token, on a pool of unequal experts or boards."
    yield "- With a fallback algorithm, which decides whenever the model cannot."
    domain = (model.info.provenance.get("config") or {}).get("domain") or {}
    trained = list(_trained_on(domain))
    if trained:
        yield f"- Trained on: {'; '.join(trained)}."
    for one in evaluations:
        yield f"- Evaluated on: {'; '.join(_evaluated_on(one))}."
    yield ""


def _trained_on(domain: Mapping[str, Any]) -> Iterator[str]:
    if domain.get("experts"):
        yield "one's own experts and subsets of them"
    elif {"site_share", "least_endpoints", "most_endpoints"} <= domain.keys():
        yield (
            f"the edge site ({_percent(domain['site_share'])}) and random pools of"
            f" {domain['least_endpoints']} to {domain['most_endpoints']} endpoints"
        )
    if "processes" in domain:
        yield f"workloads {', '.join(domain['processes'])}"
    if "loads" in domain:
        low, high = domain["loads"]
        yield f"loads {low:g} to {high:g} of a pool's capacity"
    if "limits" in domain:
        yield f"limits {', '.join(domain['limits'])}"
    if "outage_share" in domain:
        yield f"outages in {_percent(domain['outage_share'])} of the scenarios"


def _evaluated_on(one: Evaluation) -> Iterator[str]:
    cells = one.cells()
    yield f"{one.title}, {_endpoints(one.setting['endpoints'])}"
    for name, label in (("workload", "workloads"), ("limit", "limits")):
        yield f"{label} {', '.join(dict.fromkeys(row[name] for row in cells))}"
    yield f"loads {', '.join(f'{load:g}' for load in sorted({row['load'] for row in cells}))}"


def _endpoints(count: object) -> str:
    """Of pools that are drawn anew they are a range, in words."""
    return counted(count, "endpoint") if isinstance(count, int) else f"{count} endpoints"


def _limits(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    yield "## Limits of use"
    yield "- Trained and evaluated in simulation. Engines follow a roofline model; nothing here"
    yield "  was measured on hardware."
    yield "- It sees predicted quality and length, never the true ones. Where predictions are"
    yield "  wrong, so are its choices."
    yield "- It judges neither prompts nor answers, for safety or anything else."
    prompts = {(str(e.setting["quality_data"]), e.setting["prompts"]) for e in evaluations}
    for source, count in sorted(prompts):
        yield f"- Prompts and scores evaluated: {count:,} of {source}. Others may go otherwise."
    if not any("pool" in one.setting for one in evaluations):
        yield "- Not evaluated on pools other than those named above."
    if not any(one.setting.get("outages") for one in evaluations):
        yield "- Not evaluated with an endpoint lost or added while it decides."
    yield "- Served only by releases with the same feature schema; others refuse the file."
    yield ""


# --- Results -----------------------------------------------------------------------------


def _results(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    yield "## Results"
    yield "QoS: mean over all requests that arrived. Late: answered late, or lost with its"
    yield "endpoint. QoS/s: sum of QoS per busy accelerator-second. Every decider met the same"
    yield "windows; differences are paired. Brackets hold 95 % intervals; ▲ and ▼ mark those clear"
    yield "of 0, one by one: of many some will be so by chance."
    yield ""
    for one in evaluations:
        windows = [row["windows"] for row in one.cells()]
        yield f"### {one.title}"
        played = ranged(min(windows), max(windows), "window")
        yield (
            f"`{one.source}`: {played} of {counted(one.setting['requests'], 'request')}"
            f" in each of {_cells(len(one.cells()))};"
            f" quality predicted by {one.setting['predictor']}."
        )
        yield from _cautions(one)
        yield ""
        yield from _against_all(one)
        yield "Each cell, against its reference, with intervals over windows and prompts. Pairs"
        yield "are the model's and the reference's:"
        yield ""
        yield from _table(_CELL_HEADER, (_cell_row(*pair) for pair in one.pairs()))


def _cautions(one: Evaluation) -> Iterator[str]:
    cells = one.cells()
    if min(row["windows"] for row in cells) < MIN_WINDOWS:
        yield "Too few windows for intervals: nothing can be concluded."
    for workload in dict.fromkeys(row["workload"] for row in cells):
        extra = max(row["overlapping_windows"] for row in cells if row["workload"] == workload)
        if extra:
            overlap = "overlaps" if extra == 1 else "overlap"
            yield (
                f"{counted(extra, 'window')} of {workload} {overlap} others: its intervals are too"
                " narrow."
            )


@dataclass(frozen=True, slots=True)
class _Rival:
    """A decider of an evaluation, over all cells."""

    name: str
    means: Mapping[str, float]
    gain: Interval
    """Of the model over it, given the prompts; NaN for the model itself."""


_SHOWN: Final = ("average_qos", "violation_rate", "rejected", "resource_efficiency")


def _rivals(one: Evaluation) -> list[_Rival]:
    """All deciders over the seeds that every one of them finished in every cell."""
    names = one.runs["decider"].unique(maintain_order=True).to_list()
    cells = one.runs.select(CELL).n_unique()
    counts = one.runs.group_by("seed").len()
    full = counts.filter(pl.col("len") == cells * len(names))["seed"]
    if full.is_empty():
        raise CardError(f"{one.source}: no seed was played by every decider in every cell")
    means = (
        one.runs.filter(pl.col("seed").is_in(full.to_list()))
        .group_by("decider", "seed")
        .agg(pl.col(name).cast(pl.Float64).mean() for name in _SHOWN)
        .sort("seed")
    )
    own = means.filter(decider=one.decider)["average_qos"].to_numpy()
    found = []
    for name in names:
        rows = means.filter(decider=name)
        gain = mean_intervals((own - rows["average_qos"].to_numpy())[None])[0]
        values = {column: _number(rows[column].mean()) for column in _SHOWN}
        found.append(_Rival(name, values, gain))
    return sorted(found, key=lambda rival: (rival.name.startswith(BOUND), -rival.means[_SHOWN[0]]))


def _against_all(one: Evaluation) -> Iterator[str]:
    yield "Mean over all cells. Differences are the model's to each decider, with intervals over"
    yield "windows, given these prompts:"
    yield ""
    header = ["decider", "QoS", "difference", "late", "rejected", "QoS/s"]
    yield from _table(header, (_rival_row(rival, one.decider) for rival in _rivals(one)))
    if any(row["bound"] for row in one.summary):
        yield f"`{BOUND}` see what no router can (true quality, lengths, the future): no deciders."
        yield ""


def _rival_row(rival: _Rival, model: str) -> list[str]:
    qos, late, rejected, efficiency = (rival.means[name] for name in _SHOWN)
    own = rival.name == model
    return [
        f"**{rival.name}**" if own else rival.name,
        _share(qos),
        "the model" if own else _difference(rival.gain, base=qos),
        _percent(late),
        _percent(rejected),
        _share(efficiency),
    ]


_CELL_HEADER: Final = (
    *("workload", "load", "limits", "admission", "QoS", "reference", "difference"),
    *("late", "rejected", "QoS/s"),
)


def _cell_row(row: Row, other: Row) -> list[str]:
    return [
        row["workload"],
        f"{row['load']:g}",
        row["limit"],
        row["admission"],
        _share(row["average_qos"]),
        f"{other['decider']} {_share(other['average_qos'])}",
        _difference(_interval(row), base=other["average_qos"]),
        f"{_percent(row['violation_rate'])} / {_percent(other['violation_rate'])}",
        f"{_percent(row['rejected'])} / {_percent(other['rejected'])}",
        f"{_share(row['resource_efficiency'])} / {_share(other['resource_efficiency'])}",
    ]


def _interval(row: Row) -> Interval:
    ends = (row["difference"], row["difference_low"], row["difference_high"])
    return Interval(*map(_number, ends))


# --- Where it is worse -------------------------------------------------------------------


def _worse(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    yield "## Where it is worse"
    for one in evaluations:
        pairs = one.pairs()
        yield f"### {one.title}"
        gains = [_interval(row) for row, _ in pairs]
        better = sum(gain.low > 0 for gain in gains)
        worse = sum(gain.high < 0 for gain in gains)
        yield (
            f"- QoS against the reference: clearly better in {better} of {_cells(len(pairs))},"
            f" clearly worse in {worse}, not told apart in {len(pairs) - better - worse}."
        )
        below = sorted(
            ((gain, row, other) for gain, (row, other) in zip(gains, pairs, strict=True)),
            key=lambda each: each[0].mean,
        )
        for gain, row, other in below[:WORST_SHOWN]:
            if gain.mean < 0:
                difference = _difference(gain, base=other["average_qos"])
                yield f"  - {_cell(row)}: {difference} to {other['decider']}"
        yield from _rivals_above(one)
        yield from _compared(pairs, "violation_rate", "More late answers", more_is_worse=True)
        yield from _compared(pairs, "resource_efficiency", "Less QoS/s", more_is_worse=False)
        yield ""


def _rivals_above(one: Evaluation) -> Iterator[str]:
    rivals = [rival for rival in _rivals(one) if not rival.name.startswith(BOUND)]
    above = [rival for rival in rivals if rival.name != one.decider and rival.gain.mean < 0]
    names = ", ".join(
        f"{rival.name} ({_difference(rival.gain, base=rival.means['average_qos'])})"
        for rival in above
    )
    yield f"- Deciders with a higher mean QoS over all cells: {names or 'none'}."


def _compared(
    pairs: Sequence[tuple[Row, Row]], metric: str, what: str, *, more_is_worse: bool
) -> Iterator[str]:
    sign = 1.0 if more_is_worse else -1.0
    gaps = [(sign * (_number(a[metric]) - _number(b[metric])), a, b) for a, b in pairs]
    worse = [gap for gap in gaps if gap[0] > 0]  # NaN is not
    if not worse:
        yield f"- {what} than the reference: in none of {_cells(len(pairs))}."
        return
    _, row, other = max(worse, key=lambda gap: gap[0])
    text = _percent if metric == "violation_rate" else _share
    yield (
        f"- {what} than the reference: in {len(worse)} of {_cells(len(pairs))},"
        f" most in {_cell(row)}: {text(row[metric])} to {text(other[metric])}."
    )


def _cells(count: int) -> str:
    return counted(count, "cell")


def _cell(row: Row) -> str:
    return f"{row['workload']}, load {row['load']:g}, {row['limit']}, {row['admission']}"


# --- Parts -------------------------------------------------------------------------------


def _facts(facts: Mapping[str, object]) -> Iterator[str]:
    yield from _table(["", ""], ([name, _plain(value)] for name, value in facts.items()))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield _line(header)
    yield _line(["---"] * len(header))
    for row in rows:
        yield _line([" ".join(cell.split()).replace("|", "\\|") for cell in row])
    yield ""


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _folded(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield from (f"<details><summary>{title}</summary>", "", *lines)
    yield from ("", "</details>", "")


def _listed(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in values.items())


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return _listed(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _code(value: object) -> str | None:
    return None if value is None else f"`{value}`"


def _counted(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _share(value: object) -> str:
    number = _number(value)
    return UNKNOWN if math.isnan(number) else f"{number:.3f}"


def _percent(value: object) -> str:
    number = _number(value)
    return UNKNOWN if math.isnan(number) else f"{100 * number:.1f} %"


def _difference(gain: Interval, *, base: float) -> str:
    """``+0.012 [+0.004, +0.020], +2.1 % ▲``, as far as it is known."""
    parts = [f"{gain.mean:+.3f}"]
    if np.isfinite((gain.low, gain.high)).all():
        parts.append(f" [{gain.low:+.3f}, {gain.high:+.3f}]")
    if base >= RATIO_FLOOR:
        parts.append(f", {100 * gain.mean / base:+.1f} %")
    if gain.clear_of_zero:
        parts.append(" ▲" if gain.low > 0 else " ▼")
    return "".join(parts)


def _gain(values: Sequence[object] | None) -> str:
    mean, low, high = map(_number, values or [None] * 3)
    if math.isnan(mean):
        return UNKNOWN
    ends = "" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]"
    return f"{mean:+.2f} %{ends}"
