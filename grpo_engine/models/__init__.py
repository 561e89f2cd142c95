"""The model shipped inside the package, and the script that makes it.

``miniature/`` is a Hugging Face directory (Qwen2 architecture, under one million weights).
``corpus.py`` writes the text it was trained on; ``train_miniature.py`` trains it from that text.
"""

from __future__ import annotations

from pathlib import Path

MINIATURE = Path(__file__).parent / "miniature"
