"""The hand-off: how a prompt's K/V passes from a prefill replica to a decode replica."""
