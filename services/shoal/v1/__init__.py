"""Generated from proto/shoal/v1 by proto/generate.py; never edited by hand."""
