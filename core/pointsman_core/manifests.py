"""Manifests (the YAML of custom resources) to snapshots: text in, objects out.

All errors of all files are found at once, each with its file, line and field, so that one
reading of the message is enough to mend them all; nothing is ever applied in part.
"""

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from pointsman_core.crd import KINDS, object_schema
from pointsman_core.manifest_yaml import Document, Json, Path, YamlSyntaxError, read_documents
from pointsman_core.resources import (
    API_VERSION,
    GROUP,
    PATTERN_MEANINGS,
    LLMExpert,
    RoutingPolicy,
)
from pointsman_core.snapshot import Snapshot, compile_snapshot, selects

MODELS: Mapping[str, type[LLMExpert | RoutingPolicy]] = {kind.name: kind.model for kind in KINDS}

MAX_SHOWN = 60
"""Characters of a wrong value that a message quotes."""


@dataclass(frozen=True, slots=True, order=True)
class ManifestError:
    """One thing that is wrong in a manifest or, as a warning, probably so."""

    source: str
    """The file, as the caller named it."""
    line: int = 0
    """From 1; 0 where the file as a whole is meant."""
    document: int = 0
    """Index within the file, from 0."""
    resource: str = ""
    """Such as ``LLMExpert/default/qwen``; empty where that is not known."""
    field: str = ""
    """Such as ``spec.backend.addresses[1]``; empty for the resource as a whole."""
    message: str = ""

    def __str__(self) -> str:
        """One line: ``file:line Kind namespace/name field: message``."""
        where = f"{self.source}:{self.line}" if self.line else self.source
        subject = " ".join(filter(None, (self.resource.replace("/", " ", 1), self.field)))
        return f"{where} {subject}: {self.message}" if subject else f"{where}: {self.message}"

    def as_dict(self) -> dict[str, str | int]:
        """For JSON."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


class ManifestErrors(ValueError):  # noqa: N818 - it is a list of them
    """Everything that is wrong in a set of manifests; as text one line each."""

    def __init__(self, errors: Iterable[ManifestError]) -> None:
        self.errors = tuple(sorted(errors))
        super().__init__("\n".join(map(str, self.errors)))


_R = TypeVar("_R", bound=LLMExpert | RoutingPolicy)


@dataclass(frozen=True, slots=True)
class Located(Generic[_R]):
    """A resource and where it stands."""

    resource: _R
    source: str
    document: Document
    root: Path = ()
    """Where in the document, for an item of a List."""

    @property
    def name(self) -> str:
        """``Kind/namespace/name``."""
        meta = self.resource.metadata
        return f"{self.resource.kind}/{meta.namespace}/{meta.name}"

    @property
    def place(self) -> str:
        """``file:line``."""
        return f"{self.source}:{self.document.line_of(self.root)}"

    def error(self, path: Path, message: str) -> ManifestError:
        """An error in one of the resource's fields."""
        return ManifestError(
            source=self.source,
            line=self.document.line_of((*self.root, *path)),
            document=self.document.index,
            resource=self.name,
            field=format_path(path),
            message=message,
        )


@dataclass(frozen=True, slots=True)
class ParsedManifests:
    """The resources of one file, each valid by itself."""

    located_experts: tuple[Located[LLMExpert], ...] = ()
    located_policies: tuple[Located[RoutingPolicy], ...] = ()

    @property
    def experts(self) -> tuple[LLMExpert, ...]:
        """In the order of the file."""
        return tuple(located.resource for located in self.located_experts)

    @property
    def policies(self) -> tuple[RoutingPolicy, ...]:
        """In the order of the file."""
        return tuple(located.resource for located in self.located_policies)


@dataclass(frozen=True, slots=True)
class CompiledManifests:
    """All resources of a set of files and the snapshots made of them."""

    experts: tuple[LLMExpert, ...]
    policies: tuple[RoutingPolicy, ...]
    snapshots: tuple[Snapshot, ...]
    """One per policy, ordered by namespace and name."""
    warnings: tuple[ManifestError, ...] = ()
    """What is allowed but probably not meant."""


def parse_manifests(text: str, *, source: str) -> ParsedManifests:
    """Read the resources of one YAML file; other groups' kinds are passed over.

    ``source`` names the file in messages. Raises `ManifestErrors` with all that is wrong
    within the resources; what concerns several of them `compile_manifests` finds.
    """
    parsed = _Parser(source)
    parsed.read(text)
    if parsed.errors:
        raise ManifestErrors(parsed.errors)
    return parsed.result()


def compile_manifests(sources: Mapping[str, str]) -> CompiledManifests:
    """Compile the texts of all files, by name, into one snapshot per policy.

    Endpoints are the experts' ``backend.addresses``: without a cluster nothing else can
    be resolved. Raises `ManifestErrors` with all that is wrong in all files.
    """
    parsers = [_Parser(source) for source in sources]
    for parser, text in zip(parsers, sources.values(), strict=True):
        parser.read(text)
    errors = [error for parser in parsers for error in parser.errors]
    everything = ParsedManifests(
        tuple(found for parser in parsers for found in parser.experts),
        tuple(found for parser in parsers for found in parser.policies),
    )
    errors += _check_names(everything)
    errors += _check_backends(everything.located_experts)
    if not errors:
        # With resources missing for their own errors, these would mislead.
        errors += _check_selections(everything, tuple(sources))
    if errors:
        raise ManifestErrors(errors)
    return CompiledManifests(
        experts=everything.experts,
        policies=everything.policies,
        snapshots=_snapshots(everything),
        warnings=tuple(sorted(_warnings(everything))),
    )


# --- one resource ----------------------------------------------------------------------


@dataclass(slots=True)
class _Parser:
    """Reads one file, collecting errors."""

    source: str
    experts: list[Located[LLMExpert]] = field(default_factory=list)
    policies: list[Located[RoutingPolicy]] = field(default_factory=list)
    errors: list[ManifestError] = field(default_factory=list)

    def result(self) -> ParsedManifests:
        return ParsedManifests(tuple(self.experts), tuple(self.policies))

    def read(self, text: str) -> None:
        try:
            for document in read_documents(text):
                self._read_object(document, document.value, ())
        except YamlSyntaxError as fault:
            self.errors.append(
                ManifestError(self.source, fault.line or 0, fault.index, message=str(fault))
            )

    def _read_object(self, document: Document, value: Json, root: Path) -> None:
        report = _Reporter(self, document, root)
        if not isinstance(value, dict):
            report((), f"must be a Kubernetes object, that is a mapping{_got(value)}")
            return
        items = value.get("items")
        if isinstance(items, list) and str(value.get("kind")).endswith("List"):
            for at, item in enumerate(items):
                self._read_object(document, item, (*root, "items", at))
            return
        report.resource = _resource_name(value)
        if _is_ours(value, report):
            self._read_ours(document, value, report)

    def _read_ours(self, document: Document, value: dict[str, Json], report: "_Reporter") -> None:
        before = len(self.errors)
        root = report.root
        for problem in document.problems:
            if problem.path[: len(root)] == root:
                report(problem.path[len(root) :], problem.message, line=problem.line)
        # A status is what a controller wrote; exported manifests carry it along.
        content = {key: _without_nulls(item) for key, item in value.items() if key != "status"}
        model = MODELS[str(value["kind"])]
        try:
            # By JSON and strictly: the API server does not take "60" for 60 either.
            resource = model.model_validate_json(
                json.dumps(content), strict=True, by_alias=True, by_name=False
            )
        except ValidationError as invalid:
            for error in invalid.errors(include_url=False):
                report(error["loc"], explain(error, model))
            return
        if len(self.errors) > before:
            return
        if isinstance(resource, LLMExpert):
            self.experts.append(Located(resource, self.source, document, root))
        else:
            self.policies.append(Located(resource, self.source, document, root))


@dataclass(slots=True)
class _Reporter:
    """Adds errors about one resource."""

    parser: _Parser
    document: Document
    root: Path
    resource: str = ""

    def __call__(self, path: Path, message: str, *, line: int | None = None) -> None:
        self.parser.errors.append(
            ManifestError(
                source=self.parser.source,
                line=line or self.document.line_of((*self.root, *path)),
                document=self.document.index,
                resource=self.resource,
                field=format_path(path),
                message=message,
            )
        )


def _is_ours(value: dict[str, Json], report: _Reporter) -> bool:
    """Whether the object is one to read; reports one that only seems to be another's."""
    api_version, kind = value.get("apiVersion"), value.get("kind")
    for name, content in (("apiVersion", api_version), ("kind", kind)):
        if not isinstance(content, str):
            report((name,), f"must be text{_got(content)}" if name in value else "is required")
            return False
    group = str(api_version).partition("/")[0]
    if group == GROUP and api_version != API_VERSION:
        report(("apiVersion",), f"must be {API_VERSION} (got {api_version})")
    elif group != GROUP and kind in MODELS:
        report(("apiVersion",), f"must be {API_VERSION} for a {kind} (got {api_version})")
    elif group == GROUP and kind not in MODELS:
        message = f"must be {' or '.join(MODELS)} (got {kind})"
        report(("kind",), message + _did_you_mean(str(kind), MODELS))
    return api_version == API_VERSION and kind in MODELS


def _resource_name(value: dict[str, Json]) -> str:
    meta = value.get("metadata")
    meta = meta if isinstance(meta, dict) else {}
    name, namespace = meta.get("name", "?"), meta.get("namespace", "default")
    return f"{value.get('kind', '?')}/{namespace}/{name}"


def _without_nulls(value: Json) -> Json:
    """Without fields that are null: the API server takes those as absent."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


# --- several resources -----------------------------------------------------------------


def _check_names(found: ParsedManifests) -> Iterator[ManifestError]:
    """No resource twice; no model name answered twice."""
    everything: list[Located[Any]] = [*found.located_experts, *found.located_policies]
    for located, first in _repeats(everything, lambda located: located.name):
        yield located.error(("metadata", "name"), f"exists twice, first at {first.place}")
    answered: dict[str, Located[RoutingPolicy]] = {}
    for policy in found.located_policies:
        for at, model in enumerate(policy.resource.spec.models):
            other = answered.setdefault(model, policy)
            if other is not policy and other.name != policy.name:
                yield policy.error(
                    ("spec", "models", at),
                    f"{model} is answered by {other.name} at {other.place} already",
                )


def _check_backends(experts: Iterable[Located[LLMExpert]]) -> Iterator[ManifestError]:
    for expert in experts:
        (backend,) = expert.resource.spec.backend.given
        if backend != "addresses":
            yield expert.error(
                ("spec", "backend", backend),
                "only the operator can resolve it; without a cluster write addresses: [ip:port]",
            )


def _check_selections(found: ParsedManifests, sources: tuple[str, ...]) -> Iterator[ManifestError]:
    """Every policy selects something; there is a policy at all."""
    if not found.policies:
        where = ", ".join(sources) or "nothing"
        yield ManifestError(where, message="holds no RoutingPolicy, so nothing could be routed")
    for policy in found.located_policies:
        if not any(selects(policy.resource, expert) for expert in found.experts):
            labels = policy.resource.spec.selector.match_labels
            wanted = ", ".join(f"{key}={value}" for key, value in labels.items())
            namespace = policy.resource.metadata.namespace
            what = f"no LLMExpert in namespace {namespace}" + (f" with {wanted}" if wanted else "")
            yield policy.error(("spec", "selector"), f"selects nothing: there is {what}")


def _warnings(found: ParsedManifests) -> Iterator[ManifestError]:
    places: dict[tuple[str, str], Located[LLMExpert]] = {}
    for expert in found.located_experts:
        spec = expert.resource.spec
        policies = [policy for policy in found.policies if selects(policy, expert.resource)]
        if not policies:
            yield expert.error((), "is selected by no RoutingPolicy")
        known = {rule.name for policy in policies for rule in policy.spec.domains}
        for at, domain in enumerate(spec.quality.domains):
            if policies and domain.name not in known:
                message = f"no policy that selects the expert defines the domain {domain.name}"
                yield expert.error(
                    ("spec", "quality", "domains", at, "name"),
                    message + _did_you_mean(domain.name, known),
                )
        for at, address in enumerate(spec.backend.addresses or ()):
            other = places.setdefault((address, spec.model), expert)
            if other is not expert:
                yield expert.error(
                    ("spec", "backend", "addresses", at),
                    f"{other.name} serves {spec.model} there as well",
                )


def _snapshots(found: ParsedManifests) -> tuple[Snapshot, ...]:
    addresses: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for expert in found.experts:
        meta = expert.metadata
        addresses[meta.namespace][meta.name] = tuple(expert.spec.backend.addresses or ())
    ordered = sorted(found.policies, key=lambda p: (p.metadata.namespace, p.metadata.name))
    return tuple(
        compile_snapshot(policy, found.experts, addresses[policy.metadata.namespace])
        for policy in ordered
    )


_T = TypeVar("_T")


def _repeats(items: Iterable[_T], key: Callable[[_T], str]) -> Iterator[tuple[_T, _T]]:
    """Each item whose key came before, with the first that had it."""
    first: dict[str, _T] = {}
    for item in items:
        if (other := first.setdefault(key(item), item)) is not item:
            yield item, other


# --- messages --------------------------------------------------------------------------


def format_path(path: Path) -> str:
    """``("spec", "models", 0)`` as ``spec.models[0]``."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"[A-Za-z0-9_-]+", part):
            text += f".{part}" if text else part
        else:
            text += f"[{json.dumps(part)}]"
    return text


def explain(error: ErrorDetails, model: type[LLMExpert | RoutingPolicy]) -> str:
    """A pydantic error in the words of the person who writes YAML."""
    kind, context = error["type"], error.get("ctx", {})
    if kind == "missing":
        return "is required"
    if kind == "extra_forbidden":
        *parent, name = error["loc"]
        known = _known_fields(model, parent)
        return "is not a field" + (_did_you_mean(str(name), known) or _one_of(known))
    if kind in ("rule", "repeated"):
        return error["msg"]
    if kind == "string_pattern_mismatch":
        return f"must be {PATTERN_MEANINGS[context['pattern']]}{_got(error['input'])}"
    # Pydantic says "Input should be greater than 0", "List should have at most 16 items …".
    message = re.sub(r"^\w+ should ", "must ", error["msg"]).replace(" after validation", "")
    if kind == "enum" and isinstance(error["input"], str):
        choices = re.findall(r"'([^']+)'", context["expected"])
        return message + _got(error["input"]) + _did_you_mean(error["input"], choices)
    if kind in ("too_long", "too_short"):
        return message.partition(", not ")[0] + f" (got {context['actual_length']})"
    return message + _got(error["input"])


def _known_fields(model: type[LLMExpert | RoutingPolicy], path: Iterable[str | int]) -> list[str]:
    schema: dict[str, Any] = object_schema(model)
    for part in path:
        schema = schema["items"] if isinstance(part, int) else schema["properties"][part]
    return [name for name in schema["properties"] if name != "status"]


def _one_of(known: Iterable[str]) -> str:
    return f"; known here: {', '.join(known)}"


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    by_lower = {name.lower().replace("_", ""): name for name in known}
    close = difflib.get_close_matches(word.lower().replace("_", ""), by_lower, n=1)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def _got(value: object) -> str:
    if isinstance(value, dict):
        return " (got a mapping)"
    if isinstance(value, list):
        return " (got a list)"
    shown = json.dumps(value, ensure_ascii=False)
    if len(shown) > MAX_SHOWN:
        shown = shown[:MAX_SHOWN] + "…"
    return f" (got {shown})"
