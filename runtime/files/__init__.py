"""Files: read within bounds if others may have written them, and written whole or not at all."""
