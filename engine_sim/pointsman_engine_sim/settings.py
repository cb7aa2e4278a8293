"""What one simulated engine is told at its start."""

from dataclasses import dataclass, field

from pointsman_core.batching import BLOCK_TOKENS
from pointsman_core.cost import CostModel
from pointsman_core.resources import LLMExpertSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Faults:
    """Ways to fail on purpose, for tests."""

    fail_after_tokens: int | None = None
    """Drop the connection after this many tokens of every answer; None: never."""
    error_rate: float = 0.0
    """Share of requests answered by status 500, 0 to 1; which ones follows the seed."""
    stall: bool = False
    """Accept every request and never answer it; health and metrics keep answering."""

    def __post_init__(self) -> None:
        if self.fail_after_tokens is not None and self.fail_after_tokens < 0:
            raise ValueError("fail_after_tokens must not be negative")
        if not 0.0 <= self.error_rate <= 1.0:
            raise ValueError("error_rate must lie between 0 and 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One simulated engine: its model, its speed, its address.

    Raises `ValueError` if a full context would not fit into the KV cache: like vLLM, the
    engine refuses to start rather than to refuse requests later.
    """

    model: str
    """Served name; also the ``model_name`` label of all metrics."""
    cost: CostModel
    """How long its iterations take and what its KV cache holds."""
    aliases: tuple[str, ...] = ()
    """Further names that requests may use."""
    context_tokens: int = 8192
    """Limit on prompt and answer together, in tokens."""
    expected_output_tokens: int = 256
    """Mean length of answers whose request does not fix it, in tokens."""
    seed: int = 0
    """Start of all that is drawn: lengths, words and errors."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 0
    """TCP port to listen on; 0 takes a free one."""
    faults: Faults = field(default_factory=Faults)
    """How it misbehaves."""

    def __post_init__(self) -> None:
        if self.context_tokens < 2:
            raise ValueError("a context needs at least 2 tokens: one of prompt, one of answer")
        if self.context_tokens > self.cost.kv_capacity_tokens:
            raise ValueError(
                f"a context of {self.context_tokens} tokens does not fit into the KV cache of "
                f"{self.cost.kv_capacity_tokens} tokens"
            )

    @property
    def kv_blocks(self) -> int:
        """Blocks of the KV cache."""
        return self.cost.kv_capacity_tokens // BLOCK_TOKENS

    @property
    def kv_tokens(self) -> int:
        """Tokens that whole blocks of the KV cache hold."""
        return self.kv_blocks * BLOCK_TOKENS

    @property
    def max_model_len(self) -> int:
        """Limit on prompt and answer that holds: the context, in whole blocks at most."""
        return min(self.context_tokens, self.kv_tokens)

    @property
    def served_models(self) -> tuple[str, ...]:
        """All names it answers to, the preferred one first."""
        return (self.model, *self.aliases)

    @classmethod
    def from_spec(
        cls,
        spec: LLMExpertSpec,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        seed: int = 0,
        faults: Faults | None = None,
    ) -> "EngineSettings":
        """Take model, limits and profile of one endpoint from an expert's resource."""
        return cls(
            model=spec.model,
            aliases=tuple(spec.aliases),
            cost=CostModel.from_profile(spec.profile, spec.limits),
            context_tokens=spec.limits.context_tokens,
            expected_output_tokens=spec.expected_output_tokens,
            seed=seed,
            host=host,
            port=port,
            faults=faults or Faults(),
        )
