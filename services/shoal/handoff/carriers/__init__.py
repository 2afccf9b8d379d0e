"""How payload travels beside the frames: inline (in them), shm (one host), nixl (decode reads it)."""
