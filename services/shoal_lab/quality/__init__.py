"""How much a shallow prompt costs, and how to make it cost less: importance, calibration, evaluation."""
