"""The HTTP server: connections, limits at the door, metrics, logs and the page."""
