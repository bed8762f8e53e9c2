"""The layouts in which authors publish their models, which ComfyUI reads too."""
