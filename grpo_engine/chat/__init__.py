"""Chat models that judge: an OpenAI-compatible endpoint, a local model, or a Python function.

``base`` what they have in common; ``cache`` the replies on disk; ``endpoint``, ``local`` and
``function`` the three kinds; ``load`` which of them a name means. Only ``local`` imports torch.
"""
