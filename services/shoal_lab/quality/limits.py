"""The least that commands ask for, once for their help and for their checks. Plain Python: ``--help`` stays fast."""

from __future__ import annotations

# Responses of an analysis: a standard error of fewer is hardly known itself.
MIN_SAMPLES = 8
# Passages of each text that a calibration learns from; a tenth of them is held out.
MIN_PASSAGES = 20
# Units (passages, answers, cases) that an interval is resampled from. Of normal units the percentile bootstrap's 95 %
# hold the mean in 89 of 100 runs with 10 of them, in 82 with 5, in 50 with 2: below 10 an interval is said to mean
# little, and no share of a loss is told.
MIN_UNITS = 10
