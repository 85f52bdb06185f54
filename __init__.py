"""attnconvert: make the attention of a pretrained transformer cheaper, and prove what was kept."""

__version__ = "0.1.0"
