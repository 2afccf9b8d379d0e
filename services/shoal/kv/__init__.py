"""The paged KV cache: layout, blocks, pool."""
