"""Text encoders and tokenizers of a checkpoint: loaded unmodified, and checked before they are run."""
