"""The shallow pool: computes prompts through the kept layers and ships their K/V."""
