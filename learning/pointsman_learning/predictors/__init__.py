"""Training and judging predictors of quality and answer length."""
