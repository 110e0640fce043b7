"""Experiments: the paper's Table I and what its sharpness says, wrong labels, memorising, rounding, the demo."""
