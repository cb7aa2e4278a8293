"""HAN-DRL's network: a heterogeneous graph attention network, estimator and heads.

    graph = pointsman_core.graph.encode(seen)          # arrays of one decision
    store = GraphStore.of(graphs)                      # many, without padding; save(), load()
    batch = store.batch(numbers)                       # PaddedBatch of tensors, any device
    network = HanNetwork(HanConfig())                  # untrained it is ImpactGreedy, exactly
    out = network(batch)                               # Output; dense, fast, any device
    out = network.forward_pyg(to_hetero(graphs))       # the same by PyG, slow: the oracle
    content = export(network, provenance=…)            # ONNX bytes for core's `HanModel`

`Output` (B graphs, E endpoints padded, the action after the last endpoint is rejection):
twin_q (2, B, E+1), logits (B, E+1), valid (B, E+1), chance and impact (B, E).
Actions that are not valid have finite values of no meaning: mask by ``valid``.
"""

from pointsman_learning.han.graphs import GraphStore, PaddedBatch
from pointsman_learning.han.model import HanConfig, HanNetwork, Output

__all__ = ["GraphStore", "HanConfig", "HanNetwork", "Output", "PaddedBatch"]
