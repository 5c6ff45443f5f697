"""The commands of `hf-lossless-lr`, one a file."""
