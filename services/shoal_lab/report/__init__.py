"""What measurements are read on: a page of HTML that needs no other file, and its plots. Plots want matplotlib."""
