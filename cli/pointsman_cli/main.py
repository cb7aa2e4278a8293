"""The `pointsman` command.

Modules that define commands import what is heavy within the functions, so that
`pointsman --help` answers at once.
"""

import typer

from pointsman_cli import resources
from pointsman_cli.bench.cli import app as bench
from pointsman_cli.calibrate import app as calibrate
from pointsman_cli.data import app as data
from pointsman_cli.demo.command import demo
from pointsman_cli.evaluate import evaluate
from pointsman_cli.model_card import model_card
from pointsman_cli.predictors import app as predictor
from pointsman_cli.train import train
from pointsman_cli.tune import tune
from pointsman_engine_sim.cli import engine_sim
from pointsman_operator.cli import operator
from pointsman_policy.cli import envoy, policy_server, snapshot

app = typer.Typer(
    name="pointsman",
    help="QoS-aware routing of LLM requests among the experts of an edge site.",
    no_args_is_help=True,
    add_completion=False,
    # A bug shows Python's own traceback; expected errors are messages, not exceptions.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("demo")(demo)
app.command("policy-server")(policy_server)
app.command("operator")(operator)
app.command("envoy")(envoy)
app.command("engine-sim")(engine_sim)
app.add_typer(bench, name="bench")
app.add_typer(calibrate, name="calibrate")
app.add_typer(data, name="data")
app.add_typer(predictor, name="predictor")
app.command("train")(train)
app.command("tune")(tune)
app.command("snapshot")(snapshot)
app.command("evaluate")(evaluate)
app.command("model-card")(model_card)
app.command("validate")(resources.validate)
app.command("generate-crds")(resources.generate_crds)
app.command("generate-docs")(resources.generate_docs)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
