"""Padding-free supervised fine-tuning of Llama-like models."""

__version__ = "0.1.0"
