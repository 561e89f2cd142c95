"""GRPO Engine: custom-kernel GRPO for Python, and every stage of DeepSeek-R1 on top."""

__version__ = "0.1.0"
