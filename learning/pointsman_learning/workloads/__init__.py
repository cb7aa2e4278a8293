"""What is asked, when, and how well each expert answers it."""

from pointsman_learning.workloads.arrivals import (
    ArrivalProcess,
    OnOff,
    Process,
    Sizes,
    arrival_process,
    user_arrivals,
)
from pointsman_learning.workloads.corpus import (
    EDGE_EXPERTS,
    SPLITS,
    Corpus,
    Split,
    load_corpus,
    normalise,
    user_corpus,
)
from pointsman_learning.workloads.folder import FILES, DataFile, DataFolder
from pointsman_learning.workloads.pools import (
    BOARDS,
    Blend,
    Board,
    Pool,
    capacity,
    edge_site,
    load_pool,
    random_pool,
    with_policy,
)
from pointsman_learning.workloads.scenarios import (
    LIMITS,
    Limits,
    Mishaps,
    default_corpus,
    limits_of,
    make_scenario,
    outages,
    predicted_lengths,
)
from pointsman_learning.workloads.synthetic import synthetic_corpus

__all__ = [
    "BOARDS",
    "EDGE_EXPERTS",
    "FILES",
    "LIMITS",
    "SPLITS",
    "ArrivalProcess",
    "Blend",
    "Board",
    "Corpus",
    "DataFile",
    "DataFolder",
    "Limits",
    "Mishaps",
    "OnOff",
    "Pool",
    "Process",
    "Sizes",
    "Split",
    "arrival_process",
    "capacity",
    "default_corpus",
    "edge_site",
    "limits_of",
    "load_corpus",
    "load_pool",
    "make_scenario",
    "normalise",
    "outages",
    "predicted_lengths",
    "random_pool",
    "synthetic_corpus",
    "user_arrivals",
    "user_corpus",
    "with_policy",
]
