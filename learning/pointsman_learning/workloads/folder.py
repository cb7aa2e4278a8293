"""The folder of public data: where it is, what belongs into it, and whose it is."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from pointsman_common.data_folder import (
    DATA_VARIABLE,
    TEST_SCORES,
    TRACES,
    NoDataFolderError,
    find_data_folder,
)
from pointsman_common.files import reason
from pointsman_core.workload import WorkloadError

_AZURE = (
    "https://raw.githubusercontent.com/Azure/AzurePublicDataset/"
    "b469a113cedca53ddc3bdea71a143dc4b7d8700c"
)
_LLMROUTER = (
    "https://raw.githubusercontent.com/ulab-uiuc/LLMRouter/4e7a796942ce26e9d5f2b93191c7c2585c99c2e3"
)
_LLMROUTER_NQ = (
    "https://raw.githubusercontent.com/ulab-uiuc/LLMRouter/54997c8648e77e7f2f36062bbbee2037eddcaa98"
)


@dataclass(frozen=True, slots=True)
class DataFile:
    """One public file, pinned to its content."""

    path: str
    """Where it lies in the data folder."""
    url: str
    """Its public home."""
    sha256: str
    size: int
    """Bytes."""
    licence: str
    what: str
    """What it holds, in a few words."""


TRAIN_SCORES = "llmrouter/train.json"
TASKS = ("llmrouter/default_query_train.jsonl", "llmrouter/default_query_test.jsonl")
ANSWERS = "llmrouter/router_train_data_nq.json"

_CC_BY = "CC-BY-4.0"
_MIT = "MIT"

FILES: tuple[DataFile, ...] = (
    DataFile(
        path=TRACES["azure-conv"],
        url=f"{_AZURE}/data/AzureLLMInferenceTrace_conv.csv",
        sha256="2f1e5b666d4e3055fdbba98598ce2ec307767b9064e03e2fa46676dbcc7d0bf8",
        size=719_188,
        licence=_CC_BY,
        what="arrivals and sizes of a chat service",
    ),
    DataFile(
        path=TRACES["azure-code"],
        url=f"{_AZURE}/data/AzureLLMInferenceTrace_code.csv",
        sha256="54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
        size=320_117,
        licence=_CC_BY,
        what="arrivals and sizes of a coding service",
    ),
    DataFile(
        path=TRAIN_SCORES,
        url=f"{_LLMROUTER}/data/dcrouter_preprocessed/train.json",
        sha256="ad3ae70149998f02cbf0dd4557ccb6afcf365ac9391b7371329ffc22201e90e3",
        size=4_018_466,
        licence=_MIT,
        what="prompts with scores of nine models",
    ),
    DataFile(
        path=TEST_SCORES,
        url=f"{_LLMROUTER}/data/dcrouter_preprocessed/test.json",
        sha256="fbb6d3e3f62c7018e5446d3154cc05812d3124381f774738e9f0bac5bff79c79",
        size=361_757,
        licence=_MIT,
        what="prompts with scores, held out",
    ),
    DataFile(
        path=TASKS[0],
        url=f"{_LLMROUTER}/data/example_data/query_data/default_query_train.jsonl",
        sha256="f1b2e3281dc3f9e082016812e1a778ca30e9828c7e58fa0a9f6dc52350ad4b8c",
        size=3_519_579,
        licence=_MIT,
        what="task of each prompt",
    ),
    DataFile(
        path=TASKS[1],
        url=f"{_LLMROUTER}/data/example_data/query_data/default_query_test.jsonl",
        sha256="0fdf4b4236fb81c1a673a01950fb974e02599c83164b0e7832888aefaa490e27",
        size=405_273,
        licence=_MIT,
        what="task of each prompt",
    ),
    DataFile(
        path=ANSWERS,
        url=f"{_LLMROUTER_NQ}/llmrouter/data/nq/router_train_data_nq.json",
        sha256="1858a8af81162b279e4eba5195284fd20fcd8dfcf32a0a6dc96ded627ed47ed2",
        size=1_609_657,
        licence=_MIT,
        what="full answers of six models: how long they are",
    ),
)
"""All that `pointsman data fetch` downloads."""


@dataclass(frozen=True, slots=True)
class DataFolder:
    """A folder that holds some or all of `FILES`."""

    path: Path

    @classmethod
    def find(cls) -> "DataFolder | None":
        """As `find_data_folder`; raises WorkloadError when the environment names no folder."""
        try:
            found = find_data_folder()
        except NoDataFolderError as error:
            raise WorkloadError(str(error), source="data folder") from None
        return None if found is None else cls(found)

    @classmethod
    def require(cls) -> "DataFolder":
        """Like `find`, but raises WorkloadError with what to do when there is none."""
        folder = cls.find()
        if folder is None:
            raise WorkloadError(
                f"there is none: run `pointsman data fetch`, or set {DATA_VARIABLE}",
                source="data folder",
            )
        return folder

    def has(self, *paths: str) -> bool:
        """Whether all these files are there."""
        return all((self.path / path).is_file() for path in paths)

    def read(self, path: str) -> str:
        """Text of one file.

        Raises WorkloadError when it is missing or cannot be read.
        """
        file = self.path / path
        if not file.is_file():
            raise WorkloadError(
                f"is not there: run `pointsman data fetch --to {self.path}`", source=str(file)
            )
        return read_text(file)


def read_text(file: Path) -> str:
    """Text of a file; raises WorkloadError when it cannot be read."""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WorkloadError(f"cannot be read: {reason(error)}", source=str(file)) from error


def digest(file: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
