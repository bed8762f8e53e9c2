"""Pictures of matches, heat maps and flow, drawn with Pillow alone."""
