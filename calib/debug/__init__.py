"""Finding where a bundle departs from the unmodified model."""
