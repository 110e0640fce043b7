"""The paper's Table I and figures, and what its sharpness says: table1 and sharpness_study are commands."""
