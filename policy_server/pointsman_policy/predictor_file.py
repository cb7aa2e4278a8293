"""The predictor of quality that a server is started with."""

from pathlib import Path

from pointsman_core.predictors import Artefact, ArtefactError, builtin_artefact
from pointsman_policy.settings import BUILTIN_PREDICTOR, NO_PREDICTOR


def load_predictor(name: str) -> Artefact | None:
    """Load what ``--predictor`` names: ``builtin``, ``none``, or a file.

    Raises:
        OSError: the file cannot be read.
        ArtefactError: it is no predictor that can be served.

    """
    if name == NO_PREDICTOR:
        return None
    if name == BUILTIN_PREDICTOR:
        return builtin_artefact()
    artefact = Artefact(Path(name).read_bytes(), source=name)
    if artefact.info.embedding:
        raise ArtefactError(
            f"{name} needs sentence embeddings, which take milliseconds a prompt:"
            " train a predictor of kind ngram to serve it"
        )
    return artefact
