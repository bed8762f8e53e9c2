"""Building the features graph that is traced, and counting its parameters."""
