"""The modules that are traced: a truncated transformer with its precision written into it."""
