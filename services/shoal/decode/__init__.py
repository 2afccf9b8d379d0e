"""The deep pool: reserves, invites prefill, and runs every token from the boundary token on."""
