"""The demo's site: the manifests of a user, changed so that one start serves all deciders.

Experts on loopback addresses are simulated on free ports; those elsewhere are real
engines and stay. Beside the user's own policy stands one clone per decider, answering its
own model name, so that all deciders see the same server, the same experts and the same
arrivals.
"""

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import yaml

from pointsman_core.manifests import compile_manifests
from pointsman_core.prediction import detect_domain, fold_keywords
from pointsman_core.resources import Algorithm, LLMExpert, QoS, Resource, RoutingPolicy
from pointsman_core.snapshot import selects


@dataclass(frozen=True, slots=True)
class Site:
    """One policy and its experts; what else the manifests declare takes no part."""

    experts: tuple[LLMExpert, ...]
    """The experts that the policy selects, by name."""
    policy: RoutingPolicy
    """The policy whose deciders are compared."""

    def expert(self, name: str) -> LLMExpert | None:
        """The expert of that name; None when the policy selects no such expert."""
        return next((e for e in self.experts if e.metadata.name == name), None)


def load_site(sources: Mapping[str, str]) -> Site:
    """Read manifests, given by file name.

    Of several policies the one that answers ``auto`` counts, else the first by name. Raises
    ManifestErrors for errors in them, also when there is nothing to route.
    """
    compiled = compile_manifests(sources)
    policy = min(compiled.policies, key=lambda p: ("auto" not in p.spec.models, p.metadata.name))
    chosen = [expert for expert in compiled.experts if selects(policy, expert)]
    return Site(tuple(sorted(chosen, key=lambda expert: expert.metadata.name)), policy)


def is_loopback(address: str) -> bool:
    """Whether ``ip:port`` is on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    return ipaddress.ip_address(host).is_loopback


def with_addresses(site: Site, moved: Mapping[tuple[str, str], str]) -> Site:
    """The same site with some endpoints elsewhere.

    ``moved`` maps an expert's name and its declared ``ip:port`` to the new one.
    """
    return Site(tuple(_moved(expert, moved) for expert in site.experts), site.policy)


def _moved(expert: LLMExpert, moved: Mapping[tuple[str, str], str]) -> LLMExpert:
    name = expert.metadata.name
    addresses = [moved.get((name, a), a) for a in expert.spec.backend.addresses or ()]
    backend = expert.spec.backend.model_copy(update={"addresses": addresses})
    spec = expert.spec.model_copy(update={"backend": backend})
    return expert.model_copy(update={"spec": spec})


def with_limit(site: Site, limit_ms: float) -> Site:
    """The same site with another limit on the latency per token.

    A limit on the first token below that, which no policy may have, is raised to it.
    """
    fields = site.policy.spec.qos.model_dump() | {"latency_per_token_ms": limit_ms}
    if (first_ms := site.policy.spec.qos.time_to_first_token_ms) is not None:
        fields["time_to_first_token_ms"] = max(first_ms, limit_ms)
    qos = QoS.model_validate(fields)
    spec = site.policy.spec.model_copy(update={"qos": qos})
    return Site(site.experts, site.policy.model_copy(update={"spec": spec}))


def clone_policy(policy: RoutingPolicy, decider: Algorithm) -> RoutingPolicy:
    """A copy that answers only `clone_model`, decides by ``decider`` and explains itself."""
    name = f"{policy.metadata.name[:40].rstrip('-.')}-{decider.lower()}"
    spec = policy.spec.model_copy(
        update={
            "models": [clone_model(policy, decider)],
            "algorithm": decider,
            # No other algorithm may name one.
            "model": policy.spec.model if decider is Algorithm.HAN_DRL else None,
            "explain_headers": True,
        }
    )
    metadata = policy.metadata.model_copy(update={"name": name})
    return policy.model_copy(update={"metadata": metadata, "spec": spec})


def clone_model(policy: RoutingPolicy, decider: Algorithm) -> str:
    """Model name that the clone for a decider answers, like ``auto/ShortestQueue``."""
    return f"{policy.spec.models[0]}/{decider}"


def to_yaml(site: Site, deciders: Iterable[Algorithm]) -> str:
    """All manifests of the demo: the site and a clone of its policy for each decider."""
    clones = [clone_policy(site.policy, decider) for decider in deciders]
    return manifests_of([*site.experts, site.policy, *clones])


def manifests_of(resources: Iterable[Resource]) -> str:
    """Resources as the YAML that they could have been read from."""
    documents = [r.model_dump(mode="json", by_alias=True, exclude_none=True) for r in resources]
    return str(yaml.safe_dump_all(documents, sort_keys=False))


def declared_score(site: Site, expert: LLMExpert, prompt: str) -> float:
    """Quality, 0 to 1, that an expert declares for the domain of a prompt."""
    domain = detect_domain(prompt, fold_keywords(tuple(site.policy.spec.domains)))
    quality = expert.spec.quality
    return next((d.score for d in quality.domains if d.name == domain), quality.default)
