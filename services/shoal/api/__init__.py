"""Where clients come in: the OpenAI-compatible HTTP API in front of the decode pool."""
