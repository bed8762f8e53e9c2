"""Deciding an export: options, the plan, prompts and their embeddings."""
