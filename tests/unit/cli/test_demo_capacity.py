import pytest

from pointsman_cli.demo.capacity import site_capacity
from pointsman_core.resources import LLMExpert


def test_endpoints_add_up():
    expert = {
        "metadata": {"name": "a"},
        "spec": {"model": "a", "backend": {"addresses": ["127.0.0.1:1", "127.0.0.1:2"]}},
    }
    two = LLMExpert.model_validate(expert)
    one = two.model_copy(
        update={
            "spec": two.spec.model_copy(
                update={
                    "backend": two.spec.backend.model_copy(update={"addresses": ["127.0.0.1:1"]})
                }
            )
        }
    )
    rates = [
        site_capacity([e], input_tokens=100.0, max_output_tokens=200, limit_ms=60.0)
        for e in (one, two)
    ]
    assert rates[0] > 0
    assert rates[1] == pytest.approx(2 * rates[0])
