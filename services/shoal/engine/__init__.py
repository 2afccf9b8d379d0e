"""One engine for both stages: scheduler, runner, attention, sampler, detokenizer."""
