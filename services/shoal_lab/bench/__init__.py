"""How fast an OpenAI endpoint answers, and how much it bears: open and closed loops, percentiles, goodput."""
