"""What FusedSAM does and costs beside its rivals: step, training, scaling, cost_model and features are commands."""
