"""The models shipped inside the package, and the script that makes them.

``miniature/`` is a Hugging Face directory (Qwen2 architecture, under one million weights),
``miniature-student/`` a smaller one of the same kind, for the distillation stage. ``corpus.py``
writes the text they were trained on; ``train_miniature.py`` trains them from that text.
``general.py`` holds toy tasks that no rule can check.
"""

from __future__ import annotations

from pathlib import Path

MINIATURE = Path(__file__).parent / "miniature"
MINIATURE_STUDENT = Path(__file__).parent / "miniature-student"
