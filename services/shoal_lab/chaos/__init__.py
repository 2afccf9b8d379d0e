"""``shoal chaos``: real services on one host, load, faults, and a table of how they recovered."""
