"""What every process needs of itself: its machine, its threads' heartbeats and mailboxes, work that is cut off."""
