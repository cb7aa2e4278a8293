"""Where the public data of demo and laboratory is; the demo has none of the laboratory's parts."""

import os
from collections.abc import Mapping
from pathlib import Path

DATA_VARIABLE = "POINTSMAN_DATA"
"""Environment variable that names the data folder."""
TRACES: Mapping[str, str] = {
    "azure-conv": "azure_llm_2023/AzureLLMInferenceTrace_conv.csv",
    "azure-code": "azure_llm_2023/AzureLLMInferenceTrace_code.csv",
}
"""Path of each arrival trace in the data folder."""
TEST_SCORES = "llmrouter/test.json"
"""Held-out prompts with scores."""


class NoDataFolderError(ValueError):
    """What the environment names as the data folder is none."""


def checkout() -> Path:
    """Root of the checkout that this runs from."""
    return Path(__file__).resolve().parents[2]


def user_folder() -> Path:
    """Where data goes and is found when nothing else is named."""
    base = os.environ.get("XDG_DATA_HOME") or str(Path.home() / ".local" / "share")
    return Path(base) / "pointsman"


def find_data_folder() -> Path | None:
    """Look where data may be; None when there is no such folder.

    First ``POINTSMAN_DATA``, then ``../shared/data`` beside the checkout, then `user_folder`.
    Raises NoDataFolderError when the variable names no folder.
    """
    if named := os.environ.get(DATA_VARIABLE):
        if not Path(named).is_dir():
            raise NoDataFolderError(f"{DATA_VARIABLE}={named} is not a folder")
        return Path(named)
    places = (checkout().parent / "shared" / "data", user_folder())
    return next((folder for folder in places if folder.is_dir()), None)
