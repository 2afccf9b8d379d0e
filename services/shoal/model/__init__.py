"""The transformer: plan, families, parameters, projection, decoder."""
