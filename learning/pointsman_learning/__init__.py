"""The laboratory: simulator, workloads, predictors, evaluation and training."""
