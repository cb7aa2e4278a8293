"""Training and judging predictors of quality and answer length."""

from pointsman_learning.predictors.training import (
    KINDS,
    Kind,
    leave_task_out,
    out_of_fold,
    out_of_fold_answers,
    predict_matrix,
    train,
)

__all__ = [
    "KINDS",
    "Kind",
    "leave_task_out",
    "out_of_fold",
    "out_of_fold_answers",
    "predict_matrix",
    "train",
]
